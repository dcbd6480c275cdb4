"""`rcmae lab linear`: the paper's explanation of the mean teacher, computed on the linear model, as a table
and a page."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..engine.console import ShowProgress, no_progress
from ..report.build import write_page
from ..report.curves import Line, plot
from ..tasks.interval import level_note
from .linear_controls import CONTROLS, ControlSettings, run_controls, trials
from .linear_model import (
    OPTIMIZERS,
    Optimizer,
    companion,
    contraction,
    descend,
    effective_momentum,
    gated_consistency,
    stability_limit,
    stationary_variance,
    steps_to,
)

Relation = Literal["same", "different", "orthogonal"]
RELATIONS: tuple[Relation, ...] = ("same", "different", "orthogonal")
ALPHAS = (0.5, 0.9, 0.996)
ARMS = (("no teacher", 0.0, 0.5), *((f"alpha {alpha}", 1.0, alpha) for alpha in ALPHAS))
"(name, gamma, alpha) of the compared arms."

NAMES: dict[Optimizer, str] = {"sgd": "SGD", "momentum": "SGD + momentum 0.9", "adamw": "AdamW"}

REFERENCE = {
    ("sgd", 0.5): (-0.999, -0.055, 0.0),
    ("sgd", 0.9): (-0.982, -0.031, 0.0),
    ("sgd", 0.996): (-0.877, -0.017, 0.0),
    ("momentum", 0.9): (-0.729, -0.014, 0.0),
    ("momentum", 0.996): (-0.757, -0.015, 0.0),
}
"""Cosine with the previous reconstruction gradient by (optimizer, alpha), in the order of RELATIONS. Our
values, not the paper's, derived and measured independently of this code (width 256, rank 16, 25 % visible).
Other random draws differ in the second digit."""


@dataclass(frozen=True)
class LinearSettings:
    """Inputs of low rank, a quarter of which is visible, as in masked images. The defaults are those of the
    reference values."""

    width: int = 256
    "values per input"
    rank: int = 16
    "rank of the inputs"
    visible_fraction: float = 0.25
    "fraction of the values that is visible"
    steps: int = 400
    "steps per run; every other one is measured"
    rate: float = 0.1
    """step size in units of 1 / mean |x~|^2: the fraction of the error on an input that a step of gradient
    descent corrects (with momentum 0.9: a tenth of it)"""
    adamw_lr: float = 1e-3
    "AdamW's step size, which has no such unit"
    seeds: int = 3
    "runs, each with different inputs"


def inputs(
    setting: LinearSettings, relation: Relation, seed: int
) -> Iterator[tuple[Float[Tensor, "1 d"], Float[Tensor, "1 d"]]]:
    """Pairs (x, x~) of one sample each. Every odd pair is related to the one before it: the same input and
    mask, another input and mask, or another input with other visible values, so that the two have nothing in
    common."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    basis, _ = np.linalg.qr(rng.standard_normal((setting.width, setting.rank)))
    visible = round(setting.visible_fraction * setting.width)
    x = mask = np.zeros(0)
    for step in range(setting.steps):
        odd = step % 2 == 1
        if not (odd and relation == "same"):
            free = np.flatnonzero(mask == 0) if odd and relation == "orthogonal" else np.arange(setting.width)
            x = basis @ rng.standard_normal(setting.rank) / np.sqrt(setting.rank)
            mask = np.zeros(setting.width)
            mask[rng.permutation(free)[:visible]] = 1
        yield torch.from_numpy(x)[None], torch.from_numpy(x * mask)[None]


def measure(
    setting: LinearSettings, relation: Relation, alpha: float, optimizer: Optimizer, seed: int
) -> dict[str, float]:
    """One run. Means over the odd steps: cosine of the consistency gradient with the reconstruction gradients
    of the previous and of the present step, and the ratio of the norms of both gradients."""
    lr = (
        setting.adamw_lr
        if optimizer == "adamw"
        else setting.rate / setting.visible_fraction * (0.1 if optimizer == "momentum" else 1)
    )
    start = torch.zeros(setting.width, setting.width, dtype=torch.float64)
    measured, previous = [], None
    for i, step in enumerate(
        descend(inputs(setting, relation, seed), start, alpha, lr=lr, optimizer=optimizer)
    ):
        c, r = step.consistency.flatten(), step.reconstruction.flatten()
        if i % 2 and previous is not None:
            cosines = F.cosine_similarity(c, previous, 0), F.cosine_similarity(c, r, 0)
            measured.append([*cosines, c.norm() / r.norm()])
        previous = r
    return dict(zip(("previous", "present", "ratio"), torch.tensor(measured).mean(0).tolist(), strict=True))


def correction_table(setting: LinearSettings, tick: Callable[[int], None]) -> list[dict[str, Any]]:
    """A row for every optimizer, alpha and relation: medians over the seeds, the range of the cosine with the
    previous step, and its reference value."""
    rows = []
    for optimizer in OPTIMIZERS:
        for alpha in ALPHAS:
            references = REFERENCE.get((optimizer, alpha), (None,) * 3)
            for relation, reference in zip(RELATIONS, references, strict=True):
                runs = [measure(setting, relation, alpha, optimizer, seed) for seed in range(setting.seeds)]
                cosines = [run["previous"] for run in runs]
                about = {"optimizer": optimizer, "alpha": alpha, "relation": relation, "reference": reference}
                medians = {k: float(np.median([run[k] for run in runs])) for k in runs[0]}
                rows.append(about | medians | {"low": min(cosines), "high": max(cosines)})
                tick(len(rows))
    return rows


def gate(setting: LinearSettings) -> tuple[list[float], list[float], list[float]]:
    """One step with alpha 0.9, then inputs of varying similarity to its input: (cosine of both inputs,
    fraction of the past gradient that L_c reverts according to autograd, the same according to the
    proposition)."""
    rng, alpha = np.random.Generator(np.random.Philox(key=1)), 0.9
    first, orthogonal = (
        torch.from_numpy(v) for v in np.linalg.qr(rng.standard_normal((setting.width, 2)))[0].T
    )
    target = torch.from_numpy(rng.standard_normal(setting.width))
    lr, similar, measured, predicted = setting.rate, [], [], []
    for angle in np.linspace(0, np.pi / 2, 21):
        second = math.cos(angle) * first + math.sin(angle) * orthogonal
        past, present = descend(
            iter([(target[None], first[None]), (target[None], second[None])]),
            torch.zeros(setting.width, setting.width).double(),
            alpha,
            lr=lr,
        )
        g = past.reconstruction
        s = present.student.clone().requires_grad_()
        loss = ((second @ s.T - second @ present.teacher.T) ** 2).sum() / 2
        (gradient,) = torch.autograd.grad(loss, s)
        similar.append(math.cos(angle))
        measured.append((-(gradient * g).sum() / (g * g).sum() / (lr * alpha)).item())
        closed = gated_consistency(
            (first @ past.student.T - target)[None, None],
            first[None, None],
            second[None],
            lr,
            torch.tensor([alpha], dtype=torch.float64),
        )
        predicted.append((-(closed * g).sum() / (g * g).sum() / (lr * alpha)).item())
    return similar, measured, predicted


def run_linear(
    setting: LinearSettings = LinearSettings(),
    progress: ShowProgress = no_progress,
    controls: ControlSettings = ControlSettings(),
) -> dict[str, Any]:
    """All results on the page, as plain numbers."""
    cells = len(OPTIMIZERS) * len(ALPHAS) * len(RELATIONS)
    with progress("measuring the corrections", cells) as tick:
        table = correction_table(setting, tick)
    with progress("training the controls", trials(controls)) as tick:
        compared = run_controls(controls, tick)
    rates = np.geomspace(1e-3, 1.2, 60).tolist()
    similar, measured, predicted = gate(setting)
    slow = 0.01
    trade, descent = {}, {}
    for name, gamma, alpha in ARMS:
        limit = stability_limit(gamma, alpha)
        sizes = [size for size in np.geomspace(0.02, 0.6, 25).tolist() if size < limit]
        speed = [1 - contraction(size * slow, gamma, alpha) for size in sizes]
        student, teacher = zip(*(stationary_variance(h, gamma, alpha, h**2) for h in sizes), strict=True)
        trade[name] = {"speed": speed, "student": list(student), "teacher": list(teacher)}
        fastest = 0.99 * limit
        descent[name] = {
            "limit": limit,
            "steps": steps_to(0.01, fastest * slow, gamma, alpha),
            "errors": errors(fastest * slow, gamma, alpha),
        }
    return {
        "setting": asdict(setting),
        "table": table,
        "controls": compared | {"setting": asdict(controls), "sentences": control_sentences(compared)},
        "gate": {"similarity": similar, "measured": measured, "predicted": predicted},
        "momentum": {
            "rates": rates,
            "alphas": {str(a): [effective_momentum(r, 1.0, a) for r in rates] for a in ALPHAS},
        },
        "trade": trade,
        "descent": descent,
        "slow": slow,
    }


def control_sentences(controls: dict[str, Any]) -> list[str]:
    """For each control, the verdicts on the teacher's error against it, by length and optimizer."""
    sentences = []
    for arm, description in CONTROLS.items():
        rows = [row for row in controls["rows"] if row["arm"] == arm]
        words = {row["verdict"] for row in rows}
        if len(words) == 1:
            text = f"{words.pop()} in all {len(rows)} comparisons"
        else:
            cases = (f"{NAMES[row['optimizer']]}, {row['steps']} steps: {row['verdict']}" for row in rows)
            text = "; ".join(cases)
        sentences.append(f"Teacher against {description}: {text}.")
    return sentences


def errors(rate: float, gamma: float, alpha: float) -> list[float]:
    """The student's error in a mode at every tenth of 1,000 steps, from 1 and without noise."""
    m, state, values = companion(rate, gamma, alpha), torch.ones(2, dtype=torch.float64), []
    for step in range(1001):
        if step % 10 == 0:
            values.append(abs(state[0].item()))
        state = m @ state
    return values


def write_linear_page(result: dict[str, Any], out: Path) -> Path:
    """The page of an experiment: see `write_page`."""
    title = "The effect of a mean teacher in a linear model"
    arms = {"teacher": "teacher"} | CONTROLS
    note = level_note(result["controls"]["comparisons"])
    more = {"title": title, "names": NAMES, "arms": arms, "note": note}
    return write_page(out, "linear", "rcmae.lab", result, figures(result), **more)


def figures(result: dict[str, Any]) -> dict[str, str]:
    """The figures of the page as inline SVGs, by name."""
    colors = dict(
        zip((name for name, *_ in ARMS), ("baseline", "memory1", "memory2", "memory3"), strict=True)
    )
    g, m = result["gate"], result["momentum"]
    gate_lines = [
        Line("formula", "memory1", g["similarity"], g["predicted"], "band"),
        Line("autograd", "ink", g["similarity"], g["measured"], "o"),
    ]
    momentum = [
        Line(f"alpha {a}", colors[f"alpha {a}"], m["rates"], values) for a, values in m["alphas"].items()
    ]
    trade = [Line(name, colors[name], t["speed"], t["student"]) for name, t in result["trade"].items()]
    descent = [
        Line(name, colors[name], range(0, 10 * len(d["errors"]), 10), d["errors"])
        for name, d in result["descent"].items()
    ]
    xlabel = "h, step size × eigenvalue"
    return {
        "gate": plot(
            gate_lines, ylabel="reverted fraction", xlabel="cosine of the present and the past input"
        ),
        "momentum": plot(momentum, {"no momentum": 0.0}, "effective momentum", xlabel=xlabel, xlog=True),
        "trade": plot(
            trade,
            ylabel="remaining noise (variance)",
            log=True,
            xlabel="progress per step in a slow direction",
            xlog=True,
        ),
        "descent": plot(descent, {"1 %": 0.01}, "remaining error", log=True),
    }
