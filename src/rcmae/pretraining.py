"""Pre-training of a backbone by any method. The first file to read.

    rcmae pretrain [RECIPE] --data FOLDER --out RUN

`Pretraining.update` is one optimizer step. `trainer.py` has the loop, logging, checkpoints and resuming.
"""

import contextlib
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .config import LENGTHS, Recipe, RuntimeConfig, changed, check, how_many, parse_time, recipe_hash
from .data.cache import CACHES, DeviceCache, RamCache
from .data.dataset import Images, measure_statistics
from .data.loader import faster, ranks_here
from .data.pixels import measure_bits
from .data.sampler import check_parts
from .data.sources import Source, open_source
from .data.supervised import path_seed
from .data.views import Cut
from .engine.console import Screen, clock
from .engine.distributed import World, autocast
from .engine.metrics import of_kind, read_metrics
from .engine.optim import adamw, set_schedules
from .engine.run import ADVICE, RunContext, check_same_recipe, read_json, run_context, write_json
from .engine.schedules import Progress, fraction_of_run, spread
from .engine.step import Mean, clip_gradients, conditional_step
from .errors import AlarmError, ConfigError, DataError, first_line, refuse
from .interop.initial import initialize, read_initial
from .interop.timm_export import export
from .lab.alarms import Alarm
from .lab.recorder import Recorder
from .lab.snapshots import SNAPSHOTS, first_batch, save_reconstructions
from .methods import METHODS, Method
from .methods.mean_teacher import SHORT_HALF_LIFE
from .methods.recipes import load_recipe, recipe_type
from .models.backbone import Backbone, Channels, Statistics, usual_statistics
from .report import write_report
from .step_time import at_most, steps_within
from .tasks.features import identity
from .tasks.interval import with_margin
from .tasks.learned import show_table
from .tasks.probe import BASELINES, KINDS, Probes, Scores, probe_set, size_note
from .trainer import Trainer


@dataclass(frozen=True)
class Result:
    """The result of a finished run: its directory, its last step, and the last probe (accuracy in percent),
    if any."""

    run: Path
    step: int
    probe: dict[str, dict[str, float]]


def pretrain(recipe: Recipe, runtime: RuntimeConfig = RuntimeConfig()) -> Result:
    """Pre-train by `recipe` in the environment of `runtime`. A run that is already in `runtime.out` resumes;
    if it has finished, a recipe that differs in its length only, and is longer, extends it.

    Raises the errors of `rcmae.errors`; Preempted if a signal stopped the run and the state is saved.
    """
    if type(recipe) is not (kind := recipe_type(recipe.method)):
        raise ConfigError(
            f"a recipe of {recipe.method} is a {kind.__name__}: create it with load_recipe, or from another "
            "recipe with with_method"
        )
    check(recipe)
    refuse(METHODS[recipe.method].validate(recipe))
    if not recipe.data.strip():
        raise ConfigError(
            "no images to train on: give --data FOLDER, or another source listed by `rcmae list`"
        )
    out = (
        Path(runtime.out)
        if runtime.out
        else Path("runs") / f"{recipe.method}-{Path(recipe.data.replace(':', '-')).name}"
    )
    with run_context(runtime, out, ADVICE) as context:
        with contextlib.closing(Pretraining(recipe, context)) as run:
            return run.train()


class Pretraining(Trainer):
    """One pre-training run: setup, the optimizer step, and the measurements during training."""

    recipe: Recipe
    runtime: RuntimeConfig
    free = ("data", *LENGTHS)

    def __init__(self, recipe: Recipe, context: RunContext, images: Source | None = None):
        """`images` are those of the recipe, if they are open already."""
        self.began = time.monotonic()
        check_parts(recipe.optim.batch_size, context.world.size, context.runtime.accumulate)
        caveat = METHODS[recipe.method].micro_batch_statistics(recipe)
        if caveat and recipe.optim.batch_size // context.runtime.accumulate < 2:
            raise ConfigError(
                f"{recipe.method} learns nothing from micro-batches of one image, as {caveat}: give a "
                "smaller --accumulate"
            )
        check_same_recipe(context.out, recipe, load_recipe, self.free)
        max_pixels = cast(RuntimeConfig, context.runtime).max_pixels
        if images is None:
            images = open_images(recipe, context.screen, context.world, max_pixels)
        super().__init__(recipe, context, images, recipe.optim.batch_size, recipe.seed)
        self.cache: RamCache | None = None
        if self.runtime.cache == "ram" and images.in_memory:
            self.screen.say("note: the images are in memory already: --cache ram has no effect")
        elif self.runtime.cache != "none":
            self.cache = CACHES[self.runtime.cache](
                images, recipe, self.runtime.workers, ranks_here(), self.screen, self.device
            )
        self.reduced = "none"
        "what the cache changes in the pixels of crops"
        self.method = self.build(*self.statistics())
        self.loss_names = self.method.losses
        optimizer = adamw(self.method.student, recipe.optim, lr=0.0)  # `update` sets it before every step
        self.scores: dict[str, dict[str, float]] = {}
        self.drift: float | None = None
        self.extended: list[tuple[int, int]] = []
        "for each extension of the run, the step at which it began and the new number of steps"
        self.recorder: Recorder | None = None
        self.alarm: Alarm | None = None
        self.next_report = 0.0
        # Bits: what is white in 16-bit images is measured on a sample of them.
        data = {"images": images.fingerprint(), "range_of_16-bit_images": f"{images.bits or 16} bits"}
        self.setup(self.method, optimizer, data, load=load_recipe)

    def statistics(self) -> Statistics:
        """Mean and standard deviation of each channel, for pixels in 0 to 1."""
        images, count = self.recipe.images, min(1000, len(self.images))
        if usual := usual_statistics(images):
            return usual
        with self.screen.progress(f"measuring the statistics of {how_many(count, 'image')}", count) as tick:
            measured = (
                measure_statistics(self.images, images.channels, count, tick) if self.world.is_main else None
            )
            return cast(Statistics, self.world.broadcast(measured))

    def build(self, mean: Channels, std: Channels) -> Method:
        """The method on the device, initialized from the seed."""
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.seed)
            # Every method has this signature; mypy sees that of nn.Module.
            method: Method = METHODS[self.recipe.method](self.recipe, mean, std)  # type: ignore[call-arg]
        for module in method.modules():
            if hasattr(module, "checkpointing"):
                module.checkpointing = self.runtime.checkpointing  # type: ignore[assignment]  # a plain bool
            if self.runtime.compile and hasattr(module, "attn") and hasattr(module, "mlp"):
                module.compile()
        return method.to(self.device)

    def dataset(self) -> Images:
        opened = self.cache.opened if self.cache else None
        channels = self.recipe.images.channels
        return Images(self.images, self.method.views(), self.seed, channels, opened=opened)

    def faster_loading(self) -> str:
        packing = f"`rcmae pack {shlex.quote(self.recipe.data)} OUT` and --data OUT"
        caching = "--cache ram, if it fits, or " if self.runtime.cache == "none" else ""
        return faster(self.images, self.runtime.workers, f"try {caching}{packing}")

    def environment(self) -> dict[str, Any]:
        return super().environment() | {"max_pixels": self.runtime.max_pixels, "cache": self.reduced}

    def fill_cache(self) -> None:
        """Called by all ranks at once, since each has its own cache, and one alone would let the others wait
        until they time out."""
        if self.cache:
            self.reduced = self.cache.changes

    def loader(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        batches = self.batches_from(self.dataset(), start, stop)
        return self.cache.cut_all(batches) if isinstance(self.cache, DeviceCache) else batches

    # --- the step -------------------------------------------------------------------------------------------

    def update(self, t: Progress) -> Tensor:
        optim, parts = self.recipe.optim, self.runtime.accumulate
        if self.logs and self.recorder:
            self.recorder.monitor.start(t)
        set_schedules(self.optimizer, optim, self.method.schedule, t, self.extended)
        mean = Mean(parts)
        for part, batch in enumerate(self.micro_batches(), 1):
            torch.manual_seed(path_seed(self.recipe.seed, t.step, self.world.rank * parts + part))
            with autocast(self.device, self.precision):
                losses = self.net(batch, t)  # the method's forward pass: teacher, student, loss
            (losses["loss"] / parts).backward()
            mean.add(losses)
            if part < parts:
                self.method.after_micro_batch(t, part, parts)
        norm = clip_gradients(self.optimizer, optim.clip, self.method.clipped_together)
        # Decided on the device, so that no step waits for the host, and by all ranks together.
        applied = self.world.all_ranks((norm.isfinite() & mean.values["loss"].isfinite()).float())
        self.method.before_step(t, applied)
        conditional_step(self.optimizer, applied)
        self.method.after_step(t, applied)  # updates the teacher
        self.window.add(mean.values | {"grad_norm": norm}, applied, self.batch_size)
        return applied

    # --- starting and resuming ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Plan a new run: measure the baselines, set the number of steps, and write a first checkpoint, which
        also checks that the disk is writable."""
        self.fill_cache()
        baselines: dict[str, Scores] = {}
        seconds = 0.0
        if self.probes:
            if note := size_note(self.probes.set, self.images, self.recipe):
                self.screen.say(f"note: {note}")
            baselines, seconds = self.probes.baselines(self.method.backbone("student"))
        initial = self.initialize()
        if self.probes and initial:
            baselines |= self.probes.initial(self.method.backbone("student"))
        self.method.train()
        if self.recipe.time:
            probing = self.recipe.probe.probes * len(self.method.networks) * seconds
            self.total = steps_within(self, self.recipe.time, probing, self.began)
        else:
            self.total = cast(int, self.recipe.total_steps(len(self.images)))  # None only with a time
        parameters = sum(p.numel() for p in self.method.student.parameters())
        mean, std = self.method.statistics
        about = self.description(parameters) | {
            "images": len(self.images),
            "left_out": dict(self.images.left_out),
            "notes": list(self.images.notes),
            "data": self.images.fingerprint(),
            "mean": list(mean),
            "std": list(std),
            "initial_weights": initial,
        }
        if self.world.is_main:
            write_json(self.out / "machine.json", about)
            if baselines:
                self.write("baseline", **baselines)
            if references := self.method.references(self.fixed):
                self.write("reference", **references)
            save_reconstructions(self.method, self.fixed, self.step, self.out / "snapshots")
        self.save()
        self.report()
        images = f"{how_many(len(self.images), 'image')} of {self.recipe.data}"
        self.screen.say(
            f"new run in {self.out}: {self.recipe.method}, {parameters / 1e6:.1f} M parameters, {images}"
        )
        self.screen.say(
            f"{how_many(self.total, 'step')} ({self.total / self.steps_per_epoch:.1f} epochs) on "
            f"{about['device']} in {self.precision}"
        )
        if self.runtime.accumulate > 1 and (caveat := self.method.accumulation_caveat(self.recipe)):
            self.screen.say(f"note: --accumulate changes the result of a step: {caveat}")
        state = self.method.state(self.progress)
        if "half_life_steps" in state:
            self.screen.say(
                f"momentum {state['momentum']:.5f}: half-life {state['half_life_steps']:,.1f} steps, "
                f"{state['half_life_images']:,.0f} images, {state['half_life_epochs']:.2f} epochs, "
                f"{fraction_of_run(float(state['half_life_fraction']))}"
            )
            if state["half_life_steps"] < SHORT_HALF_LIFE:
                self.screen.say(
                    f"note: the teacher's half-life is {state['half_life_steps']:.2g} steps, so it is nearly "
                    f"the student; give {self.method.longer_memory}"
                )
        if baselines:
            texts = "; ".join(f"{BASELINES[name]} {self.in_words(s)}" for name, s in baselines.items())
            self.screen.say(f"baselines, accuracy (%): {texts}")

    def initialize(self) -> dict[str, str] | None:
        """Load the initial weights of the recipe, on every rank, and say what was adapted. Returns what they
        are; None for a random initialization."""
        if (name := self.recipe.network.init) is None:
            return None
        initial = read_initial(name)
        changes = initialize(self.method, initial, name)
        self.screen.say(f"initial weights: {'; '.join([name, *changes])}")
        license = {"license": initial.encoder.license} if initial.encoder.license else {}
        return {"name": name, "weights": identity(initial.encoder)} | license

    def resume_or_begin(self) -> None:
        super().resume_or_begin()
        if self.extended:
            self.record_extension()
        if self.step >= self.total:
            self.screen.say(f"{self.out} is finished at step {self.step:,}; more --steps extend it")
            if not all((self.out / "export" / which).is_dir() for which in self.method.networks):
                self.export()
        elif self.world.is_main:  # load now what milestones need, so that missing data is noticed now
            _ = self.probes, self.fixed
        if self.world.is_main and self.runtime.monitor:
            lines = read_metrics(self.out)
            self.recorder = Recorder(self.method, self.progress, self.log_every, lines)
            self.warn(self.recorder.alarms.at_start(self.progress, self.drift))
        if any(self.world.any_rank(bool(self.stop_reason()))):
            self.stop(self.stop_reason())

    # --- during training ------------------------------------------------------------------------------------

    def log_more(self, t: Progress, line: dict[str, float]) -> dict[str, float]:
        more: dict[str, float] = {}
        if self.recorder:
            more, alarms = self.recorder.log(t, line, self.write)
            self.warn(alarms)
        return more | {k: float(v) for k, v in self.method.state(t).items()}

    def warn(self, alarms: list[Alarm]) -> None:
        """Print and record alarms; with `--on-alarm stop` the run ends after this step, or at its start."""
        for alarm in alarms:
            self.write("alarm", name=alarm.name, text=alarm.text)
            self.screen.say(f"alarm {alarm.name}: {alarm.text}")
            if self.runtime.on_alarm == "stop":
                self.alarm = self.alarm or alarm

    def stop_reason(self) -> str:
        return f"{self.alarm.name}: {self.alarm.text}" if self.alarm else ""

    def stop(self, reason: str) -> None:
        self.next_report = 0.0  # the report must show the reason, even if it was drawn a moment ago
        self.report(stopping=True)
        raise AlarmError(
            f"alarm {reason or 'raised by rank 0'}; stopped at step {self.step}, its checkpoint is kept; the "
            "same command resumes it and does not stop for this alarm again"
        )

    def milestone_steps(self) -> set[int]:
        self.probe_steps = spread(self.total, self.recipe.probe.probes)
        return self.probe_steps | spread(self.total, SNAPSHOTS)

    def measure(self) -> tuple[float | None, dict[str, Scores]]:
        """LiDAR, and the probes if they are due, on rank 0."""
        lidar, scores = None, {}
        if self.world.is_main and self.recorder:
            lidar = self.recorder.lidar(self.fixed, self.step, self.step - self.last_milestone)
        if self.world.is_main and self.probes and self.step in self.probe_steps:
            scores = self.probes.score(self.backbones(), self.step, last=self.step == self.total)
            self.method.train()  # probing left the encoder in evaluation mode
        return lidar, scores

    def record(self, measurement: tuple[float | None, dict[str, Scores]]) -> None:
        lidar, scores = measurement
        if self.world.is_main:
            save_reconstructions(self.method, self.fixed, self.step, self.out / "snapshots")
        if lidar:
            self.write("health", lidar=lidar)
        if scores:
            self.scores = scores
            self.write("probe", **scores)
            shown = [*scores.items()]
            if baselines := of_kind(read_metrics(self.out), "baseline"):
                start = [name for name in BASELINES if name in baselines[0]][-1]
                shown.append((BASELINES[start], baselines[0][start]))
            text = "; ".join(f"{which} {self.in_words(s)}" for which, s in shown)
            self.screen.say(f"step {self.step:,}, accuracy (%): {text}")

    def in_words(self, scores: Scores) -> str:
        """Accuracies of the probes with their margins."""
        assert self.probes is not None
        images = len(self.probes.set.truth)
        return ", ".join(f"{KINDS[k]} {with_margin(scores[k], images)}" for k in KINDS if k in scores)

    def backbones(self) -> dict[str, Backbone]:
        """The networks that are probed and exported."""
        return {which: self.method.backbone(cast(Any, which)) for which in self.method.networks}

    @cached_property
    def probes(self) -> Probes | None:
        """The probes during training, on rank 0; None without labels."""
        progress = self.screen.progress
        images = probe_set(self.images, self.recipe, progress) if self.world.is_main else None
        if images is None:
            return None
        return Probes(
            images, self.out, self.device, self.precision, self.recipe.probe.attentive, self.screen.progress
        )

    @cached_property
    def fixed(self) -> dict[str, Tensor]:
        batch = first_batch(self.dataset(), self.device, self.screen)
        if isinstance(self.cache, DeviceCache):
            batch["image"] = self.cache.cut(cast(Cut, batch["image"]))
        return batch

    # --- saving ---------------------------------------------------------------------------------------------

    def more_state(self) -> dict[str, Any]:
        drift = self.method.state(self.progress).get("drift")
        return {
            "drift": None if drift is None else float(drift),
            "length": self.recipe.length,
            "extended": self.extended,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.drift = state["drift"]
        self.extended = [(start, stop) for start, stop in state.get("extended", ())]
        if (length := state.get("length")) not in (None, self.recipe.length):
            self.extend(length)
        if self.last_milestone < self.total:
            self.fill_cache()
        elif self.cache:  # a finished run reads no images
            self.reduced = state["environment"].get("cache", "none")

    def extend(self, length: dict[str, Any]) -> None:
        """Plan more steps for a finished run of another `length`. Raises ConfigError unless it has finished
        and the new length is above the steps it has made."""
        if self.recipe.time:  # at the speed so far, with probes and checkpoints
            total = at_most(self, int(self.step * parse_time(self.recipe.time) / max(self.seconds, 1e-3)))
        else:
            total = cast(int, self.recipe.total_steps(len(self.images)))
        given = " ".join(
            f"--{name} {value}" for name, value in self.recipe.length.items() if value is not None
        )
        given = f"{given or 'the default length'} ({how_many(total, 'step')})"
        if total == self.total:  # in another unit
            self.recipe = changed(self.recipe, **length)
        elif self.step < self.total:
            raise ConfigError(
                f"{self.out} is at step {self.step:,} of {self.total:,}, {given} is another length: "
                f"finish it with `rcmae pretrain --out {self.out}`, then extend it; or use another --out"
            )
        elif total < self.total:
            raise ConfigError(
                f"{self.out} has made {how_many(self.step, 'step')} already, more than {given}; give more to "
                "extend it, or use another --out"
            )
        elif self.runtime.out is None:  # a new run may be meant, in the same default directory
            raise ConfigError(
                f"{self.out} holds a finished run of {how_many(self.step, 'step')}, and {given} is longer: "
                f"give --out {self.out} to extend it, or another --out for a new run"
            )
        else:
            self.total, self.saved = total, None
            self.extended.append((self.step, total))

    def record_extension(self) -> None:
        """Record the extended length; if it is new, in the checkpoint and on the screen too."""
        if self.world.is_main:
            about = read_json(self.out / "machine.json")
            more = {"steps": self.total, "recipe_hash": recipe_hash(self.recipe), "extended": self.extended}
            write_json(self.out / "machine.json", about | more)
        if self.saved is None:
            text = f"extended from {self.step:,} to {how_many(self.total, 'step')}"
            self.write("event", text=text)
            self.screen.say(f"{text}: a new warm-up, then the schedules of a run of {self.total:,} steps")
            self.save()

    def save(self) -> None:
        super().save()
        self.export()

    def export(self) -> None:
        """Write one folder per network, which timm can load."""
        if not self.world.is_main:
            return
        about = {
            "method": self.recipe.method,
            "step": self.step,
            "recipe_hash": recipe_hash(self.recipe),
            "data": self.data["images"],
            "bits": self.images.bits,
        }
        initial = read_json(self.out / "machine.json").get("initial_weights") or {}
        for which, backbone in self.backbones().items():
            backbone.license = initial.get("license", "")
            export(backbone, self.out / "export" / which, about | {"network": which})

    def report(self, stopping: bool = False) -> None:
        """Write report.html. A failure does not end the run, and reports take at most a twentieth of its
        time."""
        if not self.world.is_main or (self.step < self.total and time.monotonic() < self.next_report):
            return
        began = time.monotonic()
        try:
            with self.screen.progress("drawing report.html", 1):
                write_report(self.out, running=not stopping)
        except Exception as e:
            self.screen.say(
                f"note: report.html could not be written ({type(e).__name__}: {first_line(e)}); try "
                f"`rcmae report {self.out}`"
            )
        now = time.monotonic()
        self.next_report = now + 20 * (now - began)  # a short run has closely spaced milestones

    def finish(self) -> Result:
        """Write the final report and print where the results are."""
        self.close()
        if self.world.is_main:
            self.report()
            show_table(self.out, self.screen)
            self.screen.say(
                f"{clock(self.seconds)} for {how_many(self.step, 'step')}. Open {self.out / 'report.html'}"
            )
            folder = self.out / "export" / self.method.networks[-1]
            self.screen.say(f'Load the backbone: timm.create_model("local-dir:{folder}", pretrained=True)')
        return Result(self.out, self.step, self.scores)


def open_images(
    recipe: Recipe, screen: Screen, world: World = World(), max_pixels: float = Source.pixel_limit
) -> Source:
    """The images of a recipe, see `open_source`. Raises DataError if there are fewer than a batch."""
    with screen.progress(f"indexing {recipe.data}", 100) as tick:
        images = open_source(
            recipe.data,
            recipe.images.channels,
            size=recipe.images.size,
            tick=lambda fraction: tick(round(100 * fraction)),
            value_range="dtype",
            max_pixels=max_pixels,
        )
    if recipe.images.range == "data":
        measure_bits([images], recipe.images.channels, progress=screen.progress, world=world)
    screen.say(images.summary())
    for note in images.notes:
        screen.say(f"note: {note}")
    batch = recipe.optim.batch_size
    if len(images) < batch:
        fitting = 2 ** (max(len(images), 1).bit_length() - 1)
        raise DataError(
            f"{recipe.data} holds {how_many(len(images), 'image')}, fewer than the batch of {batch}; give "
            f"--batch-size {fitting} or more images"
        )
    return images
