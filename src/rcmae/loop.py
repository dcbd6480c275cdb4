"""Pre-training: the loop. It never names a method; the step itself is framed.

rcmae pretrain [RECIPE] --data FOLDER --out RUN
"""

import contextlib
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from .config import Machine, Recipe, check, check_machine, parse_time, recipe_hash
from .data.dataset import BadFiles, Images, collate, measure_statistics
from .data.loader import batches_of
from .data.sampler import BatchSampler, check_parts
from .data.sources import open_source
from .engine import distributed
from .engine.checkpoint import load_checkpoint, newest, replace_file, save_checkpoint
from .engine.console import Screen, clock
from .engine.distributed import World
from .engine.metrics import Metrics, read_metrics
from .engine.optim import adamw, linear_rule
from .engine.run import (
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
from .engine.schedules import Progress, cosine, spread, usual_log_every, warmup_cosine
from .engine.step import Skips, Window, optimizer_step, set_lr
from .errors import AlarmError, ConfigError, DataError, Preempted, first_line
from .interop.timm_export import PLAIN, export
from .lab.alarms import Alarm, Alarms, called_before
from .lab.monitor import Monitor
from .methods import METHODS, Method
from .models.backbone import usual_statistics
from .report import write_report
from .tasks.probe import ProbeSet, Right, Scores, percent, probe_set


@dataclass(frozen=True)
class Result:
    """What a finished run leaves: its directory, the step it reached, and the last probe (percent right), if any."""

    run: Path
    step: int
    probe: dict[str, dict[str, float]]


def pretrain(recipe: Recipe, machine: Machine = Machine()) -> Result:
    """Pre-train as `recipe` says, on the machine as `machine` says; a run that is already in `machine.out` goes on.

    Raises the errors of `rcmae.errors`; Preempted when a signal asked it to stop and the state is saved.
    """
    check(recipe)
    check_machine(machine)
    if problems := METHODS[recipe.method].problems(recipe):
        raise ConfigError("; ".join(problems))
    device = distributed.pick_device(machine.device)
    if machine.threads:
        torch.set_num_threads(machine.threads)
    if device.type == "cpu":
        keep_freed_memory()
    out = Path(machine.out) if machine.out else Path("runs") / f"{recipe.method}-{Path(recipe.data.replace(':', '-')).name}"
    with distributed.joined(device) as world, plain_failures(device, world), owned(out) if world.first else contextlib.nullcontext():
        with Screen(world.first) as screen, StopSignals() as stop:
            with contextlib.closing(Run(recipe, replace(machine, out=out), device, world, screen, stop)) as run:
                return run.train()


class Run:
    """One run: everything that is built before the first step, then `train`."""

    def __init__(self, recipe: Recipe, machine: Machine, device: torch.device, world: World, screen: Screen, stop: StopSignals):
        self.recipe, self.machine, self.device, self.world, self.screen, self.stop = recipe, machine, device, world, screen, stop
        self.began = time.monotonic()
        self.out: Path = machine.out
        check_parts(recipe.optim.batch_size, world.size, machine.accumulate)
        if (why := METHODS[recipe.method].whole_batch(recipe)) and recipe.optim.batch_size // machine.accumulate < 2:
            raise ConfigError(f"{recipe.method} learns nothing from micro-batches of one image, as {why}: give a smaller --accumulate")
        self.source = open_source(recipe.data, recipe.images.channels, size=recipe.images.size)
        batch = recipe.optim.batch_size
        if len(self.source) < batch:
            have = f"{recipe.data} holds {len(self.source)} images, fewer than the batch of {batch}"
            raise DataError(f"{have}; give --batch-size {2 ** (max(len(self.source), 1).bit_length() - 1)} or more images")
        self.steps_per_epoch = len(self.source) // batch
        mean, std = self.statistics()
        self.precision = distributed.pick_precision(machine.precision, device)
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            self.method: Method = METHODS[recipe.method](recipe, mean, std)
        self.method.to(device)
        self.prepare_blocks()
        self.optimizer = adamw(self.method.student, recipe.optim, linear_rule(recipe.optim))
        self.net = distributed.wrap(self.method, world)
        self.bad = BadFiles(self.out, len(self.source), machine.bad_share, machine.strict)
        if world.first:
            record_recipe(self.out, recipe)
        self.step, self.total, self.skipped, self.seconds = 0, 0, 0, 0.0
        self.probe: dict[str, dict[str, float]] = {}
        self.drift: float | None = None
        self.next_report = 0.0
        self.resume()

    # --- what is built ------------------------------------------------------------------------------------------------

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of each channel, in units of 0 to 1."""
        images = self.recipe.images
        return usual_statistics(images) or self.world.from_first(measure_statistics(self.source, images.channels))

    def prepare_blocks(self) -> None:
        for module in self.method.modules():
            if hasattr(module, "checkpointing"):
                module.checkpointing = self.machine.checkpointing
        if self.machine.compile:
            for module in self.method.modules():
                if hasattr(module, "attn") and hasattr(module, "mlp"):
                    module.compile()

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, or plan a new run."""
        path = newest(self.out / "checkpoints", warn=self.screen.say)
        if path is not None:
            state = load_checkpoint(path, self.method, self.optimizer)
            if state["data"] != self.source.fingerprint():
                raise DataError(f"{self.recipe.data} has changed since {path} was written; use another --out to start anew")
            self.step, self.total, self.skipped = state["step"], state["total_steps"], state["skipped"]
            self.seconds, self.drift = state["seconds"], state.get("drift")
            self.screen.say(f"resumed from {path.name} of {self.total:,} steps in {self.out}")
            for note in other_circumstances(state["circumstances"], self.circumstances()):
                self.screen.say(note)
        m, step = self.machine, None if path is None else self.step
        self.metrics = Metrics(self.out, step, m.tensorboard, m.wandb) if self.world.first else None
        if path is not None:
            self.write("event", text=f"resumed from step {self.step}")

    def circumstances(self) -> dict[str, Any]:
        return circumstances(self.machine, self.device, self.precision, self.world)

    def loader(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Micro-batches of the steps from `start` to before `stop`, on the device."""
        r, m = self.recipe, self.machine
        dataset = Images(self.source, self.method.views(), r.seed, r.images.channels)
        sampler = BatchSampler(
            len(self.source), r.optim.batch_size, rank=self.world.rank, world=self.world.size, micro=m.accumulate,
            start=start, stop=stop, seed=r.seed,
        )  # fmt: skip
        return batches_of(dataset, sampler, self.source.kind, m.workers, self.device, self.bad.note)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def train(self) -> Result:
        """From wherever the run stands to its end."""
        probes = probe_set(self.source, self.recipe) if self.world.first else None
        if not self.total:
            self.begin(probes)
        elif self.step >= self.total:
            self.screen.say(f"{self.out} is finished at step {self.step:,}")
            if not all((self.out / "export" / which).is_dir() for which in self.method.networks):
                self.export()
        milestones = spread(self.total, count := max(self.recipe.probe.probes, 6))
        probe_steps = spread(self.total, self.recipe.probe.probes)
        log_every = self.machine.log_every or usual_log_every(self.total)
        save_seconds = parse_time(self.machine.save_every)
        self.fixed = self.fixed_batch()
        self.window, self.skips = Window(self.device), Skips(self.out / "checkpoints")
        self.monitor = Monitor(self.method, self.total) if self.world.first and self.machine.monitor else None
        self.alarms = Alarms(self.method, self.total, self.steps_per_epoch, self.alarms_before())
        self.alarmed: Alarm | None = None
        if self.monitor:
            self.call(self.alarms.at_start(Progress(self.step, self.total, self.steps_per_epoch), self.drift))
        self.end_on_alarm(*self.world.agree(self.alarmed is not None))
        saved = time.monotonic()
        offset = self.seconds - (time.monotonic() - self.began)
        batches = self.loader(self.step, self.total)
        self.screen.start(self.total, self.step)

        while self.step < self.total:
            t = Progress(self.step, self.total, self.steps_per_epoch)
            logs = (self.step + 1) % log_every == 0 or self.step + 1 == self.total
            if logs and self.monitor:
                self.monitor.look(t)

            # ---- one optimizer step ----------------------------------------------------------------------------------
            applied = self.update(batches, t, self.window)
            # ----------------------------------------------------------------------------------------------------------

            self.step += 1
            self.skips.note(applied)
            self.screen.step(self.step)
            self.seconds = offset + time.monotonic() - self.began
            if logs:
                self.name_skipped()
                self.log(replace(t, step=self.step), log_every)
            asked, due, alarmed = self.world.agree(
                self.stop.asked is not None, time.monotonic() - saved > save_seconds, self.alarmed is not None
            )
            due = due or asked or alarmed or self.step in milestones
            if due:
                paused = time.monotonic()
                self.name_skipped()
                if self.step in milestones:
                    self.milestone(probes if self.step in probe_steps else None, self.total // count)
                self.save()
                if asked or alarmed or (self.step in milestones and self.step < self.total and time.monotonic() > self.next_report):
                    self.report()
                saved = time.monotonic()
                self.window.pause(saved - paused)
            self.end_on_alarm(alarmed)
            if asked:
                raise Preempted(f"stopped by {self.stop.asked or 'another rank'}; saved at step {self.step}, run the same command again")
        return self.finish()

    def update(self, batches: Iterator[dict[str, Tensor]], t: Progress, window: Window) -> Tensor:
        """One optimizer step: `accumulate` micro-batches, then everything moves, or nothing. 1 or 0, on the device."""
        r = self.recipe.optim
        set_lr(self.optimizer, warmup_cosine(linear_rule(r), r.min_lr, r.warmup, t))
        for group in self.optimizer.param_groups:
            if group["weight_decay"] and r.weight_decay_end is not None:
                group["weight_decay"] = cosine(r.weight_decay, r.weight_decay_end, t.fraction)
        return optimizer_step(
            self.net, self.optimizer, batches, lambda batch, i: self.net(batch, t), window,
            images=r.batch_size, micro=self.machine.accumulate, clip=r.clip,
            precision=self.precision, device=self.device, world=self.world,
            before=lambda applied: self.method.before_step(t, applied), after=lambda applied: self.method.after_step(t, applied),
        )  # fmt: skip

    def begin(self, probes: ProbeSet | None) -> None:
        """Plan a new run: how many steps, which floors, and a first checkpoint that also proves the disk."""
        floor, once = self.floors(probes) if probes else ({}, 0.0)
        self.total = self.plan(self.recipe.probe.probes * len(self.method.networks) * once)
        parameters = sum(p.numel() for p in self.method.student.parameters())
        about = describe_machine(self.device, self.precision) | {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "parameters": parameters, "ranks": self.world.size,
            "images": len(self.source), "data": self.source.fingerprint(), "recipe_hash": recipe_hash(self.recipe),
            "steps": self.total, "steps_per_epoch": self.steps_per_epoch,
            "mean": list(self.method.statistics[0]), "std": list(self.method.statistics[1]),
        }  # fmt: skip
        self.fixed = self.fixed_batch()
        if self.world.first:
            write_json(self.out / "machine.json", about)
            for kind, values in ({"floor": floor, "reference": self.method.references(self.fixed)}).items():
                if values:
                    self.write(kind, **values)
            self.picture()
        self.save()
        self.report()
        epochs = self.total / self.steps_per_epoch
        images = f"{len(self.source):,} images of {self.recipe.data}"
        self.screen.say(f"fresh start in {self.out}: {self.recipe.method}, {parameters / 1e6:.1f} M parameters, {images}")
        self.screen.say(f"{self.total:,} steps ({epochs:.1f} epochs) on {about['device']} in {self.precision}")
        if self.machine.accumulate > 1 and (why := self.method.whole_batch(self.recipe)):
            self.screen.say(f"note: with --accumulate the step is another one: {why}")
        clock = self.method.state(Progress(0, self.total, self.steps_per_epoch))
        if "half_life_steps" in clock:
            units = "half-life {half_life_steps:,.1f} steps, {half_life_images:,.0f} images, {half_life_epochs:.2f} epochs, "
            units += "{half_life_share:.2%} of the run"
            self.screen.say(f"momentum {clock['momentum']:.5f}: " + units.format(**clock))
        if floor:
            f = {k: v["linear"] for k, v in floor.items()}
            self.screen.say(f"floors of the linear probe: raw pixels {f['raw_pixels']:.1f} %, untrained {f['untrained']:.1f} %")

    def floors(self, probes: ProbeSet) -> tuple[dict[str, Scores], float]:
        """Scores that need no training, and the seconds that probing one network takes."""
        started = time.monotonic()
        untrained = probes.backbone(self.method.backbone("student"), self.device, self.precision)
        once = time.monotonic() - started
        self.method.train()
        return self.scores({"raw_pixels": probes.pixels(), "untrained": untrained}), once

    def scores(self, right: dict[str, Right]) -> dict[str, Scores]:
        """Percent right by network; image by image it is kept in probes/, for paired comparisons."""
        (self.out / "probes").mkdir(exist_ok=True)
        tensors = {f"{who}/{probe}": torch.from_numpy(hits) for who, of in right.items() for probe, hits in of.items()}
        replace_file(self.out / "probes" / f"{self.step:08d}.safetensors", save(tensors))
        return {who: percent(of) for who, of in right.items()}

    def plan(self, other_seconds: float) -> int:
        """The number of optimizer steps, from steps, epochs or time; `other_seconds` are needed for probing."""
        r = self.recipe
        if r.time is None:
            return r.total_steps(len(self.source))
        step_seconds = self.measure_step()
        left = parse_time(r.time) - (time.monotonic() - self.began) - other_seconds
        steps = max(1, int(0.95 * left / step_seconds))
        self.screen.say(f"{r.time} hold about {steps:,} steps of {1000 * step_seconds:.0f} ms")
        return self.world.from_first(steps)

    def measure_step(self, warm: int = 5, timed: int = 15) -> float:
        """Seconds an optimizer step takes here (median), measured on the real step; weights and optimizer are put back."""
        kept = copy.deepcopy(self.method.state_dict())
        window, times = Window(self.device), []
        batches = self.loader(0, warm + timed)
        for step in range(warm + timed):
            start = time.monotonic()
            self.update(batches, Progress(step, 10 * (warm + timed), self.steps_per_epoch), window)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.monotonic() - start)
        self.method.load_state_dict(kept)
        self.optimizer.state.clear()
        return sorted(times[warm:])[timed // 2]

    def name_skipped(self) -> None:
        """Name the batches that were skipped since the last look. Raises DivergedError."""
        for step in self.skips.look(self.step):
            self.skipped += 1
            keys = BatchSampler(len(self.source), self.recipe.optim.batch_size, seed=self.recipe.seed).keys(step)
            where = f"images {self.source.where(keys[0][1])} to {self.source.where(keys[-1][1])}"
            self.write(
                "event",
                text=f"step {step} was not finite and was skipped: epoch {keys[0][0]}, {where}",
                images=[k[1] for k in keys],
            )
            self.screen.say(f"step {step} was not finite and was skipped ({where})")

    # --- what one sees ------------------------------------------------------------------------------------------------

    def write(self, kind: str, **values: Any) -> None:
        if self.metrics:
            self.metrics.write(kind, self.step, **values)

    def log(self, t: Progress, log_every: int) -> None:
        line = self.window.read()
        if self.monitor:
            line |= self.monitor.read(line)
            self.call(self.alarms.at_log(t, line, self.monitor))
            if self.monitor.due(self.step, log_every) and (found := self.monitor.slow()):
                self.write("health", **found)
                self.call(self.alarms.at_health(t, found, self.monitor))
        line |= {"memory_gib": memory_gib(self.device), "seconds": self.seconds, "skipped": self.skipped}
        line |= {k: float(v) for k, v in self.method.state(t).items()}
        line |= {"lr": self.optimizer.param_groups[0]["lr"], "epoch": t.epoch, "images": self.step * self.recipe.optim.batch_size}
        self.write("train", **line)
        left = (self.total - self.step) * self.recipe.optim.batch_size / max(line["images_per_s"], 1e-9)
        self.screen.report(self.step, self.total, line, left, self.method.losses)

    def call(self, alarms: list[Alarm]) -> None:
        """Say and record what is wrong; with `--on-alarm stop` the run ends with this step, or before its first one."""
        for alarm in alarms:
            self.write("alarm", name=alarm.name, text=alarm.text)
            self.screen.say(f"alarm {alarm.name}: {alarm.text}")
            if self.machine.on_alarm == "stop":
                self.alarmed = self.alarmed or alarm

    def alarms_before(self) -> set[str]:
        """Alarms that the record holds already. They were seen: who runs the same command again wants the run to go on."""
        return called_before(read_metrics(self.out), self.step) if self.world.first else set()

    def end_on_alarm(self, alarmed: bool) -> None:
        """Raises AlarmError if rank 0 called an alarm that ends the run; the state is saved by then."""
        if alarmed:
            what = f"{self.alarmed.name}: {self.alarmed.text}" if self.alarmed else "called by rank 0"
            kept = f"stopped at step {self.step}, its checkpoint is kept; the same command goes on and does not stop for this alarm again"
            raise AlarmError(f"alarm {what}; {kept}")

    def fixed_batch(self) -> dict[str, Tensor]:
        """The first images with their masks, the same whenever one looks."""
        dataset = Images(self.source, self.method.views(), self.recipe.seed, self.recipe.images.channels)
        count = min(64, len(self.source))
        batch = collate([dataset[(0, i)] for i in range(count)])
        batch.pop("bad", None)
        return {k: v.to(self.device) for k, v in batch.items()}

    @torch.no_grad()
    def picture(self, count: int = 6) -> None:
        """Keep the reconstructions of the first images for the report."""
        tensors, facts = self.method.snapshot({k: v[:count] for k, v in self.fixed.items()})
        if tensors:
            (self.out / "snapshots").mkdir(exist_ok=True)
            tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
            replace_file(self.out / "snapshots" / f"{self.step:08d}.safetensors", save(tensors, facts | {"step": str(self.step)}))

    def milestone(self, probes: ProbeSet | None, since: int) -> None:
        """Probe, picture and export what there is; the milestone before was `since` steps ago."""
        if not self.world.first:
            return
        self.picture()
        if self.monitor and self.monitor.due_lidar(self.step, since) and (value := self.monitor.lidar(self.fixed)):
            self.write("health", lidar=value)
        if probes:
            found = {which: probes.backbone(self.method.backbone(which), self.device, self.precision) for which in self.method.networks}
            scores = self.scores(found)
            self.write("probe", **scores)
            text = ", ".join(f"{which} linear {s['linear']:.1f} % k-NN {s['knn']:.1f} %" for which, s in scores.items())
            self.screen.say(f"step {self.step:,}: {text}")
            self.probe = scores
            self.method.train()  # probing left the encoder in evaluation mode

    def save(self) -> None:
        """Checkpoint and exported backbones."""
        if not self.world.first:
            return
        save_checkpoint(self.out / "checkpoints", self.method, self.optimizer, self.state(), self.machine.keep)
        self.export()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        drift = self.method.state(Progress(self.step, self.total, self.steps_per_epoch)).get("drift")
        return {
            "step": self.step, "total_steps": self.total, "skipped": self.skipped, "seconds": self.seconds,
            "data": self.source.fingerprint(), "recipe_hash": recipe_hash(self.recipe), "circumstances": self.circumstances(),
            "drift": None if drift is None else float(drift),
        }  # fmt: skip

    def export(self) -> None:
        """A folder a network that timm loads."""
        if not self.world.first:
            return
        model = self.recipe.network.model
        architecture = model.removeprefix("timm:") if model.startswith("timm:") else PLAIN
        about = {
            "method": self.recipe.method,
            "step": self.step,
            "recipe_hash": recipe_hash(self.recipe),
            "data": self.source.fingerprint(),
        }
        for which in self.method.networks:
            export(self.method.backbone(which), self.out / "export" / which, about | {"network": which}, architecture)

    def report(self) -> None:
        """A page that cannot be drawn is no reason to lose a run."""
        if not self.world.first:
            return
        began = time.monotonic()
        try:
            write_report(self.out)
        except Exception as e:
            self.screen.say(f"note: report.html could not be written ({type(e).__name__}: {first_line(e)}); `rcmae report` tries again")
        now = time.monotonic()
        self.next_report = now + 20 * (now - began)  # milestones lie close in a short run: pages may take a twentieth of the time

    def finish(self) -> Result:
        """Say where everything is."""
        self.close()
        if self.world.first:
            self.report()
            summarise(self.out, self.screen)
            self.screen.say(f"{clock(self.seconds)} for {self.step:,} steps. Open {self.out / 'report.html'}")
            self.screen.say(
                f'Load the backbone: timm.create_model("local-dir:{self.out / "export" / self.method.networks[-1]}", pretrained=True)'
            )
        return Result(self.out, self.step, self.probe)

    def close(self) -> None:
        self.screen.stop()
        if self.metrics:
            self.metrics.close()
            self.metrics = None


def summarise(run: Path, screen: Screen) -> None:
    """The last table: the floors, then every network."""
    lines = read_metrics(run)
    floor = next((line for line in lines if line["kind"] == "floor"), None)
    probe = next((line for line in reversed(lines) if line["kind"] == "probe"), None)
    if floor and probe:
        rows = {"raw pixels": floor["raw_pixels"], "untrained encoder": floor["untrained"]}
        rows |= {name: scores for name, scores in probe.items() if isinstance(scores, dict)}
        table = [[name, f"{s['linear']:.1f}", f"{s['knn']:.1f}"] for name, s in rows.items()]
        screen.table(f"Percent right at step {probe['step']:,}, on mean-pooled patches", ["", "linear probe", "k-NN"], table)
