"""Pre-training: the loop. It never names a method; the step itself is framed.

rcmae pretrain [RECIPE] --data FOLDER --out RUN
"""

import contextlib
import copy
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader

from .config import Machine, Recipe, check, check_machine, parse_time, recipe_hash
from .data.dataset import BadFiles, Images, collate, measure_statistics, plain_errors, quiet_worker
from .data.sampler import BatchSampler, check_parts
from .data.sources import open_source
from .engine import distributed
from .engine.checkpoint import load_checkpoint, newest, replace_file, save_checkpoint
from .engine.console import Screen, clock
from .engine.distributed import World
from .engine.metrics import Metrics, read_metrics
from .engine.optim import adamw, linear_rule
from .engine.run import StopSignals, describe_machine, keep_freed_memory, memory_gib, owned, record_recipe, write_json
from .engine.schedules import Progress, cosine, warmup_cosine
from .errors import AlarmError, ConfigError, DataError, DivergedError, OutOfMemoryError, Preempted, ProcessError, first_line
from .interop.timm_export import PLAIN, export
from .lab.alarms import Alarm, Alarms, called_before
from .lab.monitor import Monitor
from .methods import METHODS, Method
from .models.backbone import usual_statistics
from .report import write_report
from .tasks.probe import ProbeSet, Right, Scores, percent, probe_set

PATIENCE = 5
"Non-finite steps in a row after which a run has diverged."

CONNECTION = ("Connection", "connection", "gloo", "NCCL")
"Words by which a plain RuntimeError tells that another rank is gone."


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
    world = distributed.start(device)
    out = Path(machine.out) if machine.out else Path("runs") / f"{recipe.method}-{Path(recipe.data.replace(':', '-')).name}"
    try:
        with owned(out) if world.first else contextlib.nullcontext(), Screen(world.first) as screen, StopSignals() as stop:
            with contextlib.closing(Run(recipe, replace(machine, out=out), device, world, screen, stop)) as run:
                return run.train()
    except torch.OutOfMemoryError as e:
        advice = "try --accumulate 2, --checkpointing or a smaller --batch-size"
        raise OutOfMemoryError(f"{device} ran out of memory at {memory_gib(device):.1f} GiB; {advice}") from e
    except RuntimeError as e:
        text = str(e)
        if "DataLoader worker" in text:
            raise ProcessError(f"a loader process was lost ({first_line(e)}); run the same command again") from e
        if isinstance(e, torch.distributed.DistError) or (world.size > 1 and any(word in text for word in CONNECTION)):
            raise ProcessError(f"another process of the run was lost ({first_line(e)}); run the same command again") from e
        if "can't allocate memory" in text:  # what torch says of the host's
            raise OutOfMemoryError("the host ran out of memory; try --accumulate 2, a smaller --batch-size or fewer --workers") from e
        raise
    finally:
        distributed.stop()


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
            same = {k: (v, self.circumstances()[k]) for k, v in state["circumstances"].items() if v != self.circumstances()[k]}
            self.screen.say(f"resumed from {path.name} of {self.total:,} steps in {self.out}")
            for k, (then, now) in same.items():
                self.screen.say(f"note: {k} was {then}, is {now}: the run goes on, but not to the same bit")
        m, step = self.machine, None if path is None else self.step
        self.metrics = Metrics(self.out, step, m.tensorboard, m.wandb) if self.world.first else None
        if path is not None:
            self.write("event", text=f"resumed from step {self.step}")

    def circumstances(self) -> dict[str, Any]:
        """What must not change if a resumed run is to be equal to the bit."""
        m = self.machine
        return {
            "torch": torch.__version__, "device": self.device.type, "precision": self.precision, "ranks": self.world.size,
            "accumulate": m.accumulate, "threads": torch.get_num_threads(), "compile": m.compile,
        }  # fmt: skip

    def loader(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Micro-batches of the steps from `start` to before `stop`, on the device."""
        r, m = self.recipe, self.machine
        dataset = Images(self.source, self.method.views(), r.seed, r.images.channels)
        sampler = BatchSampler(
            len(self.source), r.optim.batch_size, rank=self.world.rank, world=self.world.size, micro=m.accumulate,
            start=start, stop=stop, seed=r.seed,
        )  # fmt: skip
        workers = m.workers
        if workers is None:
            share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            workers = 0 if self.source.kind == "embedded" else min(8, max(1, share - 1))
        loader = DataLoader(
            dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers, worker_init_fn=quiet_worker,
            pin_memory=self.device.type == "cuda", prefetch_factor=4 if workers else None,
        )  # fmt: skip
        for batch in plain_errors(loader):
            self.bad.note(batch.pop("bad", []))
            yield {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}

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
        self.window = Window(self.device)
        self.monitor = Monitor(self.method, self.total) if self.world.first and self.machine.monitor else None
        self.alarms = Alarms(self.method, self.total, self.steps_per_epoch, self.alarms_before())
        self.alarmed: Alarm | None = None
        if self.monitor:
            self.call(self.alarms.at_start(Progress(self.step, self.total, self.steps_per_epoch), self.drift))
        self.end_on_alarm(*self.world.agree(self.alarmed is not None))
        recent: list[Tensor] = []
        in_a_row = 0
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
            recent.append(applied)
            self.screen.step(self.step)
            self.seconds = offset + time.monotonic() - self.began
            if logs:
                in_a_row, recent = self.check_finite(recent, in_a_row), []
                self.log(replace(t, step=self.step), log_every)
            asked, due, alarmed = self.world.agree(
                self.stop.asked is not None, time.monotonic() - saved > save_seconds, self.alarmed is not None
            )
            due = due or asked or alarmed or self.step in milestones
            if due:
                paused = time.monotonic()
                if recent:
                    in_a_row, recent = self.check_finite(recent, in_a_row), []
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

    def update(self, batches: Iterator[dict[str, Tensor]], t: Progress, window: "Window") -> Tensor:
        """One optimizer step: `accumulate` micro-batches, then everything moves, or nothing. 1 or 0, on the device."""
        r, micro = self.recipe.optim, self.machine.accumulate
        for group in self.optimizer.param_groups:
            group["lr"] = warmup_cosine(linear_rule(r), r.min_lr, r.warmup, t)
            if group["weight_decay"] and r.weight_decay_end is not None:
                group["weight_decay"] = cosine(r.weight_decay, r.weight_decay_end, t.fraction)
        total: dict[str, Tensor] = {}
        for i in range(micro):
            batch = window.wait(batches)
            with distributed.only_last(self.net, i == micro - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    losses = self.net(batch, t)
                (losses["loss"] / micro).backward()
            total = {k: total.get(k, 0) + v.detach() / micro for k, v in losses.items()}
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if r.clip:
            torch._foreach_mul_(gradients, (r.clip / (norm + 1e-6)).clamp(max=1.0))
        # Decided on the device: no step waits for the host, and no rank goes its own way.
        applied = self.world.everywhere((norm.isfinite() & total["loss"].isfinite()).float())
        self.method.before_step(t, applied)
        self.optimizer.found_inf = 1 - applied  # the fused optimizer leaves everything alone where this is 1
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(t, applied)
        window.add(total | {"grad_norm": norm}, applied, r.batch_size)
        return applied

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

    def check_finite(self, recent: list[Tensor], in_a_row: int) -> int:
        """Look at the steps since the last look; name skipped batches. Raises DivergedError after PATIENCE in a row."""
        for i, fine in enumerate(torch.stack(recent).tolist()):
            in_a_row = 0 if fine else in_a_row + 1
            if not fine:
                self.skipped += 1
                step = self.step - len(recent) + i
                keys = BatchSampler(len(self.source), self.recipe.optim.batch_size, seed=self.recipe.seed).keys(step)
                where = f"images {self.source.where(keys[0][1])} to {self.source.where(keys[-1][1])}"
                self.write(
                    "event",
                    text=f"step {step} was not finite and was skipped: epoch {keys[0][0]}, {where}",
                    images=[k[1] for k in keys],
                )
                self.screen.say(f"step {step} was not finite and was skipped ({where})")
            if in_a_row >= PATIENCE:
                last = newest(self.out / "checkpoints")
                advice = "lower --base-lr, set --clip 1, or try --precision fp32"
                raise DivergedError(f"{PATIENCE} steps in a row were not finite, up to step {self.step}; {last} is kept; {advice}")
        return in_a_row

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
        self.screen.report(self.step, self.total, line, left)

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


class Window:
    """Sums since the last log line, kept on the device; reading them is the only time the host waits for it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.applied: Tensor | float = 0.0
        self.images, self.waited, self.since = 0, 0.0, time.monotonic()

    def wait(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        start = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - start
        return batch

    def pause(self, seconds: float) -> None:
        """Time that was no training: probes, pictures, checkpoints."""
        self.since += seconds

    def add(self, values: dict[str, Tensor], applied: Tensor, images: int) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(applied > 0, value, 0.0)
        self.applied = self.applied + applied
        self.images += images

    def read(self) -> dict[str, float]:
        """Means over the applied steps and all ranks, images a second and the share of time that waited; then start anew."""
        applied = float(self.applied)
        sums = distributed.average(torch.stack(list(self.sums.values()))).tolist()
        means = {name: value / applied if applied else float("nan") for name, value in zip(self.sums, sums, strict=True)}
        seconds = time.monotonic() - self.since
        line = means | {"images_per_s": self.images / seconds, "data_wait": self.waited / seconds}
        self.clear()
        return line


def usual_log_every(total: int) -> int:
    """Steps between log lines: a hundred lines in a short run, in a long one a line every 50 steps."""
    return min(max(1, total // 100), 50)


def spread(total: int, count: int) -> set[int]:
    """`count` steps evenly over the run, the last one at its end."""
    return {round(total * (i + 1) / count) for i in range(count)} - {0}
