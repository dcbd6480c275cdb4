"""`rcmae evaluate worth-it`: did pre-training pay? Fine-tuning from it and from scratch, at several shares of the labels and seeds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from safetensors.numpy import load_file

from ..config import how_many
from ..engine import distributed
from ..engine.console import clock
from ..engine.run import write_json
from ..errors import ConfigError
from .context import place, stem
from .evaluate import backbones, evaluate, networks
from .evaluation.base import Evaluation
from .evaluation.finetune import Finetune
from .evaluation.worth import Worth
from .interval import interval

SCRATCH = "from scratch"


def arms(name: str, against: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """What is fine-tuned, by its name in the table: (backbone, which network of it). Scratch comes first, all are compared with it."""
    own = {which: (name, which) for which in networks(name, "both")}
    others = {other: (other, "teacher") for other in against}
    if twice := own.keys() & others.keys() | ({SCRATCH} & others.keys()):
        raise ConfigError(f"{twice.pop()!r} is compared twice")
    return {SCRATCH: (f"scratch:{name}", "teacher")} | own | others


def worth_it(name: str, task: Worth, tuning: Finetune, options: Evaluation, say: Callable[[str], None]) -> dict[str, Any]:
    """Make the runs that are missing; the same command goes on where it stopped. Returns rows, and in words whether it paid.

    Every arm has the same labels, order and augmentation within a seed. Raises the errors of `rcmae.errors`.
    """
    task.check_settings(name, tuning, options)
    with distributed.joined(distributed.pick_device(options.device)) as world:
        return _worth_it(name, task, tuning, options, say if world.first else lambda text: None)


def _worth_it(name: str, task: Worth, tuning: Finetune, options: Evaluation, say: Callable[[str], None]) -> dict[str, Any]:
    out = (options.out or place(name, options)) / "worth-it"
    chosen, rows = arms(name, task.against), []
    for backbone, which in chosen.values():
        backbones(backbone, replace(options, which=which))  # type: ignore[arg-type]  # one that cannot be loaded is told before hours of training
    trainings, shares = len(task.percents) * task.seeds * len(chosen), ", ".join(f"{percent:g}" for percent in task.percents)
    say(f"{trainings} trainings: {', '.join(chosen)}, on {shares} % of the labels, {task.seeds} seeds each")
    begun, took = 0, {percent: [] for percent in task.percents}
    for percent in task.percents:
        hits: dict[str, list[Bool[np.ndarray, " m"]]] = {arm: [] for arm in chosen}
        images = 0
        for seed in range(1, task.seeds + 1):
            for number, (arm, (backbone, which)) in enumerate(chosen.items()):
                own = replace(options, labels=percent, seed=seed, which=which, out=out / f"{number}-{_plain(arm)}")  # type: ignore[arg-type]
                begun += 1
                left = _left(took, task.seeds * len(chosen))
                say(f"training {begun} of {trainings}{left}: {arm}, {percent:g} % of the labels, seed {seed}")
                for found in evaluate(backbone, tuning, own):
                    images = found["train_images"]
                    took[percent].append(found["seconds"])
                    file = place(backbone, own) / f"{stem('finetune', found['network'], own)}.safetensors"
                    hits[arm].append(load_file(file)["right"].astype(bool))
        if not images:  # not the first rank
            continue
        for arm, of in hits.items():
            row = {"arm": arm, "percent": percent, "images": images, "seeds": [100 * float(h.mean()) for h in of]}
            rows.append(row | ({} if arm == SCRATCH else {"gain": interval(of, hits[SCRATCH])}))
    content = {"backbone": name, "data": options.data, "seeds": task.seeds, "rows": rows, "said": verdict(rows)}
    if rows:
        write_json(out / "worth-it.json", content)
    return content


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence for each arm and share of the labels: paid, did not pay, or can't tell."""
    said = []
    for row in rows:
        if "gain" in row:
            gain, low, high = row["gain"]
            word = "pre-training paid" if low > 0 else "pre-training did not pay: it is worse" if high < 0 else "can't tell"
            start = next(r for r in rows if r["arm"] == SCRATCH and r["percent"] == row["percent"])
            text = f"With {row['percent']:g} % of the labels ({how_many(row['images'], 'image')}), {row['arm']}: {word}"
            numbers = f"{np.mean(row['seeds']):.1f} % right, {np.mean(start['seeds']):.1f} % from scratch"
            said.append(f"{text} ({numbers}; {gain:+.1f} points, {low:+.1f} to {high:+.1f}).")
    return said


def _left(took: dict[float, list[float]], each: int) -> str:
    """In words, the time that is left: of `each` trainings at every share of the labels, some took so many seconds.

    A share that none was made of is guessed from the last one, in proportion.
    """
    left, known = 0.0, None
    for percent, seconds in took.items():
        if seconds:
            known = percent, sum(seconds) / len(seconds)
        if known:
            left += (each - len(seconds)) * known[1] * percent / known[0]
    return f", about {clock(left)} left" if known else ""


def _plain(arm: str) -> str:
    return Path("".join(c if c.isalnum() else "-" for c in arm)).name.strip("-")
