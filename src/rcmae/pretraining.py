"""Pre-training: a recipe and images become a backbone. The first file to read; it never names a method.

    rcmae pretrain [RECIPE] --data FOLDER --out RUN

`Pretraining.update` is one optimizer step. `trainer.py` calls it until the run is done, logs, saves and resumes.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import Machine, Recipe, check, how_many, recipe_hash
from .data.dataset import Images, measure_statistics
from .data.loader import batches_of
from .data.sampler import check_parts
from .data.sources import Source, open_source
from .engine.console import Screen, clock
from .engine.metrics import read_metrics
from .engine.optim import adamw, linear_rule
from .engine.run import ADVICE, RunContext, check_same_recipe, describe_machine, run_context, write_json
from .engine.schedules import Progress, cosine, share_of_run, spread, warmup_cosine
from .engine.step import Mean, clip_gradients, conditional_step, set_lr, set_weight_decay
from .errors import AlarmError, ConfigError, DataError, first_line
from .interop.timm_export import PLAIN, export
from .lab.alarms import Alarm
from .lab.snapshots import SNAPSHOTS, first_batch, save_reconstructions
from .lab.watch import Watch
from .methods import METHODS, Method
from .methods.recipes import load_recipe, recipe_type
from .models.backbone import usual_statistics
from .report import write_report
from .step_time import steps_within
from .tasks.probe import Probes, Scores, fewer, probe_set, show_table
from .trainer import Trainer

SHORTEST = 0.99
"Half-life in steps below which a teacher is noted to be nearly the student: one step, but for rounding."


@dataclass(frozen=True)
class Result:
    """What a finished run leaves: its directory, the step it reached, and the last probe (accuracy in percent), if any."""

    run: Path
    step: int
    probe: dict[str, dict[str, float]]


def pretrain(recipe: Recipe, machine: Machine = Machine()) -> Result:
    """Pre-train as `recipe` says, on the machine as `machine` says; a run that is already in `machine.out` is resumed.

    Raises the errors of `rcmae.errors`; Preempted when a signal asked it to stop and the state is saved.
    """
    if type(recipe) is not (kind := recipe_type(recipe.method)):
        raise ConfigError(f"a recipe of {recipe.method} is a {kind.__name__}: make it with load_recipe, or with_method from another one")
    check(recipe)
    if problems := METHODS[recipe.method].problems(recipe):
        raise ConfigError("; ".join(problems))
    out = Path(machine.out) if machine.out else Path("runs") / f"{recipe.method}-{Path(recipe.data.replace(':', '-')).name}"
    with run_context(machine, out, ADVICE) as context:
        with contextlib.closing(Pretraining(recipe, context)) as run:
            return run.train()


class Pretraining(Trainer):
    """One run of pre-training: what is built before the first step, the step, and what is measured on the way."""

    recipe: Recipe
    machine: Machine

    def __init__(self, recipe: Recipe, context: RunContext):
        self.began = time.monotonic()
        check_parts(recipe.optim.batch_size, context.world.size, context.machine.accumulate)
        if (why := METHODS[recipe.method].accumulation_caveat(recipe)) and recipe.optim.batch_size // context.machine.accumulate < 2:
            raise ConfigError(f"{recipe.method} learns nothing from micro-batches of one image, as {why}: give a smaller --accumulate")
        check_same_recipe(context.out, recipe, load_recipe)
        images = open_images(recipe, context.screen)
        super().__init__(recipe, context, images, recipe.optim.batch_size, recipe.seed)
        self.method = self.build(*self.statistics())
        self.loss_names = self.method.losses
        optimizer = adamw(self.method.student, recipe.optim, lr=0.0)  # `update` sets it before every step
        self.scores: dict[str, dict[str, float]] = {}
        self.drift: float | None = None
        self.watch: Watch | None = None
        self.alarm: Alarm | None = None
        self.next_report = 0.0
        self.setup(self.method, optimizer, {"images": images.fingerprint()}, load=load_recipe)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of each channel, in units of 0 to 1."""
        images, count = self.recipe.images, min(1000, len(self.images))
        if usual := usual_statistics(images):
            return usual
        with self.screen.progress(f"measuring mean and deviation of {how_many(count, 'image')}", count) as tick:
            return self.world.from_first(measure_statistics(self.images, images.channels, count, tick) if self.world.first else None)

    def build(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Method:
        """The method with weights drawn from the seed, on the device."""
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.seed)
            method: Method = METHODS[self.recipe.method](self.recipe, mean, std)
        for module in method.modules():
            if hasattr(module, "checkpointing"):
                module.checkpointing = self.machine.checkpointing
            if self.machine.compile and hasattr(module, "attn") and hasattr(module, "mlp"):
                module.compile()
        return method.to(self.device)

    def dataset(self) -> Images:
        return Images(self.images, self.method.views(), self.seed, self.recipe.images.channels)

    def loader(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        return batches_of(self.dataset(), self.sampler(start, stop), self.images, self.machine.workers, self.device, self.bad.note)

    # --- the step -------------------------------------------------------------------------------------------------------

    def update(self, t: Progress) -> Tensor:
        optim, parts = self.recipe.optim, self.machine.accumulate
        if self.logs and self.watch:
            self.watch.before_update(t)
        set_lr(self.optimizer, warmup_cosine(linear_rule(optim), optim.min_lr, optim.warmup, t))
        if optim.weight_decay_end is not None:
            set_weight_decay(self.optimizer, cosine(optim.weight_decay, optim.weight_decay_end, t.fraction))
        mean = Mean(parts)
        for batch in self.micro_batches():
            with self.autocast():
                losses = self.net(batch, t)  # the method: the teacher first, then the student
            (losses["loss"] / parts).backward()
            mean.add(losses)
        norm = clip_gradients(self.optimizer, optim.clip)
        # Decided on the device, by all ranks: no step waits for the host, and no rank goes its own way.
        applied = self.world.everywhere((norm.isfinite() & mean.values["loss"].isfinite()).float())
        self.method.before_step(t, applied)
        conditional_step(self.optimizer, applied)
        self.method.after_step(t, applied)  # the teacher follows
        self.window.add(mean.values | {"grad_norm": norm}, applied, self.batch_size)
        return applied

    # --- the beginning --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Plan a new run: its baselines, how many steps, and a first checkpoint that also proves the disk."""
        baselines, seconds = {}, 0.0
        if self.probes:
            if note := fewer(self.probes.set, self.images, self.recipe):
                self.screen.say(f"note: {note}")
            baselines, seconds = self.probes.baselines(self.method.backbone("student"))
            self.method.train()
        if given := self.recipe.time:
            self.total = steps_within(self, given, self.recipe.probe.probes * len(self.method.networks) * seconds, self.began)
        else:
            self.total = self.recipe.total_steps(len(self.images))
        parameters = sum(p.numel() for p in self.method.student.parameters())
        about = describe_machine(self.device, self.precision) | {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "parameters": parameters, "ranks": self.world.size,
            "images": len(self.images), "data": self.images.fingerprint(), "recipe_hash": recipe_hash(self.recipe),
            "steps": self.total, "steps_per_epoch": self.steps_per_epoch,
            "mean": list(self.method.statistics[0]), "std": list(self.method.statistics[1]),
        }  # fmt: skip
        if self.world.first:
            write_json(self.out / "machine.json", about)
            for kind, values in {"floor": baselines, "reference": self.method.references(self.fixed)}.items():
                if values:
                    self.write(kind, **values)
            save_reconstructions(self.method, self.fixed, self.step, self.out / "snapshots")
        self.save()
        self.report()
        images = f"{how_many(len(self.images), 'image')} of {self.recipe.data}"
        self.screen.say(f"fresh start in {self.out}: {self.recipe.method}, {parameters / 1e6:.1f} M parameters, {images}")
        self.screen.say(
            f"{how_many(self.total, 'step')} ({self.total / self.steps_per_epoch:.1f} epochs) on {about['device']} in {self.precision}"
        )
        if self.machine.accumulate > 1 and (why := self.method.accumulation_caveat(self.recipe)):
            self.screen.say(f"note: with --accumulate the step is another one: {why}")
        state = self.method.state(Progress(0, self.total, self.steps_per_epoch))
        if "half_life_steps" in state:
            units = "half-life {half_life_steps:,.1f} steps, {half_life_images:,.0f} images, {half_life_epochs:.2f} epochs, "
            units += share_of_run(state["half_life_share"])
            self.screen.say(f"momentum {state['momentum']:.5f}: " + units.format(**state))
            if state["half_life_steps"] < SHORTEST:
                text = "note: the teacher's half-life is shorter than a step, so it is nearly the student and has little to teach; "
                self.screen.say(f"{text}give {self.method.longer}")
        if baselines:
            f = {k: v["linear"] for k, v in baselines.items()}
            self.screen.say(f"floors of the linear probe: raw pixels {f['raw_pixels']:.1f} %, untrained {f['untrained']:.1f} %")

    # --- on the way -----------------------------------------------------------------------------------------------------

    def resume_or_begin(self) -> None:
        super().resume_or_begin()
        if self.step >= self.total:
            self.screen.say(f"{self.out} is finished at step {self.step:,}")
            if not all((self.out / "export" / which).is_dir() for which in self.method.networks):
                self.export()
        elif self.world.first:  # read now what milestones will need, and find out now if it is gone
            _ = self.probes, self.fixed
        if self.world.first and self.machine.monitor:
            self.watch = Watch(self.method, self.total, self.steps_per_epoch, self.log_every, read_metrics(self.out), self.step)
            self.warn(self.watch.at_start(Progress(self.step, self.total, self.steps_per_epoch), self.drift))
        if any(self.world.agree(bool(self.stops()))):
            self.stop(self.stops())

    def log_more(self, t: Progress, line: dict[str, float]) -> dict[str, float]:
        more: dict[str, float] = {}
        if self.watch:
            more, alarms = self.watch.log(t, line, self.write)
            self.warn(alarms)
        return more | {k: float(v) for k, v in self.method.state(t).items()}

    def warn(self, alarms: list[Alarm]) -> None:
        """Say and record what is wrong; with `--on-alarm stop` the run ends with this step, or before its first one."""
        for alarm in alarms:
            self.write("alarm", name=alarm.name, text=alarm.text)
            self.screen.say(f"alarm {alarm.name}: {alarm.text}")
            if self.machine.on_alarm == "stop":
                self.alarm = self.alarm or alarm

    def stops(self) -> str:
        return f"{self.alarm.name}: {self.alarm.text}" if self.alarm else ""

    def stop(self, reason: str) -> None:
        self.next_report = 0.0  # the page must tell why, however lately it was drawn
        self.report()
        kept = f"stopped at step {self.step}, its checkpoint is kept; the same command goes on and does not stop for this alarm again"
        raise AlarmError(f"alarm {reason or 'called by rank 0'}; {kept}")

    def milestone_steps(self) -> set[int]:
        self.probe_steps = spread(self.total, self.recipe.probe.probes)
        return self.probe_steps | spread(self.total, SNAPSHOTS)

    def measure(self) -> tuple[float | None, dict[str, Scores]]:
        """LiDAR and the probes, where they are due, by rank 0."""
        if not self.world.first:
            return None, {}
        lidar = self.watch.lidar(self.fixed, self.step, self.step - self.last_milestone) if self.watch else None
        scores = {}
        if self.probes and self.step in self.probe_steps:
            scores = self.probes.score({which: self.method.backbone(which) for which in self.method.networks}, self.step)
            self.method.train()  # probing left the encoder in evaluation mode
        return lidar, scores

    def record(self, found: tuple[float | None, dict[str, Scores]]) -> None:
        lidar, scores = found
        if self.world.first:
            save_reconstructions(self.method, self.fixed, self.step, self.out / "snapshots")
        if lidar:
            self.write("health", lidar=lidar)
        if scores:
            self.scores = scores
            self.write("probe", **scores)
            text = ", ".join(f"{which} linear {s['linear']:.1f} % k-NN {s['knn']:.1f} %" for which, s in scores.items())
            self.screen.say(f"step {self.step:,}: {text}")

    @cached_property
    def probes(self) -> Probes | None:
        """What is probed on the way, by rank 0; None without labels."""
        chosen = probe_set(self.images, self.recipe, self.screen.progress) if self.world.first else None
        return Probes(chosen, self.out, self.device, self.precision, self.screen.progress) if chosen else None

    @cached_property
    def fixed(self) -> dict[str, Tensor]:
        return first_batch(self.dataset(), self.device, self.screen)

    # --- what is kept ---------------------------------------------------------------------------------------------------

    def more_state(self) -> dict[str, Any]:
        drift = self.method.state(Progress(self.step, self.total, self.steps_per_epoch)).get("drift")
        return {"drift": None if drift is None else float(drift)}

    def restore(self, state: dict[str, Any]) -> None:
        self.drift = state["drift"]

    def save(self) -> None:
        super().save()
        self.export()

    def export(self) -> None:
        """A folder a network that timm loads."""
        if not self.world.first:
            return
        model = self.recipe.network.model
        architecture = model.removeprefix("timm:") if model.startswith("timm:") else PLAIN
        about = {"method": self.recipe.method, "step": self.step, "recipe_hash": recipe_hash(self.recipe), "data": self.data["images"]}
        for which in self.method.networks:
            export(self.method.backbone(which), self.out / "export" / which, about | {"network": which}, architecture)

    def report(self) -> None:
        """A page that cannot be drawn is no reason to lose a run; nor may drawing take more than a twentieth of it."""
        if not self.world.first or (self.step < self.total and time.monotonic() < self.next_report):
            return
        began = time.monotonic()
        try:
            with self.screen.progress("drawing report.html", 1):
                write_report(self.out)
        except Exception as e:
            self.screen.say(f"note: report.html could not be written ({type(e).__name__}: {first_line(e)}); `rcmae report` tries again")
        now = time.monotonic()
        self.next_report = now + 20 * (now - began)  # milestones lie close in a short run

    def finish(self) -> Result:
        """Say where everything is."""
        self.close()
        if self.world.first:
            self.report()
            show_table(self.out, self.screen)
            self.screen.say(f"{clock(self.seconds)} for {how_many(self.step, 'step')}. Open {self.out / 'report.html'}")
            self.screen.say(
                f'Load the backbone: timm.create_model("local-dir:{self.out / "export" / self.method.networks[-1]}", pretrained=True)'
            )
        return Result(self.out, self.step, self.scores)


def open_images(recipe: Recipe, screen: Screen) -> Source:
    """The images of a recipe. Raises DataError where they are fewer than a batch."""
    with screen.progress(f"indexing {recipe.data}", 100) as tick:
        images = open_source(recipe.data, recipe.images.channels, size=recipe.images.size, tick=lambda share: tick(round(100 * share)))
    for note in images.notes:
        screen.say(f"note: {note}")
    batch = recipe.optim.batch_size
    if len(images) < batch:
        have = f"{recipe.data} holds {how_many(len(images), 'image')}, fewer than the batch of {batch}"
        raise DataError(f"{have}; give --batch-size {2 ** (max(len(images), 1).bit_length() - 1)} or more images")
    return images
