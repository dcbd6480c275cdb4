"""The duration of an optimizer step on this machine, and the number of steps that fit into a given time."""

import copy
import time

import torch

from .config import how_many, parse_time
from .data.loader import processes
from .engine.schedules import Progress
from .engine.step import LogWindow
from .errors import ConfigError
from .trainer import Trainer

MIN_STEPS = 10
"Number of steps below which a time is refused."

STEP_FRACTION = 0.95
"Fraction of the remaining time planned for steps; the rest is for logs and checkpoints."


def steps_within(run: Trainer, budget: str, probing: float, began: float) -> int:
    """The steps that fit into a time such as "2h", less `probing` seconds for probes and the time since
    `began`.

    Raises ConfigError if these are too few, with a sufficient time.
    """
    # All ranks must use the same numbers.
    step, setup, probing = run.world.broadcast((measure_step(run), time.monotonic() - began, probing))
    steps = int(STEP_FRACTION * (parse_time(budget) - setup - probing) / step)
    if steps < MIN_STEPS:
        need = setup + probing + 100 * step / STEP_FRACTION
        raise ConfigError(
            f"--time {budget} is enough for {how_many(max(steps, 0), 'step')}: setup took {setup:.0f} s, the "
            f"probes of the run take {probing:.0f} s and a step {step:.2f} s; give --time "
            f"{-int(-need // 60)}m for 100 steps" + (", or fewer --probes" if probing else "")
        )
    run.screen.say(f"{budget} is enough for about {steps:,} steps of {1000 * step:.0f} ms")
    return at_most(run, steps)


def at_most(run: Trainer, steps: int) -> int:
    """The steps that a time is enough for, without those beyond which no gain is known; says so."""
    most = run.recipe.most_steps(len(run.images))
    if steps > most:
        run.screen.say(
            f"a time stops at {most:,} steps on so few images, not at {steps:,}: no gain is known beyond "
            f"{most / run.steps_per_epoch:,.0f} epochs; --steps can be larger"
        )
    return min(steps, most)


FEWEST, LONGEST = 4, 15.0
"Steps that are measured at least, and seconds after which no more than these are."


def measure_step(run: Trainer, warm: int = 5, timed: int = 15) -> float:
    """Mean seconds of an optimizer step after warm-up, a quarter of the steps at most, with the time in which
    it waits for images. Restores the weights and the optimizer state."""
    # What the loader processes prepare before the first step must not count.
    workers = processes(run.images, run.runtime.workers)
    warm, timed = max(warm, workers), max(timed, workers)
    weights = copy.deepcopy(run.model.state_dict())
    run.window, times = LogWindow(run.device), []
    run.batches = run.loader(0, warm + timed)
    with run.screen.progress("measuring the step time", warm + timed) as tick:
        for step in range(warm + timed):
            start = time.monotonic()
            run.update(Progress(step, 10 * (warm + timed), run.steps_per_epoch))
            if run.device.type == "cuda":
                torch.cuda.synchronize(run.device)
            times.append(time.monotonic() - start)
            tick(step + 1)
            # All ranks must make the same number of steps.
            if run.world.broadcast(sum(times) > LONGEST and step + 1 >= FEWEST):
                break
    run.model.load_state_dict(weights)
    run.optimizer.state.clear()
    run.batches = iter(())  # ends the loader processes
    warm = min(warm, len(times) // 4)
    return sum(times[warm:]) / len(times[warm:])
