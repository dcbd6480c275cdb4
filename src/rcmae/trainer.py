"""The training loop shared by pre-training, fine-tuning and detection: run directory, ranks, resuming,
signals, micro-batches, skipped steps, logging and checkpoints.

Read `pretraining.py` first. A subclass builds the network and implements the data loader, the optimizer step
and the measurements.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .config import changed, how_many, parse_time, recipe_hash, to_toml
from .data.dataset import BadFiles
from .data.loader import batches_of, faster, processes
from .data.sampler import BatchSampler, check_parts
from .data.sources import Source
from .engine import distributed, signals
from .engine.checkpoint import load_checkpoint, newest, recover, replace_file, save_checkpoint
from .engine.console import Screen
from .engine.metrics import Metrics
from .engine.neighbors import crowded
from .engine.run import RunContext, describe_machine, memory_gib, preempted, read_json, record_recipe
from .engine.schedules import Progress, default_log_every
from .engine.step import DIVERGED, LogWindow, Skips
from .errors import CheckpointError, ConfigError, DataError, DivergedError

WAITING, RECENT = 0.1, 5
"Fraction of the time spent waiting for data, over so many log lines, from which a note names what helps."

FORMAT = 4
"Version of the format of a checkpoint's state.json."


class Trainer(ABC):
    """One run in its directory, started or resumed, to its end.

    A subclass calls `setup` once it has built the model and optimizer, and implements the abstract methods.
    """

    divergence_advice = "lower --base-lr, set --clip 1"
    "what to try when steps are not finite"

    free: tuple[str, ...] = ("data",)
    "settings that may differ from those with which the run was started"

    loss_names: Mapping[str, str] = MappingProxyType({"loss": "loss"})
    "losses by their key in the log, with the label shown on the screen"

    batches: Iterator[dict[str, Any]]
    "micro-batches of the coming steps, on the device"

    window: LogWindow
    "sums for the next log line"

    skips: Skips
    "skipped steps not yet reported"

    def __init__(self, recipe: Any, context: RunContext, images: Source, batch_size: int, seed: int):
        """`recipe` holds all settings that change the result; `images` are the training images, `batch_size`
        of them in an optimizer step.

        Raises ConfigError if the batch does not divide evenly into ranks and micro-batches.
        """
        self.recipe, self.images, self.batch_size, self.seed = recipe, images, batch_size, seed
        self.out, self.runtime, self.device, self.world, self.screen = context
        check_parts(batch_size, self.world.size, self.runtime.accumulate)
        self.steps_per_epoch = len(images) // batch_size
        self.precision = distributed.pick_precision(self.runtime.precision, self.device)
        self.unreadable: list[BadFiles] = []
        "the records of unreadable images of this run"
        self.bad = self.bad_files(len(images), "bad_files.jsonl")
        self.metrics: Metrics | None = None
        self.step, self.total, self.skipped, self.seconds, self.last_milestone = 0, 0, 0, 0.0, 0
        self.saved: tuple[int, int] | None = None
        "step and last milestone of the newest checkpoint"
        self.log_every = 1
        "steps between log lines"
        self.waits: list[float] | None = []
        "fractions of the time spent waiting for data, by log line; None once a note has been printed"
        self.logs = False
        "whether the current step will be logged"
        self.crowded = False
        "whether the screen has shown that other processes use the cores"

    # --- what a subclass implements -------------------------------------------------------------------------

    @abstractmethod
    def loader(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Micro-batches of the steps `start` to `stop` - 1, on the device."""

    @abstractmethod
    def begin(self) -> None:
        """Plan a new run: set `total` and write the files that describe the run."""

    @abstractmethod
    def update(self, t: Progress) -> Tensor:
        """One optimizer step on `micro_batches()`. Returns 1 if applied, 0 if skipped, on the device."""

    @abstractmethod
    def milestone_steps(self) -> set[int]:
        """Steps after which the weights are measured and saved."""

    @abstractmethod
    def measure(self) -> Any:
        """Measure the current weights, on all ranks. A signal may interrupt this, and it is repeated after
        resuming, so it must not have side effects."""

    @abstractmethod
    def record(self, measurement: Any) -> None:
        """Write and print the result of `measure`."""

    @abstractmethod
    def report(self) -> None:
        """Write the report of the run, if it has one, after a milestone."""

    @abstractmethod
    def finish(self) -> Any:
        """Write the final outputs and return the result of the run."""

    def log_more(self, t: Progress, line: dict[str, float]) -> dict[str, float]:
        """Values to add to the log line `line`."""
        return {}

    @abstractmethod
    def more_state(self) -> dict[str, Any]:
        """JSON values of this kind of run for its checkpoints."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Restore `more_state` from a checkpoint's state."""

    def stop_reason(self) -> str:
        """Why this rank requests the end of the run after this step; empty if it does not."""
        return ""

    def faster_loading(self) -> str:
        """What would shorten the waiting for data; empty if nothing would."""
        return faster(self.images, self.runtime.workers)

    def batches_from(self, dataset: Dataset, start: int, stop: int) -> Generator[dict[str, Any]]:
        """Micro-batches of a data set of the training images, for `loader`."""
        keys, workers = self.sampler(start, stop), self.runtime.workers
        return batches_of(dataset, keys, self.images, workers, self.device, self.bad.note)

    # --- starting and resuming ------------------------------------------------------------------------------

    def setup(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: dict[str, Any],
        load: Callable[[str], Any],
        backbone: str = "",
    ) -> None:
        """Register what is trained. `data` identifies the images and labels, `backbone` the initial weights:
        neither may change in a resumed run. `load` reads recipe.toml."""
        self.model, self.optimizer, self.load = model, optimizer, load
        self.data, self.backbone = data, backbone
        self.net = distributed.wrap(model, self.world)  # the model, in DDP if there are several ranks

    def resume_or_begin(self) -> None:
        """Resume from the newest intact checkpoint, or start a new run.

        Raises ConfigError, DataError or CheckpointError if the directory holds a run of another recipe, data
        or backbone.
        """
        if self.world.is_main:
            recover(self.out / "checkpoints")
            record_recipe(self.out, self.recipe, self.load, self.free)
        self.world.any_rank(True)  # wait for rank 0, so that all ranks find the same checkpoint
        path = newest(self.out / "checkpoints", warn=self.screen.say)
        if path is not None:
            with signals.held():  # safetensors would turn an exception raised within it into another one
                state = load_checkpoint(path, self.model, self.optimizer)
            self._check_same(state, path)
            self.step, self.total, self.skipped = state["step"], state["total_steps"], state["skipped"]
            self.seconds, self.last_milestone = state["seconds"], state["last_milestone"]
            self.saved = self.step, self.last_milestone
            self.restore(state)
            if self.world.is_main:  # it may be lost, and the settings in `free` may have changed
                replace_file(self.out / "recipe.toml", to_toml(self.recipe))
            self.screen.say(f"resumed from {path.name} of {how_many(self.total, 'step')} in {self.out}")
            now = self.environment()
            for key, then in state["environment"].items():
                if then != now[key]:
                    self.screen.say(
                        f"note: {key} was {then} and is now {now[key]}: the resumed run will not be bitwise "
                        "identical"
                    )
        if self.world.is_main:
            step = None if path is None else self.step
            sinks = self.runtime.tensorboard, self.runtime.wandb
            self.metrics = Metrics(self.out, step, self.last_milestone, *sinks)
        if path is None:
            self.begin()
        else:
            self.write("event", text=f"resumed from step {self.step}")
        self.log_every = self.runtime.log_every or default_log_every(self.total)

    def _counts(self) -> str:
        """The numbers of images of the run and now, if they differ."""
        path, now = self.out / "machine.json", len(self.images)
        before = read_json(path).get("images", now) if path.exists() else now
        return f": {before:,} images then, {now:,} now" if before != now else ""

    def _check_same(self, state: dict[str, Any], path: Path) -> None:
        advice = "use another --out to start from scratch"
        if state.get("format") != FORMAT:
            raise CheckpointError(f"{path} was written by another version of rcmae; {advice}")
        if state["data"] != self.data:
            part = next(k for k, v in self.data.items() if state["data"].get(k) != v).replace("_", " ")
            raise DataError(
                f"the data ({part}) has changed since {path} was written{self._counts()}; {advice}"
            )
        if state["backbone"] != self.backbone:
            raise CheckpointError(f"{path} was started from another backbone; {advice}")
        if state["recipe_hash"] != recipe_hash(changed(self.recipe, **state.get("length", {}))):
            raise ConfigError(
                f"{path} was written with another recipe; use another --out, or the original recipe"
            )

    def environment(self) -> dict[str, Any]:
        """What must stay the same for a resumed run to be bitwise identical."""
        return {
            "torch": torch.__version__,
            "device": self.device.type,
            "precision": self.precision,
            "ranks": self.world.size,
            "accumulate": self.runtime.accumulate,
            "threads": torch.get_num_threads(),
            "compile": self.runtime.compile,
        }

    def description(self, parameters: int) -> dict[str, Any]:
        """What machine.json says of every new run of `total` steps."""
        return describe_machine(self.device, self.precision) | {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "parameters": parameters,
            "ranks": self.world.size,
            "recipe_hash": recipe_hash(self.recipe),
            "steps": self.total,
            "steps_per_epoch": self.steps_per_epoch,
        }

    def bad_files(self, images: int, name: str) -> BadFiles:
        """The record of unreadable images in the run directory."""
        screen = self.screen if self.world.is_main else Screen(True)  # any rank may meet the first one
        runtime, say = self.runtime, screen.say
        record = BadFiles(self.out, images, runtime.max_corrupt_fraction, runtime.strict, name, say)
        self.unreadable.append(record)
        return record

    def sampler(self, start: int, stop: int) -> BatchSampler:
        """The image indices of this rank's micro-batches."""
        return BatchSampler(
            len(self.images),
            self.batch_size,
            rank=self.world.rank,
            world=self.world.size,
            micro=self.runtime.accumulate,
            start=start,
            stop=stop,
            seed=self.seed,
        )

    @property
    def progress(self) -> Progress:
        """The progress of the run at the current step."""
        return Progress(self.step, self.total, self.steps_per_epoch)

    # --- the loop -------------------------------------------------------------------------------------------

    def train(self) -> Any:
        """Train to the end. A signal raises Interrupted, or Preempted after a step, once the state is
        saved."""
        self.resume_or_begin()
        with signals.held():
            try:
                self._loop()
            except signals.Interrupted:  # the weights are those after a complete step, see `micro_batches`
                self.report_skipped()
                self.save()
                raise
            for record in self.unreadable:
                if total := record.total():
                    self.screen.say(f"{how_many(total, 'image')} could not be read: {record.path}")
            if self.world.size > 1:  # an interrupted rank would leave the others waiting
                return self.finish()
        return self.finish()

    def _loop(self) -> None:
        milestones = self.milestone_steps()
        save_seconds = parse_time(self.runtime.save_every)
        self.skips = Skips(self.out / "checkpoints", self.divergence_advice)
        if self.step in milestones and self.last_milestone < self.step:  # it was interrupted by a signal
            self._milestone()
        # A finished run must not prepare images.
        self.batches = self.loader(self.step, self.total) if self.step < self.total else iter(())
        first = self.step
        self.screen.start(self.total, first)
        self.window = LogWindow(self.device)
        started = time.monotonic() - self.seconds
        saved = time.monotonic()
        while self.step < self.total:
            t = self.progress
            self.logs = (self.step + 1) % self.log_every == 0 or self.step + 1 == self.total
            with nullcontext() if self.step > first else self.screen.progress("the first step", 1):
                self.skips.note(self.update(t))
            self.step += 1
            self.screen.step(self.step)
            self.seconds = time.monotonic() - started
            if self.logs:
                self.report_skipped()
                self.log(self.progress)
            signaled, stops, overdue = self.world.any_rank(
                signals.received() is not None,
                bool(self.stop_reason()),
                time.monotonic() - saved > save_seconds,
            )
            if signaled or stops or overdue or self.step in milestones:
                with self.window.paused():
                    self.report_skipped()
                    if self.step in milestones and not signaled:
                        self._milestone()
                    else:
                        self.save()
                    saved = time.monotonic()
            if stops or signaled:
                # Wait until rank 0 has saved, since the launcher ends all ranks when the first one exits.
                self.world.any_rank(True)
            if stops:
                self.stop(self.stop_reason())
            if signaled:
                raise preempted(signals.received() or "another rank", self.step)

    def _milestone(self) -> None:
        with self.interruptible():
            measurement = self.measure()
        self.record(measurement)
        self.last_milestone = self.step
        self.save()
        if self.step < self.total:  # `finish` writes the final report
            with self.interruptible():
                self.report()

    def stop(self, reason: str) -> None:
        """Raise the error that ends the run for a `stop_reason`, after saving. `reason` is empty on ranks
        that did not request it."""
        raise NotImplementedError

    def micro_batches(self) -> Iterator[dict[str, Any]]:
        """This rank's micro-batches of one step.

        The contexts below stay open while the caller's loop body runs: its forward and backward passes can be
        interrupted, since no weight has changed yet, and gradients are all-reduced in the last micro-batch
        only. With several ranks a signal waits for the end of the step, since all must stop together.
        """
        for i in range(self.runtime.accumulate):
            with (
                self.interruptible(),
                distributed.sync_gradients_on_last(self.net, i == self.runtime.accumulate - 1),
            ):
                yield self.window.next_of(self.batches)

    def interruptible(self) -> AbstractContextManager[None]:
        """A context in which a signal is raised at once, unless there are other ranks."""
        return signals.interruptible() if self.world.size == 1 else nullcontext()

    def report_skipped(self) -> None:
        """Report the batches that were skipped since the last call. Raises DivergedError, after recording it
        as the last event of the run."""
        try:
            self._report_skipped()
        except DivergedError:
            self.write("event", text=DIVERGED)
            raise

    def _report_skipped(self) -> None:
        for step in self.skips.read(self.step):
            self.skipped += 1
            keys = self.sampler(0, 0).keys(step)
            where = f"images {self.images.where(keys[0][1])} to {self.images.where(keys[-1][1])}"
            text = f"step {step} was not finite and was skipped: epoch {keys[0][0]}, {where}"
            self.write("event", text=text, images=[k[1] for k in keys])
            self.screen.say(text)

    # --- what is recorded -----------------------------------------------------------------------------------

    def write(self, kind: str, **values: Any) -> None:
        """Write a line of metrics.jsonl, on rank 0."""
        if self.metrics:
            self.metrics.write(kind, self.step, **values)

    def log(self, t: Progress) -> None:
        """Write the means since the last log line. Called on all ranks."""
        line = self.window.read()
        line |= self.log_more(t, line)
        line |= {"memory_gib": memory_gib(self.device), "seconds": self.seconds, "skipped": self.skipped}
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        line |= {"lr": lr, "epoch": t.epoch, "images": self.step * self.batch_size}
        self.write("train", **line)
        left = (self.total - self.step) * self.batch_size / max(line["images_per_s"], 1e-9)
        self.screen.report(self.step, self.total, line, left, self.loss_names)
        if self.device.type == "cpu" and not self.crowded:
            note = crowded(line, processes(self.images, self.runtime.workers))
            self.crowded = bool(note)
            if note:
                self.screen.say(f"note: {note}")
        self.note_waiting(line["data_wait"])

    def note_waiting(self, fraction: float) -> None:
        """Say once what helps if recent steps have waited for data."""
        if self.waits is None:
            return
        self.waits = [*self.waits, fraction][-RECENT:]
        mean = sum(self.waits) / RECENT
        if len(self.waits) == RECENT and mean > WAITING and (advice := self.faster_loading()):
            self.screen.say(f"note: {mean:.0%} of the time is spent waiting for data; {advice}")
            self.write("event", text=f"{mean:.0%} of the time is spent waiting for data", advice=advice)
            self.waits = None

    def save(self) -> None:
        """Save a checkpoint on rank 0, unless the newest one is of this step. Signals are deferred."""
        now = self.step, self.last_milestone
        if self.world.is_main and self.saved != now:
            state = {
                "format": FORMAT,
                "step": self.step,
                "total_steps": self.total,
                "skipped": self.skipped,
                "seconds": self.seconds,
                "last_milestone": self.last_milestone,
                "data": self.data,
                "backbone": self.backbone,
                "recipe_hash": recipe_hash(self.recipe),
                "environment": self.environment(),
                **self.more_state(),
            }
            folder, keep = self.out / "checkpoints", self.runtime.keep
            with signals.held():
                save_checkpoint(folder, self.model, self.optimizer, state, keep)
        self.saved = now

    def close(self) -> None:
        self.screen.stop()
        if self.metrics:
            self.metrics.close()
            self.metrics = None
