"""A run of pre-training, continued in memory from one of its checkpoints: nothing is written to it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import changed, check
from ..data.dataset import Images, measure_statistics
from ..data.sampler import BatchSampler, Key
from ..data.sources import open_source
from ..engine.checkpoint import checkpoints, load_checkpoint, newest, verify
from ..engine.distributed import pick_device
from ..engine.optim import adamw, set_schedules
from ..engine.schedules import Progress
from ..engine.step import clip_gradients, conditional_step, set_lr
from ..errors import CheckpointError, ConfigError, DataError, DivergedError
from ..methods import METHODS, Method
from ..methods.recipes import load_recipe
from ..models.backbone import Statistics, usual_statistics
from ..report.files import kind_of
from .monitor import both_gradients
from .settings import GradientSettings
from .snapshots import batch_of

POINTS = (0.25, 0.5, 0.75)
"Fractions of a run from which it is continued."

Gradients = dict[str, Tensor]
"By parameter name."


class Past(NamedTuple):
    """A past step: its images, batch, reconstruction gradient and update."""

    keys: list[Key]
    batch: dict[str, Tensor]
    gradient: Gradients
    update: Gradients


class Continuation:
    """A run that is continued in memory from one of its checkpoints, or a new network of a recipe, in
    float32."""

    def __init__(self, run: str, setting: GradientSettings, batches: int = 1):
        """Raises ConfigError for invalid settings and for a method without `compare`, DataError for images of
        fewer than `batches` batches, CheckpointError for a run without a checkpoint."""
        check(setting)
        self.folder, self.setting = Path(run), setting
        is_run = (self.folder / "recipe.toml").exists()
        if self.folder.is_dir() and (kind := kind_of(self.folder)) != "pre-training":
            problem = f"is a run of {kind}" if kind else "is no run directory: recipe.toml is missing"
            raise ConfigError(f"{run} {problem}; give a run of `rcmae pretrain`")
        self.recipe = load_recipe(str(self.folder / "recipe.toml") if is_run else run)
        if not METHODS[self.recipe.method].compares():
            known = " or ".join(name for name, method in METHODS.items() if method.compares())
            raise ConfigError(
                f"{self.recipe.method} has no reconstruction and consistency losses, whose gradients are "
                f"compared here; give a run of {known}"
            )
        self.fits_recipe = setting.batch_size in (None, self.recipe.optim.batch_size)
        self.recipe = changed(self.recipe, batch_size=setting.batch_size or self.recipe.optim.batch_size)
        self.device = pick_device(setting.device)
        images, size = self.recipe.images, self.recipe.optim.batch_size
        self.source = open_source(
            self.recipe.data, images.channels, size=images.size, value_range=images.range
        )
        if len(self.source) < batches * size:
            raise DataError(
                f"{self.recipe.data} holds {len(self.source)} images, fewer than {batches} batches of "
                f"{size}; lower --batch-size"
            )
        self.statistics = self._statistics()
        self.sampler = BatchSampler(len(self.source), size, seed=self.recipe.seed)
        self.path = newest(self.folder / "checkpoints") if is_run else None
        if is_run and self.path is None:
            raise CheckpointError(f"{run} has no checkpoint; `rcmae pretrain --out {run}` makes one")
        self.start(self.path, raised=True)
        with torch.no_grad():
            comparison = self.method.compare(self.batch([(0, 0), (0, 1)]))
        assert comparison is not None
        self.gamma = comparison.gamma

    def _statistics(self) -> Statistics:
        if (self.folder / "machine.json").exists():
            about = json.loads((self.folder / "machine.json").read_text())
            return tuple(about["mean"]), tuple(about["std"])
        channels = self.recipe.images.channels
        return usual_statistics(self.recipe.images) or measure_statistics(self.source, channels)

    def starts(self, need: int) -> list[tuple[Path | None, bool]]:
        """The checkpoints to start from, and whether the rate is raised there: those nearest to `POINTS` of
        the run that leave `need` steps, or else the newest one."""
        steps = {}
        if self.path is not None and self.setting.lr is None:
            for path in checkpoints(self.folder / "checkpoints"):
                state = json.loads((path / "state.json").read_bytes()) if verify(path) is None else None
                if state and state["step"] and state["step"] + need <= state["total_steps"]:
                    steps[path] = state["step"] / self.total
        if not steps:
            return [(self.path, True)]
        nearest = [min(steps, key=lambda path: abs(steps[path] - point)) for point in POINTS]
        return [(path, False) for path in dict.fromkeys(nearest)]

    def start(self, path: Path | None, raised: bool) -> None:
        """Load a checkpoint. Where the rate is `raised`, it is constant, as are the schedules: those of the
        checkpoint, but not after half of the run, since the momentum may approach 1."""
        recipe, optim = self.recipe, self.recipe.optim
        torch.manual_seed(recipe.seed)
        self.method: Method = METHODS[recipe.method](recipe, *self.statistics).to(self.device).train()
        self.optimizer = adamw(self.method.student, optim, 0.0)
        self.images = Images(self.source, self.method.views(), recipe.seed, recipe.images.channels)
        self.step, self.total, self.extended = 0, recipe.total_steps(len(self.source)) or 1000, []
        if path is not None:
            state = load_checkpoint(path, self.method, self.optimizer)
            self.step, self.total = state["step"], state["total_steps"]
            self.extended = state.get("extended", [])
        self.lr = (self.setting.lr or optim.base_lr * optim.batch_size / 256 / 2) if raised else None
        self.time = Progress(
            min(self.step, self.total // 2) if raised else self.step,
            self.total,
            len(self.source) // optim.batch_size,
        )
        momentum = self.method.momentum_per_step(self.time)
        self.half_life = math.inf if momentum >= 1 else math.log(0.5) / math.log(max(momentum, 1e-6))
        default = int(min(max(3 * self.half_life, 10), 100)) if raised else 0
        self.settle = default if self.setting.settle is None else self.setting.settle
        self.used = np.full(len(self.source), -1)  # the step that saw an image last

    def batch(self, keys: Sequence[Key]) -> dict[str, Tensor]:
        """The samples of (epoch, index); the epoch selects their random crops and masks."""
        return batch_of([self.images[key] for key in keys], self.device)

    def train(self) -> tuple[list[Key], dict[str, Tensor]]:
        """The next step of the run; returns its images and batch. Raises DivergedError when the loss is not
        finite."""
        keys = self.sampler.keys(self.step)
        batch, t = self.batch(keys), self.time
        if self.lr is None:
            t = Progress(self.step, self.total, t.steps_per_epoch)
            set_schedules(self.optimizer, self.recipe.optim, self.method.schedule, t, self.extended)
        else:
            set_lr(self.optimizer, self.lr)
        loss = self.method(batch, t)["loss"]
        if not loss.isfinite():
            rate = self.optimizer.param_groups[0]["lr"]
            raise DivergedError(f"the loss is not finite at a learning rate of {rate:g}; lower --lr")
        loss.backward()
        clip_gradients(self.optimizer, self.recipe.optim.clip, self.method.clipped_together)
        applied = torch.ones((), device=self.device)
        self.method.before_step(t, applied)
        conditional_step(self.optimizer, applied)
        self.method.after_step(t, applied)
        self.used[[i for _, i in keys]] = self.step
        self.step += 1
        return keys, batch

    def recorded(self) -> Past:
        """The next step, with its reconstruction gradient and update."""
        weights = {name: p for name, p in self.method.student.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in weights.items()}
        gradient, _ = both_gradients(self.method, self.batch(self.sampler.keys(self.step)))
        keys, batch = self.train()
        return Past(keys, batch, gradient, {name: p.detach() - before[name] for name, p in weights.items()})
