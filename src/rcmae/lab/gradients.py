"""`rcmae lab gradients RUN`: does the teacher of a real network take back the last step, and only where inputs are similar?

After a step on batch B, the gradients of both losses are taken apart on four batches: B again, B under new masks, new crops of
the same images, and other images. The linear theory (`linear_model.py`) expects the consistency gradient to point against the
reconstruction gradient of that step, the more so the more alike the inputs: i < ii <= iii < iv, and iv near 0.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.dataset import Images, collate, measure_statistics
from ..data.sampler import BatchSampler
from ..data.sources import open_source
from ..engine.checkpoint import load_checkpoint, newest
from ..engine.console import Screen
from ..engine.distributed import pick_device
from ..engine.optim import adamw
from ..engine.schedules import Progress
from ..errors import CheckpointError, ConfigError, DataError, DivergedError
from ..methods import METHODS, Method
from ..methods.recipes import load_recipe, parse_recipe
from ..models.backbone import usual_statistics
from ..report.build import template
from ..report.curves import Line, by_depth, plot, standalone
from ..report.files import kind_of
from .monitor import blocks, both_gradients

CONDITIONS = {
    "i": "same crops, same mask",
    "ii": "same crops, new mask",
    "iii": "new crops, new mask",
    "iv": "other images",
}

MEASURES = ("previous", "moment", "ratio")
"Of the consistency gradient: cosine with the last step's reconstruction gradient, with AdamW's first moment; norm over the present one's."


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the question is asked."""

    batches: int = 24
    "steps that are looked at"
    batch_size: int | None = None
    "images a batch; default: the recipe's, at most 128"
    settle: int | None = None
    "steps before, at the same learning rate; default: three half-lives of the teacher, from 10 to 100"
    lr: float | None = None
    "learning rate of these steps; default: half the recipe's peak for this batch, its mean over a cosine"
    device: str = "auto"
    "auto, cpu, cuda, cuda:1 or mps"


class Study:
    """A method from the newest checkpoint of a run, or a new one of a recipe, ready to go on in float32."""

    def __init__(self, run: str, setting: Setting):
        """Raises ConfigError for a method whose losses cannot be compared, CheckpointError for a run without a checkpoint."""
        rules = [
            (setting.batches >= 2, f"an interval needs 2 batches or more, not {setting.batches}"),
            (setting.lr is None or 0 < setting.lr < math.inf, f"lr must be above 0, not {setting.lr}"),
            (setting.settle is None or setting.settle >= 0, f"settle must be 0 or more, not {setting.settle}"),
            (setting.batch_size is None or setting.batch_size >= 2, f"a batch needs 2 images or more, not {setting.batch_size}"),
        ]
        if problems := [text for fine, text in rules if not fine]:
            raise ConfigError("; ".join(problems))
        folder = Path(run)
        begun = (folder / "recipe.toml").exists()
        if folder.is_dir() and (kind := kind_of(folder)) != "pre-training":
            what = f"is a run of {kind}" if kind else "is no run directory: recipe.toml is missing"
            raise ConfigError(f"{run} {what}; give a run of `rcmae pretrain`")
        self.recipe = parse_recipe((folder / "recipe.toml").read_text(encoding="utf-8"), run) if begun else load_recipe(run)
        if not METHODS[self.recipe.method].compares():
            known = " or ".join(name for name, method in METHODS.items() if method.compares())
            why = "has no reconstruction and consistency losses under a teacher, whose gradients are compared here"
            raise ConfigError(f"{self.recipe.method} {why}; give a run of {known}")
        self.device = pick_device(setting.device)
        self.source = open_source(self.recipe.data, self.recipe.images.channels, size=self.recipe.images.size)
        self.batch_size = setting.batch_size or min(self.recipe.optim.batch_size, 128)
        if len(self.source) < 2 * self.batch_size:
            raise DataError(
                f"{self.recipe.data} holds {len(self.source)} images, fewer than two batches of {self.batch_size}; lower --batch-size"
            )
        torch.manual_seed(self.recipe.seed)
        self.method: Method = METHODS[self.recipe.method](self.recipe, *self._statistics(folder)).to(self.device)
        optim = self.recipe.optim
        self.lr = setting.lr or optim.base_lr * self.batch_size / 256 / 2
        self.optimizer = adamw(self.method.student, optim, self.lr)
        self.step, total = 0, self.recipe.total_steps(len(self.source)) or 1000
        if begun:
            path = newest(folder / "checkpoints")
            if path is None:
                raise CheckpointError(f"{run} holds no checkpoint; `rcmae pretrain --out {run}` makes one")
            state = load_checkpoint(path, self.method, self.optimizer)
            self.step, total = state["step"], state["total_steps"]
        # The schedules stand still at the checkpoint's step; the momentum is as far as half the run at most, before it ends at 1.
        self.time = Progress(min(self.step, total // 2), total, max(1, len(self.source) // optim.batch_size))
        kept = self.method.momentum_per_step(self.time)
        half_life = math.inf if kept >= 1 else math.log(0.5) / math.log(max(kept, 1e-6))
        self.settle = setting.settle if setting.settle is not None else int(min(max(3 * half_life, 10), 100))
        self.images = Images(self.source, self.method.views(), self.recipe.seed, self.recipe.images.channels)
        self.sampler = BatchSampler(len(self.source), self.batch_size, seed=self.recipe.seed + 1)
        self.per_epoch = len(self.source) // self.batch_size
        with torch.no_grad():
            gamma = self.method.compare(self.batch([0, 1], 0)).gamma
        self.about = {
            "run": folder.name, "recipe": self.recipe.method, "step": self.step, "batches": setting.batches, "batch_size": self.batch_size,
            "settle": self.settle, "lr": self.lr, "half_life": half_life, "momentum": kept, "gamma": gamma,
            "images": len(self.source),
            "whole_images": self.recipe.images.crop_scale == (1.0, 1.0) and not self.recipe.images.flip,
        }  # fmt: skip

    def _statistics(self, folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if (folder / "machine.json").exists():
            about = json.loads((folder / "machine.json").read_text())
            return tuple(about["mean"]), tuple(about["std"])
        return usual_statistics(self.recipe.images) or measure_statistics(self.source, self.recipe.images.channels)

    def batch(self, indices: list[int], draw: int) -> dict[str, Tensor]:
        """Images by index, under the crops and masks of a draw."""
        batch = collate([self.images[(draw, i)] for i in indices])
        batch.pop("bad")
        return {k: v.to(self.device) for k, v in batch.items()}

    def train(self, batch: dict[str, Tensor]) -> None:
        """One step. Raises DivergedError when the loss is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        loss = self.method(batch, self.time)["loss"]
        if not loss.isfinite():
            raise DivergedError(f"the loss is not finite at a learning rate of {self.lr:g}; lower --lr")
        loss.backward()
        applied = torch.ones((), device=self.device)
        self.method.before_step(self.time, applied)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(self.time, applied)

    def look(self, k: int) -> list[dict[str, Any]]:
        """One step on batch k, then a row for each condition."""
        # Other images of the same epoch: those of the next one may be the same.
        beside = k + 1 if (k + 1) % self.per_epoch else k - 1
        here, other = ([i for _, i in self.sampler.keys(step)] for step in (k, beside))
        first = self.batch(here, 2 * k)
        self.method.train()
        before, _ = both_gradients(self.method, first)
        self.train(first)
        names = list(before)
        parameters = dict(self.method.student.named_parameters())
        moment = {name: self.optimizer.state[parameters[name]]["exp_avg"] for name in names}
        again = self.batch(here, 2 * k + 1)
        orders = {name: again[name] for name in first if name != "image"}
        given = {"i": first, "ii": first | orders, "iii": again, "iv": self.batch(other, 2 * k)}
        features = {name: self.features(batch) for name, batch in given.items()}
        rows = []
        for name, batch in given.items():
            r, c = both_gradients(self.method, batch)
            rows.append({
                "condition": name,
                "similarity": _similarity(features["i"], features[name]),
                **_compared(c, r, before, moment, names),
                "by_block": {block: _compared(c, r, before, moment, inside) for block, inside in blocks(names).items()},
            })  # fmt: skip
        return rows

    @torch.no_grad()
    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean over the student's tokens of what is visible, [b d]."""
        return self.method.encode(batch).float().mean(1)


def study(run: str, setting: Setting, say: Any = lambda text: None) -> dict[str, Any]:
    """Settle, then look at `setting.batches` steps; all rows, their summary and the findings in words."""
    s = Study(run, setting)
    say(f"{s.about['recipe']} at step {s.step}: {s.settle} steps to settle, then {setting.batches} to look at, {s.batch_size} images each")
    rows: list[dict[str, Any]] = []
    with Screen(True).progress("settling, then looking at batches", s.settle + setting.batches) as tick:
        for k in range(s.settle + setting.batches):
            if k < s.settle:
                s.train(s.batch([i for _, i in s.sampler.keys(k)], 2 * k))
            else:
                rows += s.look(k)
            tick(k + 1)
    found = {"about": s.about, "rows": rows, "summary": summary(rows)}
    return found | {"said": findings(rows, s.about)}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and 95 % bootstrap interval over batches of every number, a row a condition."""
    table = []
    for name in CONDITIONS:
        own = [row for row in rows if row["condition"] == name]
        line: dict[str, Any] = {"condition": name, "what": CONDITIONS[name]}
        for key in ("similarity", *MEASURES):
            line[key] = bootstrap([row[key] for row in own])
        line["by_block"] = {
            block: {key: bootstrap([row["by_block"][block][key] for row in own]) for key in MEASURES} for block in own[0]["by_block"]
        }
        table.append(line)
    return table


def bootstrap(values: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """Mean, and the 2.5 and 97.5 percentiles of the means of resampled batches."""
    v, rng = np.array(values), np.random.Generator(np.random.Philox(key=0))
    means = v[rng.integers(len(v), size=(draws, len(v)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(v.mean()), float(low), float(high)


def nothing_to_judge(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Why no consistency takes anything back here; empty where one does."""
    if about["gamma"] == 0:
        return "The consistency has weight 0 in this run"
    if not any(row["ratio"] for row in rows):
        return "The consistency gradient is zero on every batch: teacher and student are the same"
    return ""


def findings(rows: list[dict[str, Any]], about: dict[str, Any]) -> list[tuple[str, str]]:
    """Does the expected order hold? A (good | note, sentence) for each part of it, from paired differences over the batches."""
    if why := nothing_to_judge(rows, about):
        return [("note", f"{why}, so there is nothing to judge.")]
    by = {name: [row["previous"] for row in rows if row["condition"] == name] for name in CONDITIONS}
    said = []
    for one, other in (("i", "ii"), ("ii", "iii"), ("iii", "iv")):
        mean, low, high = bootstrap([b - a for a, b in zip(by[one], by[other], strict=True)])
        word = "holds" if low > 0 else "does not hold: it is the other way round" if high < 0 else "cannot be told"
        if (one, other) == ("ii", "iii") and low <= 0 <= high:
            word = "they are alike"
        text = f"{CONDITIONS[one]} below {CONDITIONS[other]}: {word} "
        text += f"(difference {_signed(mean)}, 95 % interval {_signed(low)} to {_signed(high)})."
        if (one, other) == ("ii", "iii") and about["whole_images"]:
            text += " This recipe takes whole images, so new crops are the same crops."
        said.append(("good" if low > 0 else "note", text))
    mean, low, high = bootstrap(by["iv"])
    word = "holds" if low <= 0 <= high else "does not hold: what the teacher takes back is shared by all images"
    text = f"Nothing on other images: {word} ({_signed(mean)}, {_signed(low)} to {_signed(high)})."
    said.append(("good" if low <= 0 <= high else "note", text))
    return said


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def write_page(found: dict[str, Any], out: Path) -> Path:
    """Write gradients.json, the figures as SVGs and gradients.html; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    # In order of likeness to batch B; grey is the control.
    colours = dict(zip(CONDITIONS, ("memory3", "memory2", "memory1", "floor"), strict=True))
    points = []
    for name, what in CONDITIONS.items():
        own = [row for row in found["rows"] if row["condition"] == name]
        x, y = ([row[key] for row in own] for key in ("similarity", "previous"))
        points.append(Line(f"{name}: {what}", colours[name], x, y, "o"))
    layers = {
        key: {
            f"{line['condition']}: {line['what']}": (colours[line["condition"]], {k: v[key][0] for k, v in line["by_block"].items()})
            for line in found["summary"]
        }
        for key in MEASURES
    }
    ylabel = "cosine with the step before"
    drawn = {
        "similarity": plot(points, {"nothing taken back": 0.0}, ylabel, xlabel="likeness of the features to those of batch B"),
        "layers": by_depth(layers["previous"], ylabel, {"": 0.0}),
        "moments": by_depth(layers["moment"], "cosine with AdamW's moment", {"": 0.0}),
        "ratios": by_depth(layers["ratio"], "|∇L_c| / |∇L_r|", {"equal": 1.0}),
    }
    (out / "gradients.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, svg in drawn.items():
        (out / f"{name}.svg").write_text(standalone(svg), encoding="utf-8")
    title = f"What the teacher takes back: {found['about']['run']}"
    page = template("gradients.html.j2", "rcmae.lab").render(title=title, figures=drawn, **found)
    (out / "gradients.html").write_text(page, encoding="utf-8")
    return out / "gradients.html"


def _compared(
    c: dict[str, Tensor], r: dict[str, Tensor], before: dict[str, Tensor], moment: dict[str, Tensor], names: list[str]
) -> dict[str, float]:
    """The consistency gradient of some weights against those weights' other gradients."""
    ratio = _norm(c, names) / max(_norm(r, names), 1e-30)
    return {"previous": _cosine(c, before, names), "moment": _cosine(c, moment, names), "ratio": ratio}


def _norm(gradient: dict[str, Tensor], names: list[str]) -> float:
    return torch.stack(torch._foreach_norm([gradient[n] for n in names])).double().norm().item()


def _cosine(a: dict[str, Tensor], b: dict[str, Tensor], names: list[str]) -> float:
    dot = sum((a[n].double() * b[n].double()).sum().item() for n in names)
    return dot / max(_norm(a, names) * _norm(b, names), 1e-30)


def _similarity(a: Tensor, b: Tensor) -> float:
    """Mean cosine of paired features, both centred on their common mean (without that, all features look alike)."""
    centre = torch.cat([a, b]).mean(0)
    return F.cosine_similarity(a - centre, b - centre, 1).mean().item()
