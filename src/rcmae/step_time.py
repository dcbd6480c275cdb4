"""How long an optimizer step takes on this machine, and how many fit into a given time."""

import copy
import time

import torch

from .config import how_many, parse_time
from .engine.schedules import Progress
from .engine.step import LogWindow
from .errors import ConfigError
from .trainer import Trainer

FEWEST = 10
"Steps below which a time is refused."

PART = 0.95
"Of the time that is left for steps, what is planned; the rest is for logs and checkpoints."


def steps_within(run: Trainer, given: str, probing: float, began: float) -> int:
    """The steps that fit into a time such as "2h", of which `probing` seconds are for probes, and the time since `began` is gone.

    Raises ConfigError when these are too few, with what would hold them.
    """
    step = measure_step(run)
    step, setup, probing = run.world.from_first((step, time.monotonic() - began, probing))  # all ranks decide alike
    steps = int(PART * (parse_time(given) - setup - probing) / step)
    if steps < FEWEST:
        need = setup + probing + 100 * step / PART
        text = f"--time {given} holds {how_many(max(steps, 0), 'step')}: setting up took {setup:.0f} s, the probes of the run take "
        text += f"{probing:.0f} s and a step {step:.2f} s; give --time {-int(-need // 60)}m, which holds 100 steps"
        raise ConfigError(text + (", or fewer --probes" if probing else ""))
    run.screen.say(f"{given} hold about {steps:,} steps of {1000 * step:.0f} ms")
    return steps


def measure_step(run: Trainer, warm: int = 5, timed: int = 15) -> float:
    """Seconds an optimizer step takes here (median), measured on the real step; weights and optimizer are put back."""
    kept = copy.deepcopy(run.model.state_dict())
    run.window, times = LogWindow(run.device), []
    run.batches = run.loader(0, warm + timed)
    with run.screen.progress("measuring the time of a step", warm + timed) as tick:
        for step in range(warm + timed):
            start = time.monotonic()
            run.update(Progress(step, 10 * (warm + timed), run.steps_per_epoch))
            if run.device.type == "cuda":
                torch.cuda.synchronize(run.device)
            times.append(time.monotonic() - start)
            tick(step + 1)
    run.model.load_state_dict(kept)
    run.optimizer.state.clear()
    run.batches = iter(())  # its loader processes end
    return sorted(times[warm:])[timed // 2]
