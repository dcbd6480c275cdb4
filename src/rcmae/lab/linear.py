"""`rcmae lab linear`: the paper's explanation of the mean teacher, run on the linear model, as a table and a page."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..report.build import template
from ..report.curves import Line, plot, standalone
from .linear_model import (
    OPTIMIZERS,
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
"(name, gamma, alpha) of the arms that are compared."

NAMES = {"sgd": "SGD", "momentum": "SGD + momentum 0.9", "adamw": "AdamW"}

REFERENCE = {
    ("sgd", 0.5): (-0.999, -0.055, 0.0), ("sgd", 0.9): (-0.982, -0.031, 0.0), ("sgd", 0.996): (-0.877, -0.017, 0.0),
    ("momentum", 0.9): (-0.729, -0.014, 0.0), ("momentum", 0.996): (-0.757, -0.015, 0.0),
}  # fmt: skip
"""Cosine with the previous reconstruction gradient by (optimizer, alpha), in the order of RELATIONS: ours, not the paper's,
derived and measured apart before this code was written (width 256, rank 16, 25 % seen). Other draws of the inputs differ in the
second digit."""


@dataclass(frozen=True)
class Setting:
    """Inputs of low rank, of which a quarter is seen, as masked images are. Defaults are those of our reference values."""

    width: int = 256
    "values of an input"
    rank: int = 16
    "dimensions that the inputs really have"
    kept: float = 0.25
    "share of the values that is seen"
    steps: int = 400
    "steps a run; every other one is looked at"
    rate: float = 0.1
    "step size in units of 1 / mean |x~|^2: the share of its own error that a step of plain descent corrects (momentum 0.9: a tenth)"
    adamw_lr: float = 1e-3
    "AdamW's step size, which has no such unit"
    seeds: int = 3
    "runs, each with its own inputs"


def inputs(setting: Setting, relation: Relation, seed: int) -> Iterator[tuple[Float[Tensor, "1 d"], Float[Tensor, "1 d"]]]:
    """Pairs (x, x~), one sample each. Every odd one relates to the one before it: the same input and mask, another input and
    mask, or another input of which other values are seen, so that the two have nothing in common."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    basis, _ = np.linalg.qr(rng.standard_normal((setting.width, setting.rank)))
    kept = round(setting.kept * setting.width)
    x = mask = np.zeros(0)
    for step in range(setting.steps):
        odd = step % 2 == 1
        if not (odd and relation == "same"):
            free = np.flatnonzero(mask == 0) if odd and relation == "orthogonal" else np.arange(setting.width)
            x = basis @ rng.standard_normal(setting.rank) / np.sqrt(setting.rank)
            mask = np.zeros(setting.width)
            mask[rng.permutation(free)[:kept]] = 1
        yield torch.from_numpy(x)[None], torch.from_numpy(x * mask)[None]


def measure(setting: Setting, relation: Relation, alpha: float, optimizer: str, seed: int) -> dict[str, float]:
    """One run. Means over the odd steps: cosine of the consistency gradient with the reconstruction gradient of the step before
    and with that of its own step, and the ratio of the two gradients' norms."""
    lr = setting.adamw_lr if optimizer == "adamw" else setting.rate / setting.kept * (0.1 if optimizer == "momentum" else 1)
    start = torch.zeros(setting.width, setting.width, dtype=torch.float64)
    found, before = [], None
    for i, step in enumerate(descend(inputs(setting, relation, seed), start, alpha, lr=lr, optimizer=optimizer)):
        c, r = step.consistency.flatten(), step.reconstruction.flatten()
        if i % 2 and before is not None:
            found.append([F.cosine_similarity(c, before, 0), F.cosine_similarity(c, r, 0), c.norm() / r.norm()])
        before = r
    return dict(zip(("previous", "present", "ratio"), torch.tensor(found).mean(0).tolist(), strict=True))


def correction_table(setting: Setting) -> list[dict[str, float | str | None]]:
    """Every optimizer, alpha and relation: medians over the seeds, the range of the cosine with the step before, its reference."""
    rows = []
    for optimizer in OPTIMIZERS:
        for alpha in ALPHAS:
            for relation, reference in zip(RELATIONS, REFERENCE.get((optimizer, alpha), (None,) * 3), strict=True):
                found = [measure(setting, relation, alpha, optimizer, seed) for seed in range(setting.seeds)]
                middle = {k: float(np.median([f[k] for f in found])) for k in found[0]}
                low, high = (bound(f["previous"] for f in found) for bound in (min, max))
                about = {"optimizer": optimizer, "alpha": alpha, "relation": relation, "reference": reference}
                rows.append(about | middle | {"low": low, "high": high})
    return rows


def gate(setting: Setting, alpha: float = 0.9, points: int = 21) -> tuple[list[float], list[float], list[float]]:
    """One past step, then an input that agrees with it to a degree: (cosine of the two seen inputs, share of the past
    gradient that L_c takes back by autograd, the same by the proposition)."""
    rng = np.random.Generator(np.random.Philox(key=1))
    first, across = (torch.from_numpy(v) for v in np.linalg.qr(rng.standard_normal((setting.width, 2)))[0].T)
    target = torch.from_numpy(rng.standard_normal(setting.width))
    lr, similar, measured, predicted = setting.rate, [], [], []
    for angle in np.linspace(0, np.pi / 2, points):
        second = math.cos(angle) * first + math.sin(angle) * across
        past, present = descend(
            iter([(target[None], first[None]), (target[None], second[None])]),
            torch.zeros(setting.width, setting.width).double(),
            alpha,
            lr=lr,
        )
        g = past.reconstruction
        s = present.student.clone().requires_grad_()
        ((second @ s.T - second @ present.teacher.T) ** 2).sum().div(2).backward()
        similar.append(math.cos(angle))
        measured.append((-(s.grad * g).sum() / (g * g).sum() / (lr * alpha)).item())
        closed = gated_consistency(
            (first @ past.student.T - target)[None, None], first[None, None], second[None], lr, torch.tensor([alpha], dtype=torch.float64)
        )
        predicted.append((-(closed * g).sum() / (g * g).sum() / (lr * alpha)).item())
    return similar, measured, predicted


def study(setting: Setting = Setting()) -> dict:
    """Everything the page shows, as plain numbers."""
    rates = np.geomspace(1e-3, 1.2, 60).tolist()
    similar, measured, predicted = gate(setting)
    stiff, slow = 1.0, 0.01
    trade, descent = {}, {}
    for name, gamma, alpha in ARMS:
        limit = stability_limit(gamma, alpha)
        sizes = [size for size in np.geomspace(0.02, 0.6, 25).tolist() if size < limit]
        trade[name] = {
            "speed": [1 - contraction(size * slow, gamma, alpha) for size in sizes],
            "student": [stationary_variance(size * stiff, gamma, alpha, size**2)[0] for size in sizes],
            "teacher": [stationary_variance(size * stiff, gamma, alpha, size**2)[1] for size in sizes],
        }
        best = 0.99 * limit
        descent[name] = {"limit": limit, "steps": steps_to(0.01, best * slow, gamma, alpha), "errors": errors(best * slow, gamma, alpha)}
    return {
        "setting": asdict(setting), "table": correction_table(setting),
        "gate": {"similarity": similar, "measured": measured, "predicted": predicted},
        "momentum": {"rates": rates, "alphas": {str(a): [effective_momentum(r, 1.0, a) for r in rates] for a in ALPHAS}},
        "trade": trade, "descent": descent, "slow": slow,
    }  # fmt: skip


def errors(rate: float, gamma: float, alpha: float, steps: int = 1000, every: int = 10) -> list[float]:
    """The student's error of one mode without noise, from 1, at every tenth step."""
    m, state, found = companion(rate, gamma, alpha), torch.ones(2, dtype=torch.float64), []
    for step in range(steps + 1):
        if step % every == 0:
            found.append(abs(state[0].item()))
        state = m @ state
    return found


def write_page(found: dict, out: Path) -> Path:
    """Write linear.json, every figure as an SVG of its own, and linear.html, which shows them all; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = figures(found)
    (out / "linear.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, svg in drawn.items():
        (out / f"{name}.svg").write_text(standalone(svg), encoding="utf-8")
    page = template("linear.html.j2", "rcmae.lab").render(
        title="What a mean teacher does, in a linear model", names=NAMES, figures=drawn, **found
    )
    (out / "linear.html").write_text(page, encoding="utf-8")
    return out / "linear.html"


def figures(found: dict) -> dict[str, str]:
    """Inline SVGs by name."""
    colours = dict(zip((name for name, *_ in ARMS), ("floor", "memory1", "memory2", "memory3"), strict=True))
    g, m = found["gate"], found["momentum"]
    gate_lines = [
        Line("formula", "memory1", g["similarity"], g["predicted"], "band"),
        Line("autograd", "ink", g["similarity"], g["measured"], "o"),
    ]
    momentum = [Line(f"alpha {a}", colours[f"alpha {a}"], m["rates"], values) for a, values in m["alphas"].items()]
    trade = [Line(name, colours[name], t["speed"], t["student"]) for name, t in found["trade"].items()]
    descent = [Line(name, colours[name], range(0, 10 * len(d["errors"]), 10), d["errors"]) for name, d in found["descent"].items()]
    rare = "h, step size × eigenvalue: rare directions left, common ones right"
    return {
        "gate": plot(gate_lines, ylabel="share taken back", xlabel="likeness (cosine) of the present and the past input"),
        "momentum": plot(momentum, {"no momentum": 0.0}, "effective momentum", xlabel=rare, xlog=True),
        "trade": plot(trade, ylabel="noise left (variance)", log=True, xlabel="progress a step in a slow direction", xlog=True),
        "descent": plot(descent, {"1 %": 0.01}, "error left", log=True),
    }
