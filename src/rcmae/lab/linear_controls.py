"""Is it the dependence on the input that makes a teacher useful? Control runs in the linear model, with noise
in the targets, so that damping can pay.

The teacher is compared with no teacher, with a pull towards the teacher that has the same norm in every step
but does not depend on the input, with an optimizer whose momentum is lowered as much as the teacher lowers
it, and with a learning rate that makes steps as short as the teacher does.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..tasks.interval import judged, over_seeds
from .linear_model import OPTIMIZERS, Batch, Matrix, Optimizer, descend, effective_beta

BETA, GAMMA = 0.9, 1.0

CONTROLS = {
    "none": "no teacher",
    "ungated": "an ungated pull",
    "beta": "a lower momentum",
    "rate": "shorter steps",
}
"""What the teacher is compared with. Plain descent has no momentum to lower; the rate of the last one is
given by the teacher's."""


@dataclass(frozen=True)
class ControlSettings:
    """Inputs of low rank, a quarter of which is visible, and targets with noise."""

    width: int = 16
    rank: int = 4
    visible: int = 4
    batch: int = 8
    lengths: tuple[int, ...] = (100, 400)
    "steps after which the error is measured: while progress limits it, and while noise does"
    noise: float = 0.25
    "standard deviation of the noise of each target value, which is that of the values themselves"
    alpha: float = 0.9
    tuning: int = 4
    "seeds on which each arm's best rate is chosen"
    seeds: int = 12
    "further seeds, from which the results are"
    rates: int = 5
    """rates per arm, each twice the one before; the best one is that of the parabola through the three around
    the lowest error"""

    def grid(self, optimizer: Optimizer) -> list[float]:
        """The rates of an optimizer."""
        lowest = {"sgd": 0.25, "momentum": 0.025, "adamw": 4e-3}[optimizer]
        return [lowest * 2**k for k in range(self.rates)]


class Problem:
    """Inputs of all seeds, tuning ones first: the same for every arm."""

    def __init__(self, setting: ControlSettings):
        self.setting = s = setting
        self.runs = s.tuning + s.seeds
        g = torch.Generator().manual_seed(0)
        draws = torch.randn(self.runs, s.width, s.rank, generator=g, dtype=torch.float64)
        self.basis = torch.linalg.qr(draws)[0] / s.rank**0.5
        covariance = self.basis @ self.basis.mT
        one, two = s.visible / s.width, s.visible * (s.visible - 1) / (s.width * (s.width - 1))
        diagonal = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
        self.seen = two * covariance + (one - two) * diagonal  # mean x~ x~'
        self.best = torch.linalg.solve(self.seen, one * covariance, left=False)
        self.inputs = list(self._inputs())

    def _inputs(self) -> Iterator[tuple[Batch, Batch]]:
        """(target, x~) of every step."""
        s, g = self.setting, torch.Generator().manual_seed(1)
        shape = self.runs, s.batch
        for _ in range(max(s.lengths)):
            x = torch.randn(*shape, s.rank, generator=g, dtype=torch.float64) @ self.basis.mT
            ranks = torch.rand(*shape, s.width, generator=g).argsort(-1).argsort(-1)
            noise = s.noise * torch.randn(*shape, s.width, generator=g, dtype=torch.float64)
            yield x + noise, x * (ranks < s.visible)

    def excess(self, student: Matrix) -> Float[Tensor, " runs"]:
        """The mean squared error of each seed on fresh inputs without noise, above that of the best
        matrix."""
        gap = student - self.best
        return torch.einsum("sij,sjk,sik->s", gap, self.seen, gap)


@dataclass(frozen=True)
class Outcome:
    """After some steps: the error of each seed and, over the second half of these steps, the mean norm of the
    updates and kappa, <c, m> / <m, m> for the consistency gradient c and the optimizer's average m of past
    gradients."""

    error: Float[Tensor, " runs"]
    update: float
    kappa: float


def trained(
    problem: Problem,
    optimizer: Optimizer,
    rate: float,
    gamma: float = 0.0,
    gated: bool = True,
    beta: float = BETA,
    lengths: tuple[int, ...] | None = None,
) -> dict[int, Outcome]:
    """A run of every seed: what it has after each of the lengths, by default those of the setting."""
    s = problem.setting
    moment = torch.zeros(problem.runs, s.width, s.width, dtype=torch.float64)
    kappas, updates, outcomes = [], [], {}
    lengths = lengths or s.lengths
    inputs = itertools.islice(problem.inputs, max(lengths))
    for k, step in enumerate(descend(inputs, moment, s.alpha, gamma, rate, optimizer, beta, gated), 1):
        squares = moment.square().sum((1, 2)).clamp_min(1e-30)
        kappas.append(((step.consistency * moment).sum((1, 2)) / squares).mean().item())
        updates.append(step.update.norm(dim=(1, 2)).mean().item())
        moment = beta * moment + (1 - beta) * (step.reconstruction + gamma * step.consistency)
        if k in lengths:
            error = problem.excess(step.student + step.update).nan_to_num(torch.inf)
            means = (float(np.mean(values[k // 2 :])) for values in (updates, kappas))
            outcomes[k] = Outcome(error, *means)
    return outcomes


def run_controls(
    setting: ControlSettings = ControlSettings(), tick: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """The errors of the teacher and its controls for each optimizer and length, each at its best rate, and
    the verdicts."""
    problem, done = Problem(setting), 0
    Trials = dict[float, dict[int, Outcome]]

    def tried(optimizer: Optimizer, **arm: Any) -> Trials:
        nonlocal done
        outcomes = {}
        for rate in setting.grid(optimizer):
            outcomes[rate] = trained(problem, optimizer, rate, **arm)
            tick(done := done + 1)
        return outcomes

    def best(optimizer: Optimizer, outcomes: Trials, length: int, **arm: Any) -> tuple[float, Outcome]:
        rates = list(outcomes)
        errors = [outcomes[rate][length].error[: setting.tuning].mean().log().item() for rate in rates]
        i = int(np.argmin(errors))
        if not 0 < i < len(rates) - 1 or not np.isfinite(errors[i + 1]):
            return rates[i], outcomes[rates[i]][length]
        before, lowest, after = errors[i - 1 : i + 2]
        rate = rates[i] * 2 ** ((before - after) / (2 * (before - 2 * lowest + after)))
        return rate, trained(problem, optimizer, rate, lengths=(length,), **arm)[length]

    rows = []
    for optimizer in OPTIMIZERS:
        kinds: dict[str, dict[str, Any]] = {
            "teacher": {"gamma": GAMMA},
            "none": {},
            "ungated": {"gamma": GAMMA, "gated": False},
        }
        outcomes = {arm: tried(optimizer, **kind) for arm, kind in kinds.items()}
        for length in setting.lengths:
            arms = {arm: best(optimizer, outcomes[arm], length, **kind) for arm, kind in kinds.items()}
            rate, teacher = arms["teacher"]
            beta = effective_beta(BETA, GAMMA, teacher.kappa)
            if optimizer != "sgd":
                lowered = {"beta": max(beta, 0.0)}
                few = tried(optimizer, lengths=(length,), **lowered)
                arms["beta"] = best(optimizer, few, length, **lowered)
            plain = trained(problem, optimizer, rate, lengths=(length,))[length]
            shorter = rate * teacher.update / plain.update
            arms["rate"] = shorter, trained(problem, optimizer, shorter, lengths=(length,))[length]
            for arm, (used, outcome) in arms.items():
                error, reference = (o.error[setting.tuning :].numpy() for o in (outcome, teacher))
                row: dict[str, Any] = {"optimizer": optimizer, "steps": length, "arm": arm, "rate": used}
                row |= {"error": over_seeds(error), "beta": beta if arm == "beta" else None}
                if arm != "teacher":
                    row["gain"] = over_seeds(100 * (error - reference) / error)
                rows.append(row)
    compared = [row for row in rows if "gain" in row]
    for row, verdict in zip(compared, judged([row["gain"] for row in compared], unit="%"), strict=True):
        row["verdict"] = verdict.word
    return {"rows": rows, "comparisons": len(compared)}


def trials(setting: ControlSettings = ControlSettings()) -> int:
    """The number of times that `run_controls` calls `tick`."""
    return (3 * len(OPTIMIZERS) + 2 * len(setting.lengths)) * setting.rates
