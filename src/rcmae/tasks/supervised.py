"""The base class of supervised trainers: the optimizer step, and scores on test images during training."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import how_many
from ..data.sources import Source
from ..engine.distributed import autocast
from ..engine.run import RunContext, write_json
from ..engine.schedules import Progress, spread
from ..engine.step import Mean, clip_gradients, conditional_step, set_lr
from ..errors import DataError
from ..trainer import Trainer

ADVICE = "try --accumulate 2, --checkpointing or a smaller batch (--settings batch_size=N)"
"What to try when memory runs out."


def fitted_batch(batch_size: int, images: int, parts: int, least: int = 1) -> int:
    """The batch size; with fewer images than that, the largest batch whose `parts` (ranks x micro-batches)
    are powers of two.

    Raises DataError if a part would have fewer than `least` images.
    """
    if images >= batch_size:
        return batch_size
    part = 2 ** (images // parts).bit_length() // 2
    if part < least:
        raise DataError(
            f"too few for {parts} parts of a step (ranks x accumulate): "
            f"{how_many(images, 'training image')}; start fewer ranks or lower --accumulate"
        )
    return part * parts


class Supervised(Trainer):
    """A supervised run. The settings have `batch_size`, `seed`, `clip` and `total_steps(images)`."""

    what, rate_name = "training", "lr"
    "name of the activity, and of the setting for the learning rate"

    def __init__(self, settings: Any, context: RunContext, train_set: Source, about: dict[str, Any]):
        """`about` is written to machine.json and to the export."""
        super().__init__(settings, context, train_set, settings.batch_size, settings.seed)
        self.about = about
        self.divergence_advice = (
            f"lower {self.rate_name} or set clip (--settings {self.rate_name}=... clip=1)"
        )
        self.part = settings.batch_size // (self.world.size * self.runtime.accumulate)
        self.total = settings.total_steps(len(train_set))
        self.history: list[dict[str, float]] = []
        "step, epoch and scores at each evaluation"

    def learn(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: dict[str, Any],
        backbone: str,
        load: Callable[[str], Any],
        images: str,
        **facts: Any,
    ) -> None:
        """Register the model, see `setup`; `images` describes the data in words, `facts` by name."""
        self.images_in_words, self.facts = images, facts
        self.setup(model, optimizer, data, load, backbone)

    def environment(self) -> dict[str, Any]:
        return super().environment() | {"max_pixels": self.images.pixel_limit}

    # --- implemented by subclasses --------------------------------------------------------------------------

    @abstractmethod
    def rate(self, t: Progress) -> float:
        """The learning rate of a step, which each parameter group multiplies by its `lr_scale`."""

    @abstractmethod
    def losses(self, batch: dict[str, Any], step: int, part: int) -> dict[str, Tensor]:
        """Scalar losses by name, including `loss`, of the `part`-th micro-batch of the step, computed with
        `self.net`."""

    @abstractmethod
    def scorings(self) -> int:
        """How many times the test images are scored."""

    @abstractmethod
    def score(self) -> dict[str, float]:
        """Score the current weights on the test images; called on all ranks."""

    def format_scores(self, scores: dict[str, float]) -> str:
        return ", ".join(f"{name} {value:.1f}" for name, value in scores.items() if not math.isnan(value))

    # --- implementation of Trainer --------------------------------------------------------------------------

    def begin(self) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        if self.world.is_main:
            more = {"backbone": self.backbone, "data": self.data, "about": self.about}
            write_json(self.out / "machine.json", self.description(parameters) | self.facts | more)
        self.save()
        self.screen.say(
            f"{self.what} in {self.out}: {parameters / 1e6:.1f} M parameters, {self.images_in_words}"
        )
        epochs = self.total / self.steps_per_epoch
        self.screen.say(
            f"{how_many(self.total, 'step')} ({epochs:.1f} epochs) on {self.device} in {self.precision}"
        )

    def update(self, t: Progress) -> Tensor:
        set_lr(self.optimizer, self.rate(t))
        parts = self.runtime.accumulate
        mean = Mean(parts)
        for i, batch in enumerate(self.micro_batches()):
            with autocast(self.device, self.precision):
                losses = self.losses(batch, t.step, self.world.rank * parts + i)
            (losses["loss"] / parts).backward()
            mean.add(losses)
        norm = clip_gradients(self.optimizer, self.recipe.clip)
        applied = self.world.all_ranks((norm.isfinite() & mean.values["loss"].isfinite()).float())
        conditional_step(self.optimizer, applied)
        self.window.add(mean.values | {"grad_norm": norm}, applied, self.batch_size)
        return applied

    def milestone_steps(self) -> set[int]:
        return spread(self.total, self.scorings())

    def measure(self) -> dict[str, float]:
        return self.score()

    def record(self, scores: dict[str, float]) -> None:
        epoch = self.step / self.steps_per_epoch
        self.history.append({"step": self.step, "epoch": epoch, **scores})
        self.write("val", epoch=epoch, **scores)
        self.screen.say(f"step {self.step:,}: {self.format_scores(scores)}")

    def report(self) -> None:
        return  # the command writes the report, or it is part of the report of the pre-training run

    def more_state(self) -> dict[str, Any]:
        return {"history": self.history}

    def restore(self, state: dict[str, Any]) -> None:
        self.history = state["history"]
