"""What trainers that learn from labels share: the step, and test images that are scored on the way."""

import math
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import how_many, recipe_hash
from ..data.sources import Source
from ..engine.run import RunContext, describe_machine, write_json
from ..engine.schedules import Progress, spread
from ..engine.step import Mean, clip_gradients, conditional_step, set_lr
from ..errors import DataError
from ..trainer import Trainer

ADVICE = "try --accumulate 2, --checkpointing or a smaller batch (--settings batch_size=N)"
"What to do about a lack of memory."


def fitted_batch(batch_size: int, images: int, parts: int, least: int = 1) -> int:
    """The batch, or, where there are fewer images, a power of two for each of its `parts` (ranks x micro-batches).

    Raises DataError when a part would have fewer than `least`.
    """
    if images >= batch_size:
        return batch_size
    part = 2 ** (images // parts).bit_length() // 2
    if part < least:
        raise DataError(f"too few for {parts} parts of a step (ranks x accumulate): {how_many(images, 'training image')}; start fewer")
    return part * parts


class Supervised(Trainer):
    """One run. The settings have `batch_size`, `seed`, `clip` and `total_steps(images)`."""

    what, rate_name = "training", "lr"
    "what to call it, and the setting that is its learning rate"

    def __init__(self, settings: Any, context: RunContext, train_set: Source, about: dict[str, Any]):
        """`about` goes into machine.json, and into what is exported."""
        super().__init__(settings, context, train_set, settings.batch_size, settings.seed)
        self.about = about
        self.divergence_advice = f"lower {self.rate_name} or set clip (--settings {self.rate_name}=... clip=1)"
        self.part = settings.batch_size // (self.world.size * self.machine.accumulate)
        self.total = settings.total_steps(len(train_set))
        self.history: list[dict[str, float]] = []
        "step, epoch and scores, each time these were taken"

    def learn(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, data: dict[str, Any], backbone: str, load: Callable[[str], Any],
        images: str, **facts: Any,
    ) -> None:  # fmt: skip
        """Take what is trained, see `setup`; `images` says in words, and `facts` by name, what it is trained on."""
        self.images_in_words, self.facts = images, facts
        self.setup(model, optimizer, data, load, backbone)

    # --- what a subclass says -------------------------------------------------------------------------------------------

    @abstractmethod
    def rate(self, t: Progress) -> float:
        """The learning rate of a step; a group of the optimizer multiplies it by its `lr_scale`."""

    @abstractmethod
    def losses(self, batch: dict[str, Any], step: int, part: int) -> dict[str, Tensor]:
        """Scalars by name, `loss` among them, of the `part`-th micro-batch of the step; asked through `self.net`."""

    @abstractmethod
    def scorings(self) -> int:
        """How often the test images are scored."""

    @abstractmethod
    def score(self) -> dict[str, float]:
        """Score the test images as the weights are, on all ranks."""

    def format_scores(self, scores: dict[str, float]) -> str:
        """Scores in words."""
        return ", ".join(f"{name} {value:.1f}" for name, value in scores.items() if not math.isnan(value))

    # --- what all of them do --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        if self.world.first:
            about = describe_machine(self.device, self.precision) | self.facts | {
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "parameters": parameters, "ranks": self.world.size,
                "recipe_hash": recipe_hash(self.recipe), "backbone": self.backbone, "steps": self.total,
                "steps_per_epoch": self.steps_per_epoch, "data": self.data, "about": self.about,
            }  # fmt: skip
            write_json(self.out / "machine.json", about)
        self.save()
        self.screen.say(f"{self.what} in {self.out}: {parameters / 1e6:.1f} M parameters, {self.images_in_words}")
        epochs = self.total / self.steps_per_epoch
        self.screen.say(f"{how_many(self.total, 'step')} ({epochs:.1f} epochs) on {self.device} in {self.precision}")

    def update(self, t: Progress) -> Tensor:
        set_lr(self.optimizer, self.rate(t))
        parts = self.machine.accumulate
        mean = Mean(parts)
        for i, batch in enumerate(self.micro_batches()):
            with self.autocast():
                losses = self.losses(batch, t.step, self.world.rank * parts + i)
            (losses["loss"] / parts).backward()
            mean.add(losses)
        norm = clip_gradients(self.optimizer, self.recipe.clip)
        applied = self.world.everywhere((norm.isfinite() & mean.values["loss"].isfinite()).float())
        conditional_step(self.optimizer, applied)
        self.window.add(mean.values | {"grad_norm": norm}, applied, self.batch_size)
        return applied

    def milestone_steps(self) -> set[int]:
        return spread(self.total, self.scorings())

    def measure(self) -> dict[str, float]:
        return self.score()

    def record(self, found: dict[str, float]) -> None:
        epoch = self.step / self.steps_per_epoch
        self.history.append({"step": self.step, "epoch": epoch, **found})
        self.write("val", epoch=epoch, **found)
        self.screen.say(f"step {self.step:,}: {self.format_scores(found)}")

    def report(self) -> None:
        return  # drawn by the command, or part of the page of the run that it began from

    def more_state(self) -> dict[str, Any]:
        return {"history": self.history}

    def restore(self, state: dict[str, Any]) -> None:
        self.history = state["history"]
