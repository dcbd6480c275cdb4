"""What everything that is trained shares: its directory, ranks, resuming, signals, micro-batches, skipped steps, log and checkpoints.

`pretraining.py` is the trainer to read first. Whoever inherits builds a network, and says what is drawn, learned, measured and kept.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .config import how_many, parse_time, recipe_hash, to_toml
from .data.dataset import BadFiles
from .data.sampler import BatchSampler, check_parts
from .data.sources import Source
from .engine import distributed, signals
from .engine.checkpoint import load_checkpoint, newest, recover, replace_file, save_checkpoint
from .engine.metrics import Metrics
from .engine.run import RunContext, changed_environment, describe_environment, memory_gib, preempted, record_recipe
from .engine.schedules import Progress, usual_log_every
from .engine.step import LogWindow, Skips
from .errors import CheckpointError, ConfigError, DataError

FORMAT = 2
"Of what a checkpoint's state.json holds."


class Trainer(ABC):
    """One run in its directory, from wherever it stands to its end.

    A subclass calls `setup` once it has built what is trained, and implements the abstract methods below.
    """

    divergence_advice = "lower --base-lr, set --clip 1"
    "what to try when steps are not finite"

    loss_names: Mapping[str, str] = MappingProxyType({"loss": "loss"})
    "losses by their key in the log, and what the line of progress calls them"

    batches: Iterator[dict[str, Any]]
    "micro-batches of the steps to come, on the device"

    window: LogWindow
    "sums for the next line of the log"

    skips: Skips
    "which of the last steps were not finite"

    def __init__(self, recipe: Any, context: RunContext, images: Source, batch_size: int, seed: int):
        """`recipe` is all that changes the result; `images` are those that are trained on, `batch_size` of them in an optimizer step.

        Raises ConfigError when the batch does not divide into ranks and micro-batches.
        """
        self.recipe, self.images, self.batch_size, self.seed = recipe, images, batch_size, seed
        self.out, self.machine, self.device, self.world, self.screen = context
        check_parts(batch_size, self.world.size, self.machine.accumulate)
        self.steps_per_epoch = len(images) // batch_size
        self.precision = distributed.pick_precision(self.machine.precision, self.device)
        self.bad = self.bad_files(len(images), "bad_files.jsonl")
        self.metrics: Metrics | None = None
        self.step, self.total, self.skipped, self.seconds, self.last_milestone = 0, 0, 0, 0.0, 0
        self.saved: tuple[int, int] | None = None
        "step and last milestone of the newest checkpoint"
        self.log_every = 1
        "steps between log lines"
        self.logs = False
        "whether the numbers of the step that is made now will be logged"

    # --- what a subclass says -------------------------------------------------------------------------------------------

    @abstractmethod
    def loader(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Micro-batches of the steps from `start` to before `stop`, on the device."""

    @abstractmethod
    def begin(self) -> None:
        """Plan a new run: set `total`, write what describes it."""

    @abstractmethod
    def update(self, t: Progress) -> Tensor:
        """One optimizer step on `micro_batches()`: everything moves, or nothing. 1 or 0, on the device."""

    @abstractmethod
    def milestone_steps(self) -> set[int]:
        """Steps after which the weights are measured and saved."""

    @abstractmethod
    def measure(self) -> Any:
        """What the weights are worth now, on all ranks. A signal may end it in the middle: it is done again after the resume, so
        nothing of it may stay."""

    @abstractmethod
    def record(self, found: Any) -> None:
        """Keep and say what `measure` found."""

    @abstractmethod
    def report(self) -> None:
        """Draw the page of the run, if it has one, after a milestone."""

    @abstractmethod
    def finish(self) -> Any:
        """What the last weights leave behind."""

    def log_more(self, t: Progress, line: dict[str, float]) -> dict[str, float]:
        """What to add to a log line of the means since the last one."""
        return {}

    @abstractmethod
    def more_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors and what all runs have, as JSON."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Take `more_state` back."""

    def stops(self) -> str:
        """Why this rank wants the run to end after this step; empty if it does not."""
        return ""

    # --- beginning and resuming -----------------------------------------------------------------------------------------

    def setup(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, data: dict[str, Any], load: Callable[[str], Any], backbone: str = ""
    ) -> None:
        """Register what is trained. `data` tells the images and labels, `backbone` what the network was made from: neither may change in
        a resumed run. `load` reads recipe.toml."""
        self.model, self.optimizer, self.data, self.backbone, self.load = model, optimizer, data, backbone, load
        self.net = distributed.wrap(model, self.world)  # the model, in DDP if there are several ranks

    def resume_or_begin(self) -> None:
        """Continue from the newest whole checkpoint, or begin.

        Raises ConfigError, DataError or CheckpointError when the run in this directory is another one.
        """
        if self.world.first:
            recover(self.out / "checkpoints")
            record_recipe(self.out, self.recipe, self.load)
        self.world.agree(True)  # ranks look for the same checkpoint
        path = newest(self.out / "checkpoints", warn=self.screen.say)
        if path is not None:
            with signals.held():  # what is raised within safetensors comes out as another error
                state = load_checkpoint(path, self.model, self.optimizer)
            self._check_same(state, path)
            if self.world.first and not (self.out / "recipe.toml").exists():
                replace_file(self.out / "recipe.toml", to_toml(self.recipe))
            self.step, self.total, self.skipped = state["step"], state["total_steps"], state["skipped"]
            self.seconds, self.last_milestone = state["seconds"], state["last_milestone"]
            self.saved = self.step, self.last_milestone
            self.restore(state)
            self.screen.say(f"resumed from {path.name} of {how_many(self.total, 'step')} in {self.out}")
            for note in changed_environment(state["environment"], self.environment()):
                self.screen.say(note)
        m = self.machine
        at = None if path is None else self.step
        self.metrics = Metrics(self.out, at, self.last_milestone, m.tensorboard, m.wandb) if self.world.first else None
        if path is None:
            self.begin()
        else:
            self.write("event", text=f"resumed from step {self.step}")
        self.log_every = m.log_every or usual_log_every(self.total)

    def _check_same(self, state: dict[str, Any], path: Path) -> None:
        if state.get("format") != FORMAT:
            raise CheckpointError(f"{path} was written by another version of rcmae; use another --out to start anew")
        if state["data"] != self.data:
            what = next(k for k, v in self.data.items() if state["data"].get(k) != v).replace("_", " ")
            raise DataError(f"the data ({what}) has changed since {path} was written; use another --out to start anew")
        if state["backbone"] != self.backbone:
            raise CheckpointError(f"{path} was begun from another backbone; use another --out to start anew")
        if state["recipe_hash"] != recipe_hash(self.recipe):
            raise ConfigError(f"{path} was made by another recipe; use another --out, or the recipe that the run was begun with")

    def environment(self) -> dict[str, Any]:
        """What must not change if a resumed run is to be equal to the bit."""
        return describe_environment(self.machine, self.device, self.precision, self.world)

    def bad_files(self, images: int, name: str) -> BadFiles:
        """The record of unreadable images in the run directory."""
        return BadFiles(self.out, images, self.machine.bad_share, self.machine.strict, name)

    def sampler(self, start: int, stop: int) -> BatchSampler:
        """Which images make up which step, for this rank."""
        return BatchSampler(
            len(self.images), self.batch_size, rank=self.world.rank, world=self.world.size, micro=self.machine.accumulate,
            start=start, stop=stop, seed=self.seed,
        )  # fmt: skip

    # --- the loop -------------------------------------------------------------------------------------------------------

    def train(self) -> Any:
        """From wherever the run stands to its end. A signal raises Interrupted, or Preempted after a step; the state is saved by then."""
        self.resume_or_begin()
        with signals.held():
            try:
                self._loop()
            except signals.Interrupted:  # between two steps as far as the weights know: see `micro_batches`
                self.name_skipped()
                self.save()
                raise
            if self.world.size > 1:  # no rank may leave the others alone in it
                return self.finish()
        return self.finish()

    def _loop(self) -> None:
        milestones = self.milestone_steps()
        save_seconds = parse_time(self.machine.save_every)
        self.skips = Skips(self.out / "checkpoints", self.divergence_advice)
        if self.step in milestones and self.last_milestone < self.step:  # a signal came in the middle of it
            self._milestone()
        self.batches = self.loader(self.step, self.total)
        first = self.step
        self.screen.start(self.total, first)
        self.window = LogWindow(self.device)
        started = time.monotonic() - self.seconds
        saved = time.monotonic()
        while self.step < self.total:
            t = Progress(self.step, self.total, self.steps_per_epoch)
            self.logs = (self.step + 1) % self.log_every == 0 or self.step + 1 == self.total
            with nullcontext() if self.step > first else self.screen.progress("the first step, with reading its images", 1):
                self.skips.note(self.update(t))
            self.step += 1
            self.screen.step(self.step)
            self.seconds = time.monotonic() - started
            if self.logs:
                self.name_skipped()
                self.log(Progress(self.step, self.total, self.steps_per_epoch))
            asked, stops, overdue = self.world.agree(
                signals.asked() is not None, bool(self.stops()), time.monotonic() - saved > save_seconds
            )
            if asked or stops or overdue or self.step in milestones:
                with self.window.paused():
                    self.name_skipped()
                    if self.step in milestones and not asked:
                        self._milestone()
                    else:
                        self.save()
                    saved = time.monotonic()
            if stops or asked:
                self.world.agree(True)  # rank 0 has saved: the launcher ends all ranks when the first one leaves
            if stops:
                self.stop(self.stops())
            if asked:
                raise preempted(signals.asked() or "another rank", self.step)

    def _milestone(self) -> None:
        with self.interruptible():
            found = self.measure()
        self.record(found)
        self.last_milestone = self.step
        self.save()
        if self.step < self.total:  # in the end it is drawn when all is there
            with self.interruptible():
                self.report()

    def stop(self, reason: str) -> None:
        """Raise what ends a run for a `reason` of its own (see `stops`); the state is saved. `reason` is empty on other ranks."""
        raise NotImplementedError

    def micro_batches(self) -> Iterator[dict[str, Any]]:
        """This rank's parts of one step.

        The contexts below stay open while the caller's loop body runs: its forward and backward passes can be interrupted, since no
        weight has moved yet, and gradients are exchanged between ranks in the last one only. Several ranks must leave a step together,
        so they end it first.
        """
        for i in range(self.machine.accumulate):
            with self.interruptible(), distributed.sync_gradients_on_last(self.net, i == self.machine.accumulate - 1):
                yield self.window.next_of(self.batches)

    def interruptible(self) -> AbstractContextManager[None]:
        """Within it a signal is raised at once, unless other ranks would be left behind."""
        return signals.interruptible() if self.world.size == 1 else nullcontext()

    def autocast(self) -> torch.autocast:
        """bf16 for matrix products, where that is the precision of the run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def name_skipped(self) -> None:
        """Name the batches that were skipped since the last call. Raises DivergedError."""
        for step in self.skips.look(self.step):
            self.skipped += 1
            keys = self.sampler(0, 0).keys(step)
            where = f"images {self.images.where(keys[0][1])} to {self.images.where(keys[-1][1])}"
            text = f"step {step} was not finite and was skipped: epoch {keys[0][0]}, {where}"
            self.write("event", text=text, images=[k[1] for k in keys])
            self.screen.say(text)

    # --- what is recorded -----------------------------------------------------------------------------------------------

    def write(self, kind: str, **values: Any) -> None:
        """A line of metrics.jsonl, on rank 0."""
        if self.metrics:
            self.metrics.write(kind, self.step, **values)

    def log(self, t: Progress) -> None:
        """A line of the means since the last one, on all ranks."""
        line = self.window.read()
        line |= self.log_more(t, line)
        line |= {"memory_gib": memory_gib(self.device), "seconds": self.seconds, "skipped": self.skipped}
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        line |= {"lr": lr, "epoch": t.epoch, "images": self.step * self.batch_size}
        self.write("train", **line)
        left = (self.total - self.step) * self.batch_size / max(line["images_per_s"], 1e-9)
        self.screen.report(self.step, self.total, line, left, self.loss_names)

    def save(self) -> None:
        """A checkpoint, by rank 0. No signal ends it in the middle."""
        now = self.step, self.last_milestone
        if self.world.first and self.saved != now:
            with signals.held():
                save_checkpoint(self.out / "checkpoints", self.model, self.optimizer, self.state(), self.machine.keep)
        self.saved = now

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        return {
            "format": FORMAT, "step": self.step, "total_steps": self.total, "skipped": self.skipped, "seconds": self.seconds,
            "last_milestone": self.last_milestone, "data": self.data, "backbone": self.backbone,
            "recipe_hash": recipe_hash(self.recipe), "environment": self.environment(), **self.more_state(),
        }  # fmt: skip

    def close(self) -> None:
        """Leave the screen and the record."""
        self.screen.stop()
        if self.metrics:
            self.metrics.close()
            self.metrics = None
