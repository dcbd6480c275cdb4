"""A supervised run in a directory: one loop for whatever learns from labels, resumed to the same bit."""

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import Workplace, check, parse_time, recipe_hash
from ..data.dataset import BadFiles
from ..data.sampler import BatchSampler, check_parts
from ..data.sources import Source
from ..engine import distributed
from ..engine.checkpoint import load_checkpoint, newest, save_checkpoint
from ..engine.console import Screen
from ..engine.distributed import World
from ..engine.metrics import Metrics
from ..engine.run import (
    StopSignals,
    circumstances,
    describe_machine,
    keep_freed_memory,
    memory_gib,
    other_circumstances,
    owned,
    plain_failures,
    record_recipe,
    write_json,
)
from ..engine.schedules import Progress, spread, usual_log_every
from ..engine.step import Skips, Window, optimizer_step, set_lr
from ..errors import CheckpointError, ConfigError, DataError, Preempted


class Place(NamedTuple):
    """Where a run happens."""

    out: Path
    machine: Workplace
    device: torch.device
    world: World
    screen: Screen
    stop: StopSignals


@contextlib.contextmanager
def taken(machine: Workplace, what: str) -> Iterator[Place]:
    """The run directory `machine.out` and the device, taken for a run of `what`; failures within come out in one line.

    torch's own generators are as they were before when it is left. Raises the errors of `rcmae.errors`.
    """
    check(machine)
    if machine.out is None:
        raise ConfigError(f"{what} needs a directory: give --out")
    out, device = Path(machine.out), distributed.pick_device(machine.device)
    if machine.threads:
        torch.set_num_threads(machine.threads)
    if device.type == "cpu":
        keep_freed_memory()
    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
    advice = "try --accumulate 2, --checkpointing or a smaller batch (--settings batch_size=N)"
    with distributed.joined(device) as world, plain_failures(device, world, advice), forked:
        with owned(out) if world.first else contextlib.nullcontext(), Screen(world.first) as screen, StopSignals() as stop:
            yield Place(out, machine, device, world, screen, stop)


def fitted_batch(batch_size: int, images: int, parts: int, least: int = 1) -> int:
    """The batch, or, where there are fewer images, a power of two for each of its `parts` (ranks x micro-batches).

    Raises DataError when a part would have fewer than `least`.
    """
    if images >= batch_size:
        return batch_size
    part = 2 ** (images // parts).bit_length() // 2
    if part < least:
        raise DataError(f"{images} training images are too few for {parts} parts of a step (ranks x accumulate); start fewer")
    return part * parts


class Training(ABC):
    """One run: whoever inherits builds the network, and says what is drawn, learned, scored, and kept in the end.

    `settings` have `batch_size`, `seed`, `clip` and `total_steps(images)`; `load` reads them back from a file.
    """

    what, rate_name = "training", "lr"
    "what to call it, and the setting that is its learning rate"

    def __init__(self, settings: Any, place: Place, train_set: Source, load: Callable[[str], Any], about: dict[str, Any]):
        self.settings, self.train_set, self.load, self.about = settings, train_set, load, about
        self.out, self.machine, self.device, self.world, self.screen, self.stop = place
        self.began = time.monotonic()
        check_parts(settings.batch_size, self.world.size, self.machine.accumulate)
        self.part = settings.batch_size // (self.world.size * self.machine.accumulate)
        self.steps_per_epoch = len(train_set) // settings.batch_size
        self.total = settings.total_steps(len(train_set))
        self.precision = distributed.pick_precision(self.machine.precision, self.device)
        self.bad = self.bad_files(len(train_set), "bad_files.jsonl")
        self.metrics: Metrics | None = None
        self.step, self.skipped, self.seconds = 0, 0, 0.0
        self.history: list[dict[str, float]] = []
        "step, epoch and scores, each time these were taken"

    def bad_files(self, images: int, name: str) -> BadFiles:
        return BadFiles(self.out, images, self.machine.bad_share, self.machine.strict, name)

    def learn(self, model: nn.Module, optimizer: torch.optim.Optimizer, origin: dict[str, Any], backbone: str) -> None:
        """Take what is trained, and continue from the newest whole checkpoint, or begin.

        `origin` is all that tells the data, `backbone` the identity of what the network was made from; both must not change.
        """
        self.model, self.optimizer, self.origin, self.backbone = model, optimizer, origin, backbone
        self.net = distributed.wrap(model, self.world)
        if self.world.first:
            record_recipe(self.out, self.settings, self.load)
        path = newest(self.out / "checkpoints", warn=self.screen.say)
        if path is not None:
            state = load_checkpoint(path, model, optimizer)
            if state["data"] != origin:
                what = next(k for k, v in origin.items() if state["data"].get(k) != v).replace("_", " ")
                raise DataError(f"the data ({what}) has changed since {path} was written; use another --out to start anew")
            if state["backbone"] != backbone:
                raise CheckpointError(f"{path} was begun from another backbone; use another --out to start anew")
            self.step, self.skipped, self.seconds, self.history = (state[k] for k in ("step", "skipped", "seconds", "history"))
            self.screen.say(f"resumed from {path.name} of {self.total:,} steps in {self.out}")
            for note in other_circumstances(state["circumstances"], self.circumstances()):
                self.screen.say(note)
        m = self.machine
        self.metrics = Metrics(self.out, None if path is None else self.step, m.tensorboard, m.wandb) if self.world.first else None
        if path is not None:
            self.write("event", text=f"resumed from step {self.step}")

    # --- what a run is made of --------------------------------------------------------------------------------------------

    @abstractmethod
    def loader(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Micro-batches of the steps from `start` to before `stop`, on the device."""

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

    @abstractmethod
    def finish(self) -> Any:
        """What the last weights leave behind."""

    # --- the loop -------------------------------------------------------------------------------------------------------

    def sampler(self, start: int, stop: int) -> BatchSampler:
        return BatchSampler(
            len(self.train_set), self.settings.batch_size, rank=self.world.rank, world=self.world.size, micro=self.machine.accumulate,
            start=start, stop=stop, seed=self.settings.seed,
        )  # fmt: skip

    def circumstances(self) -> dict[str, Any]:
        return circumstances(self.machine, self.device, self.precision, self.world)

    def begin(self, images: str, **facts: Any) -> None:
        """Say what will be done, and write a first checkpoint that also proves the disk. `images` and `facts` tell the data."""
        parameters = sum(p.numel() for p in self.model.parameters())
        if self.world.first:
            about = describe_machine(self.device, self.precision) | facts | {
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "parameters": parameters, "ranks": self.world.size,
                "recipe_hash": recipe_hash(self.settings), "backbone": self.backbone, "steps": self.total,
                "steps_per_epoch": self.steps_per_epoch, "data": self.origin, "about": self.about,
            }  # fmt: skip
            write_json(self.out / "machine.json", about)
        self.save()
        self.screen.say(f"{self.what} in {self.out}: {parameters / 1e6:.1f} M parameters, {images}")
        epochs = self.total / self.steps_per_epoch
        self.screen.say(f"{self.total:,} steps ({epochs:.1f} epochs) on {self.device} in {self.precision}")

    def train(self) -> Any:
        """From wherever the run stands to its end."""
        scoring = spread(self.total, self.scorings())
        log_every = self.machine.log_every or usual_log_every(self.total)
        save_seconds = parse_time(self.machine.save_every)
        self.window, self.skips = (
            Window(self.device),
            Skips(self.out / "checkpoints", f"lower {self.rate_name} or set clip (--settings {self.rate_name}=... clip=1)"),
        )
        saved = time.monotonic()
        offset = self.seconds - (saved - self.began)
        batches = self.loader(self.step, self.total)
        self.screen.start(self.total, self.step)
        while self.step < self.total:
            t = Progress(self.step, self.total, self.steps_per_epoch)
            self.skips.note(self.update(batches, t))
            self.step += 1
            self.screen.step(self.step)
            self.seconds = offset + time.monotonic() - self.began
            if self.step % log_every == 0 or self.step == self.total:
                self.name_skipped()
                self.log(replace(t, step=self.step))
            asked, due = self.world.agree(self.stop.asked is not None, time.monotonic() - saved > save_seconds)
            if asked or due or self.step in scoring:
                paused = time.monotonic()
                self.name_skipped()
                if self.step in scoring:
                    self.keep(t.epoch + 1 / self.steps_per_epoch, self.score())
                self.save()
                saved = time.monotonic()
                self.window.pause(saved - paused)
            if asked:
                raise Preempted(f"stopped by {self.stop.asked or 'another rank'}; saved at step {self.step}, run the same command again")
        return self.finish()

    def update(self, batches: Iterator[dict[str, Any]], t: Progress) -> Tensor:
        """One optimizer step. 1 or 0, on the device."""
        s, micro = self.settings, self.machine.accumulate
        set_lr(self.optimizer, self.rate(t))
        return optimizer_step(
            self.net, self.optimizer, batches, lambda batch, i: self.losses(batch, t.step, self.world.rank * micro + i), self.window,
            images=s.batch_size, micro=micro, clip=s.clip, precision=self.precision, device=self.device, world=self.world,
        )  # fmt: skip

    def keep(self, epoch: float, scores: dict[str, float]) -> None:
        """Scores become part of the history, and are said."""
        self.history.append({"step": self.step, "epoch": epoch, **scores})
        self.write("val", epoch=epoch, **scores)
        self.screen.say(f"step {self.step:,}: {self.said(scores)}")

    def said(self, scores: dict[str, float]) -> str:
        return ", ".join(f"{name} {value:.1f}" for name, value in scores.items() if not math.isnan(value))

    def name_skipped(self) -> None:
        """Name the batches that were skipped since the last look. Raises DivergedError."""
        for step in self.skips.look(self.step):
            self.skipped += 1
            keys = self.sampler(0, 0).keys(step)
            where = f"images {self.train_set.where(keys[0][1])} to {self.train_set.where(keys[-1][1])}"
            text = f"step {step} was not finite and was skipped: epoch {keys[0][0]}, {where}"
            self.write("event", text=text, images=[k[1] for k in keys])
            self.screen.say(text)

    # --- what one sees ----------------------------------------------------------------------------------------------------

    def write(self, kind: str, **values: Any) -> None:
        if self.metrics:
            self.metrics.write(kind, self.step, **values)

    def log(self, t: Progress) -> None:
        line = self.window.read() | {"memory_gib": memory_gib(self.device), "seconds": self.seconds, "skipped": self.skipped}
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        line |= {"lr": lr, "epoch": t.epoch, "images": self.step * self.settings.batch_size}
        self.write("train", **line)
        left = (self.total - self.step) * self.settings.batch_size / max(line["images_per_s"], 1e-9)
        self.screen.report(self.step, self.total, line, left)

    def save(self) -> None:
        if self.world.first:
            state = {
                "step": self.step, "total_steps": self.total, "skipped": self.skipped, "seconds": self.seconds, "history": self.history,
                "data": self.origin, "backbone": self.backbone, "recipe_hash": recipe_hash(self.settings),
                "circumstances": self.circumstances(),
            }  # fmt: skip
            save_checkpoint(self.out / "checkpoints", self.model, self.optimizer, state, self.machine.keep)

    def close(self) -> None:
        self.screen.stop()
        if self.metrics:
            self.metrics.close()
            self.metrics = None
