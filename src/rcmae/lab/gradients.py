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
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import check
from ..data.dataset import Images, measure_statistics
from ..data.sampler import BatchSampler
from ..data.sources import open_source
from ..engine.checkpoint import load_checkpoint, newest
from ..engine.console import Screen
from ..engine.distributed import pick_device
from ..engine.optim import adamw
from ..engine.schedules import Progress
from ..errors import CheckpointError, ConfigError, DataError, DivergedError
from ..methods import METHODS, Method
from ..methods.diagnostics import Sentence
from ..methods.recipes import load_recipe
from ..models.backbone import Statistics, usual_statistics
from ..report.build import write_page
from ..report.curves import Line, by_depth, plot
from ..report.files import kind_of
from .monitor import blocks, both_gradients, cosine, norm
from .settings import GradientSettings
from .snapshots import batch_of

CONDITIONS = {
    "i": "same crops, same mask",
    "ii": "same crops, new mask",
    "iii": "new crops, new mask",
    "iv": "other images",
}

MEASURES = ("previous", "moment", "ratio")
"""Of the consistency gradient: its cosine with the reconstruction gradient of the previous step and with
AdamW's first moment, and its norm over that of the present reconstruction gradient."""


class GradientStudy:
    """A method from the newest checkpoint of a run, or randomly initialized from a recipe, trained further in
    float32."""

    def __init__(self, run: str, setting: GradientSettings):
        """Raises ConfigError for invalid settings and for a method without `compare`, CheckpointError for a
        run without a checkpoint."""
        check(setting)
        folder = Path(run)
        is_run = (folder / "recipe.toml").exists()
        if folder.is_dir() and (kind := kind_of(folder)) != "pre-training":
            problem = f"is a run of {kind}" if kind else "is no run directory: recipe.toml is missing"
            raise ConfigError(f"{run} {problem}; give a run of `rcmae pretrain`")
        self.recipe = load_recipe(str(folder / "recipe.toml") if is_run else run)
        if not METHODS[self.recipe.method].compares():
            known = " or ".join(name for name, method in METHODS.items() if method.compares())
            raise ConfigError(
                f"{self.recipe.method} has no reconstruction and consistency losses, whose gradients are "
                f"compared here; give a run of {known}"
            )
        self.device = pick_device(setting.device)
        images = self.recipe.images
        self.source = open_source(
            self.recipe.data, images.channels, size=images.size, value_range=images.range
        )
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
        self.lr = setting.lr or optim.base_lr * self.batch_size / 256 / 2  # half the peak: a cosine's mean
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

    def _statistics(self, folder: Path) -> Statistics:
        if (folder / "machine.json").exists():
            about = json.loads((folder / "machine.json").read_text())
            return tuple(about["mean"]), tuple(about["std"])
        return usual_statistics(self.recipe.images) or measure_statistics(
            self.source, self.recipe.images.channels
        )

    def batch(self, indices: list[int], draw: int) -> dict[str, Tensor]:
        """Images by index; `draw` selects their random crops and masks."""
        return batch_of([self.images[(draw, i)] for i in indices], self.device)

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
            row = {"condition": name, "similarity": _similarity(features["i"], features[name])}
            by_block = {k: _relations(c, r, before, moment, part) for k, part in blocks(names).items()}
            rows.append(row | _relations(c, r, before, moment, names) | {"by_block": by_block})
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


def bootstrap(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the 2.5 and 97.5 percentiles of the means of resampled batches."""
    v, rng = np.array(values), np.random.Generator(np.random.Philox(key=0))
    means = v[rng.integers(len(v), size=(2000, len(v)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(v.mean()), float(low), float(high)


def findings(rows: list[dict[str, Any]], about: dict[str, Any]) -> list[Sentence]:
    """Whether the expected order of the cosines holds, part by part, from paired differences over the
    batches."""
    if about["gamma"] == 0:
        why = "The consistency loss has weight 0 in this run"
        return [("note", f"{why}, so there is nothing to judge.")]
    if not any(row["ratio"] for row in rows):
        why = "The consistency gradient is zero on every batch: teacher and student are the same"
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
    for name, tone_if_found in (("i", "good"), ("iv", "note")):
        mean, low, high = bootstrap(cosines[name])
        significant = not low <= 0 <= high
        verdict = (
            "the step is reverted" if high < 0 else "the step is repeated" if significant else "none found"
        )
        text = (
            f"effect on {CONDITIONS[name]}: {verdict} ({_signed(mean)}, {_signed(low)} to {_signed(high)})."
        )
        sentences.append((tone_if_found if significant else "note", text))
    return sentences


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def write_gradients_page(result: dict[str, Any], out: Path) -> Path:
    """The page of a study: see `write_page`."""
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
    ylabel = "cosine with that step"
    svgs = {
        "similarity": plot(
            points, {"no effect": 0.0}, ylabel, xlabel="similarity of the features to those of batch B"
        ),
        "layers": by_depth(layers["previous"], ylabel, {"": 0.0}),
        "moments": by_depth(layers["moment"], "cosine with AdamW's moment", {"": 0.0}),
        "ratios": by_depth(layers["ratio"], "ratio of the norms", {"equal": 1.0}),
    }
    title = f"What the teacher reverts: {result['about']['run']}"
    return write_page(out, "gradients", "rcmae.lab", result, svgs, title=title)


def _relations(
    c: dict[str, Tensor],
    r: dict[str, Tensor],
    before: dict[str, Tensor],
    moment: dict[str, Tensor],
    names: list[str],
) -> dict[str, float]:
    """The measures of the consistency gradient c, restricted to the weights `names`."""
    cs, rs, steps, moments = ([gradients[n] for n in names] for gradients in (c, r, before, moment))
    ratio = norm(cs) / max(norm(rs), 1e-30)
    return {"previous": cosine(cs, steps), "moment": cosine(cs, moments), "ratio": ratio}


def _similarity(a: Tensor, b: Tensor) -> float:
    """Mean cosine of paired features, centered on their common mean, without which all would be similar."""
    center = torch.cat([a, b]).mean(0)
    return F.cosine_similarity(a - center, b - center, 1).mean().item()
