"""`rcmae lab gradients RUN`: does the teacher of a real network revert the previous step, and only on similar
inputs?

After a step on batch B, the gradients of the two losses are computed separately on four batches: B again, B
with new masks, new crops of the same images, and other images. In the linear theory (`linear_model.py`), the
consistency gradient opposes the reconstruction gradient of that step, the more so the more similar the inputs
are: the cosines satisfy i < ii <= iii < iv, with iv near 0.
"""

import json
import math
from collections.abc import Callable
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
from ..errors import CheckpointError, ConfigError, DataError, DivergedError, refuse
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
"""Of the consistency gradient: its cosine with the reconstruction gradient of the previous step and with
AdamW's first moment, and its norm over that of the present reconstruction gradient."""


@dataclass(frozen=True, kw_only=True)
class GradientSettings:
    """Settings of the study."""

    batches: int = 24
    "number of measured steps"
    batch_size: int | None = None
    "images per batch; default: the recipe's, at most 128"
    settle: int | None = None
    "steps before the measured ones; default: three half-lives of the teacher, from 10 to 100"
    lr: float | None = None
    "learning rate of all these steps; default: half the recipe's peak for this batch, the mean of a cosine"
    device: str = "auto"
    "auto, cpu, cuda, cuda:1 or mps"


class GradientStudy:
    """A method from the newest checkpoint of a run, or randomly initialized from a recipe, trained further in
    float32."""

    def __init__(self, run: str, setting: GradientSettings):
        """Raises ConfigError for a method without `compare`, CheckpointError for a run without a
        checkpoint."""
        rules = [
            (setting.batches >= 2, f"an interval needs 2 batches or more, not {setting.batches}"),
            (setting.lr is None or 0 < setting.lr < math.inf, f"lr must be above 0, not {setting.lr}"),
            (
                setting.settle is None or setting.settle >= 0,
                f"settle must be 0 or more, not {setting.settle}",
            ),
            (
                setting.batch_size is None or setting.batch_size >= 2,
                f"a batch needs 2 images or more, not {setting.batch_size}",
            ),
        ]
        refuse(text for valid, text in rules if not valid)
        folder = Path(run)
        is_run = (folder / "recipe.toml").exists()
        if folder.is_dir() and (kind := kind_of(folder)) != "pre-training":
            problem = f"is a run of {kind}" if kind else "is no run directory: recipe.toml is missing"
            raise ConfigError(f"{run} {problem}; give a run of `rcmae pretrain`")
        self.recipe = (
            parse_recipe((folder / "recipe.toml").read_text(encoding="utf-8"), run)
            if is_run
            else load_recipe(run)
        )
        if not METHODS[self.recipe.method].compares():
            known = " or ".join(name for name, method in METHODS.items() if method.compares())
            raise ConfigError(
                f"{self.recipe.method} has no reconstruction and consistency losses, whose gradients are "
                f"compared here; give a run of {known}"
            )
        self.device = pick_device(setting.device)
        self.source = open_source(self.recipe.data, self.recipe.images.channels, size=self.recipe.images.size)
        self.batch_size = setting.batch_size or min(self.recipe.optim.batch_size, 128)
        if len(self.source) < 2 * self.batch_size:
            raise DataError(
                f"{self.recipe.data} holds {len(self.source)} images, fewer than two batches of "
                f"{self.batch_size}; lower --batch-size"
            )
        torch.manual_seed(self.recipe.seed)
        self.method: Method = METHODS[self.recipe.method](self.recipe, *self._statistics(folder)).to(
            self.device
        )
        optim = self.recipe.optim
        self.lr = setting.lr or optim.base_lr * self.batch_size / 256 / 2
        self.optimizer = adamw(self.method.student, optim, self.lr)
        self.step, total = 0, self.recipe.total_steps(len(self.source)) or 1000
        if is_run:
            path = newest(folder / "checkpoints")
            if path is None:
                raise CheckpointError(f"{run} has no checkpoint; `rcmae pretrain --out {run}` makes one")
            state = load_checkpoint(path, self.method, self.optimizer)
            self.step, total = state["step"], state["total_steps"]
        # The schedules are fixed at the checkpoint's step, but not after half the run, since the momentum may
        # approach 1.
        self.time = Progress(min(self.step, total // 2), total, max(1, len(self.source) // optim.batch_size))
        momentum = self.method.momentum_per_step(self.time)
        half_life = math.inf if momentum >= 1 else math.log(0.5) / math.log(max(momentum, 1e-6))
        self.settle = setting.settle if setting.settle is not None else int(min(max(3 * half_life, 10), 100))
        self.images = Images(self.source, self.method.views(), self.recipe.seed, self.recipe.images.channels)
        self.sampler = BatchSampler(len(self.source), self.batch_size, seed=self.recipe.seed + 1)
        self.per_epoch = len(self.source) // self.batch_size
        with torch.no_grad():
            comparison = self.method.compare(self.batch([0, 1], 0))
        assert comparison is not None
        self.about = {
            "run": folder.name,
            "recipe": self.recipe.method,
            "step": self.step,
            "batches": setting.batches,
            "batch_size": self.batch_size,
            "settle": self.settle,
            "lr": self.lr,
            "half_life": half_life,
            "momentum": momentum,
            "gamma": comparison.gamma,
            "images": len(self.source),
            "whole_images": self.recipe.images.crop_scale == (1.0, 1.0) and not self.recipe.images.flip,
        }

    def _statistics(self, folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if (folder / "machine.json").exists():
            about = json.loads((folder / "machine.json").read_text())
            return tuple(about["mean"]), tuple(about["std"])
        return usual_statistics(self.recipe.images) or measure_statistics(
            self.source, self.recipe.images.channels
        )

    def batch(self, indices: list[int], draw: int) -> dict[str, Tensor]:
        """Images by index; `draw` selects their random crops and masks."""
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

    def measure(self, k: int) -> list[dict[str, Any]]:
        """One step on batch k, then a row for each condition."""
        # Other images of the same epoch, since the next epoch may start with the same ones.
        neighbor = k + 1 if (k + 1) % self.per_epoch else k - 1
        indices, others = ([i for _, i in self.sampler.keys(step)] for step in (k, neighbor))
        first = self.batch(indices, 2 * k)
        self.method.train()
        before, _ = both_gradients(self.method, first)
        self.train(first)
        names = list(before)
        parameters = dict(self.method.student.named_parameters())
        moment = {name: self.optimizer.state[parameters[name]]["exp_avg"] for name in names}
        new_crops = self.batch(indices, 2 * k + 1)
        new_masks = {name: new_crops[name] for name in first if name != "image"}
        batches = {"i": first, "ii": first | new_masks, "iii": new_crops, "iv": self.batch(others, 2 * k)}
        features = {name: self.features(batch) for name, batch in batches.items()}
        rows = []
        for name, batch in batches.items():
            r, c = both_gradients(self.method, batch)
            rows.append(
                {
                    "condition": name,
                    "similarity": _similarity(features["i"], features[name]),
                    **_relations(c, r, before, moment, names),
                    "by_block": {
                        block: _relations(c, r, before, moment, members)
                        for block, members in blocks(names).items()
                    },
                }
            )
        return rows

    @torch.no_grad()
    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean over the student's tokens, [b d]."""
        return self.method.encode(batch).float().mean(1)


def run_gradients(
    run: str, setting: GradientSettings, report: Callable[[str], object] = lambda text: None
) -> dict[str, Any]:
    """Let the method settle, then measure `setting.batches` steps: all rows, their summary and the
    findings."""
    s = GradientStudy(run, setting)
    report(
        f"{s.about['recipe']} at step {s.step}: {s.settle} steps to settle, then {setting.batches} measured "
        f"steps, {s.batch_size} images each"
    )
    rows: list[dict[str, Any]] = []
    with Screen(True).progress("settling, then measuring", s.settle + setting.batches) as tick:
        for k in range(s.settle + setting.batches):
            if k < s.settle:
                s.train(s.batch([i for _, i in s.sampler.keys(k)], 2 * k))
            else:
                rows += s.measure(k)
            tick(k + 1)
    return {"about": s.about, "rows": rows, "summary": summary(rows), "findings": findings(rows, s.about)}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and 95 % bootstrap interval over batches of every value, one row per condition."""
    table = []
    for name in CONDITIONS:
        selected = [row for row in rows if row["condition"] == name]
        line: dict[str, Any] = {"condition": name, "what": CONDITIONS[name]}
        for key in ("similarity", *MEASURES):
            line[key] = bootstrap([row[key] for row in selected])
        line["by_block"] = {
            block: {key: bootstrap([row["by_block"][block][key] for row in selected]) for key in MEASURES}
            for block in selected[0]["by_block"]
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
    """Why the consistency loss has no effect in this run; empty if it has one."""
    if about["gamma"] == 0:
        return "The consistency loss has weight 0 in this run"
    if not any(row["ratio"] for row in rows):
        return "The consistency gradient is zero on every batch: teacher and student are the same"
    return ""


def findings(rows: list[dict[str, Any]], about: dict[str, Any]) -> list[tuple[str, str]]:
    """Whether the expected order of the cosines holds: (good | note, sentence) for each part of it, from
    paired differences over the batches."""
    if why := nothing_to_judge(rows, about):
        return [("note", f"{why}, so there is nothing to judge.")]
    cosines = {name: [row["previous"] for row in rows if row["condition"] == name] for name in CONDITIONS}
    sentences = []
    for lower, upper in (("i", "ii"), ("ii", "iii"), ("iii", "iv")):
        mean, low, high = bootstrap([b - a for a, b in zip(cosines[lower], cosines[upper], strict=True)])
        if low > 0:
            verdict = "holds"
        elif high < 0:
            verdict = "does not hold, the order is reversed"
        else:
            verdict = "no difference" if (lower, upper) == ("ii", "iii") else "inconclusive"
        text = f"{CONDITIONS[lower]} below {CONDITIONS[upper]}: {verdict} "
        text += f"(difference {_signed(mean)}, 95 % interval {_signed(low)} to {_signed(high)})."
        if (lower, upper) == ("ii", "iii") and about["whole_images"]:
            text += " This recipe uses full images, so the new crops are the same crops."
        sentences.append(("good" if low > 0 else "note", text))
    mean, low, high = bootstrap(cosines["iv"])
    zero = low <= 0 <= high
    verdict = "holds" if zero else "does not hold, the teacher reverts what all images have in common"
    text = f"no effect on other images: {verdict} ({_signed(mean)}, {_signed(low)} to {_signed(high)})."
    sentences.append(("good" if zero else "note", text))
    return sentences


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def write_gradients_page(result: dict[str, Any], out: Path) -> Path:
    """Write gradients.json, the figures as SVG files, and gradients.html, whose path is returned."""
    out.mkdir(parents=True, exist_ok=True)
    # Ordered by similarity to batch B; gray is the control.
    colors = dict(zip(CONDITIONS, ("memory3", "memory2", "memory1", "baseline"), strict=True))
    points = []
    for name, description in CONDITIONS.items():
        rows = [row for row in result["rows"] if row["condition"] == name]
        x, y = ([row[key] for row in rows] for key in ("similarity", "previous"))
        points.append(Line(f"{name}: {description}", colors[name], x, y, "o"))
    layers = {
        key: {
            f"{line['condition']}: {line['what']}": (
                colors[line["condition"]],
                {k: v[key][0] for k, v in line["by_block"].items()},
            )
            for line in result["summary"]
        }
        for key in MEASURES
    }
    ylabel = "cosine with the previous step"
    svgs = {
        "similarity": plot(
            points, {"no effect": 0.0}, ylabel, xlabel="similarity of the features to those of batch B"
        ),
        "layers": by_depth(layers["previous"], ylabel, {"": 0.0}),
        "moments": by_depth(layers["moment"], "cosine with AdamW's moment", {"": 0.0}),
        "ratios": by_depth(layers["ratio"], "|∇L_c| / |∇L_r|", {"equal": 1.0}),
    }
    (out / "gradients.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, svg in svgs.items():
        (out / f"{name}.svg").write_text(standalone(svg), encoding="utf-8")
    title = f"What the teacher reverts: {result['about']['run']}"
    page = template("gradients.html.j2", "rcmae.lab").render(title=title, figures=svgs, **result)
    (out / "gradients.html").write_text(page, encoding="utf-8")
    return out / "gradients.html"


def _relations(
    c: dict[str, Tensor],
    r: dict[str, Tensor],
    before: dict[str, Tensor],
    moment: dict[str, Tensor],
    names: list[str],
) -> dict[str, float]:
    """The measures of the consistency gradient c, restricted to the weights `names`."""
    ratio = _norm(c, names) / max(_norm(r, names), 1e-30)
    return {"previous": _cosine(c, before, names), "moment": _cosine(c, moment, names), "ratio": ratio}


def _norm(gradient: dict[str, Tensor], names: list[str]) -> float:
    return torch.stack(torch._foreach_norm([gradient[n] for n in names])).double().norm().item()


def _cosine(a: dict[str, Tensor], b: dict[str, Tensor], names: list[str]) -> float:
    dot = sum((a[n].double() * b[n].double()).sum().item() for n in names)
    return dot / max(_norm(a, names) * _norm(b, names), 1e-30)


def _similarity(a: Tensor, b: Tensor) -> float:
    """Mean cosine of paired features, centered on their common mean, without which all would be similar."""
    center = torch.cat([a, b]).mean(0)
    return F.cosine_similarity(a - center, b - center, 1).mean().item()
