"""`rcmae lab gradients RUN...`: which past updates does the teacher of a real network revert, and only on the
images that caused them?

The consistency gradient c pulls the student S towards its teacher T. For any optimizer, while the momentum a
of the teacher is constant, S - T is a sum of past updates u:

    S_t - T_t = sum_i a^i u_t-i

so c can revert them, in the linear model in proportion to the similarity of the past inputs to the present
ones (`linear_model.py`). Here a run is continued in memory from its checkpoints nearest to 25, 50 and 75 % of
its length, with its batches and schedules. At the end of each block of steps, c is computed on the batches of
1, 3 and 10 steps ago, on other masks and crops of the last one, and on other images.

Signs: a number above 0 says that a step along -c *reverts* something past. For an update u that is the
cosine of c and u; for a gradient g or AdamW's first moment m, which updates oppose, that of c and -g or -m.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..config import changed
from ..engine.console import Screen
from ..errors import ConfigError
from ..methods.diagnostics import Sentence
from ..report.build import write_page
from ..report.curves import Line, by_depth, plot
from ..tasks.interval import LEVEL, Difference, detectable, different, equivalent, over_seeds, ratio_of_means
from .continuation import Continuation, Gradients, Past
from .linear_model import effective_beta
from .monitor import blocks, both_gradients
from .settings import GradientSettings

LAGS = (1, 3, 10)
"Steps between a past update and the measurement; a block has as many steps as the last one."

GAP = 10
"Steps between two blocks, about the memory of AdamW's first moment, so that blocks are nearly independent."

RUNS = 3
"With so many runs, the mean of a run is one value in the statistics, otherwise that of a block."

MARGIN = 0.05
"""Cosines below this count as near zero: such a c has less than 0.25 % (the square) of its squared length
along the past update."""

CONDITIONS = {
    "same": "same batch",
    "masks": "same images, new masks",
    "crops": "same images, new crops and masks",
    "other": "other images",
}
"What c is computed on."

TARGETS = {
    "sum": "S \N{MINUS SIGN} T, all past updates",
    "moment": "AdamW's first moment",
    **{f"update {k}": f"update {k} steps ago" if k > 1 else "last update" for k in LAGS},
    **{f"gradient {k}": f"gradient {k} steps ago" if k > 1 else "last gradient" for k in LAGS},
}
"What c may revert. The gradients are those of the reconstruction."

TESTED = ("sum", "moment", *(f"update {k}" for k in LAGS))
"The family of tests: under AdamW, updates are what S - T consists of."


def measure(s: Continuation) -> dict[str, Any]:
    """A block of steps, then what c reverts: cosines and parts by condition and target; |c| over the norm
    of the reconstruction gradient, and the similarity of features, by condition."""
    past: dict[int, Past] = {}
    for k in range(max(LAGS), 0, -1):
        if k in LAGS:
            past[k] = s.recorded()
        else:
            s.train()
    last, draw = past[1], 1_000_000 + s.step  # an epoch that no run reaches
    again = s.batch([(draw, i) for _, i in last.keys])
    masks = {name: again[name] for name in last.batch if name != "image"}
    # Those that were not seen for the longest time, in random order.
    order = np.random.Generator(np.random.Philox(key=draw)).random(len(s.used))
    others = np.lexsort((order, s.used))[: len(last.keys)]
    batches = {
        **{("same", k): past[k].batch for k in LAGS},
        ("masks", 1): last.batch | masks,
        ("crops", 1): again,
        ("other", 0): s.batch([(draw, int(i)) for i in others]),
    }
    targets = {f"update {k}": past[k].update for k in LAGS} | common_targets(s, past)
    features = {condition: features_of(s, batch) for (condition, k), batch in batches.items() if k < 2}
    row: dict[str, Any] = {"block_end": s.step, "cosine": {}, "part": {}, "ratio": {}, "by_block": {}}
    for (condition, k), batch in batches.items():
        r, c = both_gradients(s.method, batch)
        # On the batch of an earlier step, only what that step left; on other images, all.
        names = [t for t in targets if not k or t.endswith(f" {k}") or (k == 1 and " " not in t)]
        products = {name: Products(c, targets[name]) for name in names}
        row["cosine"].setdefault(condition, {}).update({n: p.cosine() for n, p in products.items()})
        row["part"].setdefault(condition, {}).update({n: p.part() for n, p in products.items()})
        if k < 2:
            if condition == "other":
                kappa = -products["moment"].part()
                row["beta1"] = effective_beta(s.recipe.optim.betas[0], s.gamma, kappa)
            row["ratio"][condition] = Products(c, r).norm_ratio()
            row["by_block"][condition] = {
                block: products["sum"].cosine(chosen) for block, chosen in blocks(c).items()
            }
    row["similarity"] = {name: _similarity(features["same"], f) for name, f in features.items()}
    return row


def common_targets(s: Continuation, past: dict[int, Past]) -> dict[str, Gradients]:
    """Past gradients and the first moment, negated (updates oppose them), and S - T."""
    student = dict(s.method.student.named_parameters())
    assert s.method.teacher is not None  # it compares
    teacher = dict(s.method.teacher.model.named_parameters())
    return {
        **{f"gradient {k}": {n: -g for n, g in past[k].gradient.items()} for k in LAGS},
        "moment": {n: -s.optimizer.state[student[n]]["exp_avg"] for n in past[1].update},
        "sum": {n: student[n].detach() - teacher[n] for n in past[1].update},
    }


@torch.no_grad()
def features_of(s: Continuation, batch: dict[str, Tensor]) -> Tensor:
    """Mean over the student's tokens, [b d]."""
    return s.method.encode(batch).float().mean(1)


class Products:
    """Scalar products of a consistency gradient c and a target x, by tensor."""

    def __init__(self, c: Gradients, x: Gradients):
        def products(a: Gradients, b: Gradients) -> dict[str, float]:
            return {name: (a[name].double() * b[name].double()).sum().item() for name in a}

        self.cc, self.cx, self.xx = products(c, c), products(c, x), products(x, x)

    def cosine(self, names: Sequence[str] | None = None) -> float:
        """Of all tensors, or of these; 0 if one of the two vanishes."""
        cc, cx, xx = (sum(p[n] for n in names or p) for p in (self.cc, self.cx, self.xx))
        return cx / max((cc * xx) ** 0.5, 1e-30)

    def part(self) -> float:
        """The component of c along x, in units of x."""
        return sum(self.cx.values()) / max(sum(self.xx.values()), 1e-30)

    def norm_ratio(self) -> float:
        """|c| / |x|."""
        return (sum(self.cc.values()) / max(sum(self.xx.values()), 1e-30)) ** 0.5


def _similarity(a: Tensor, b: Tensor) -> float:
    """Mean cosine of paired features, centered on their common mean, without which all would be similar."""
    center = torch.cat([a, b]).mean(0)
    return F.cosine_similarity(a - center, b - center, 1).mean().item()


# --- a study ------------------------------------------------------------------------------------------------


def run_gradients(
    runs: Sequence[str], setting: GradientSettings, report: Callable[[str], object] = lambda text: None
) -> dict[str, Any]:
    """Measure all runs: what was measured, the rows of all blocks, their summaries and the findings.

    Raises ConfigError for runs that differ in more than the seed."""
    starts: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    first = None
    for run in runs:
        s = Continuation(run, setting, batches=max(LAGS) + 1)
        recipe = changed(s.recipe, seed=0)
        if first not in (None, recipe) or run in [start["run"] for start in starts]:
            raise ConfigError(f"{run} and {runs[0]} must differ in the seed, and in nothing else")
        first = recipe
        for path, raised in s.starts((setting.settle or 0) + setting.blocks * (max(LAGS) + GAP)):
            s.start(path, raised)
            start = {
                "run": run,
                "step": s.step,
                "total": s.total,
                "kind": "new" if path is None else "raised" if raised else "continued",
                "lr": s.lr,
                "half_life": s.half_life,
                "settle": s.settle,
            }
            starts.append(start)
            report(f"{run} at step {s.step:,} of {s.total:,}: {setting.blocks} blocks of {max(LAGS)} steps")
            rows += [start | row for row in _measured(s)]
    about = {
        "starts": starts,
        "recipe": s.recipe.method,
        "blocks": setting.blocks,
        "batch_size": s.recipe.optim.batch_size,
        "fits_recipe": s.fits_recipe,
        "gamma": s.gamma,
        "beta1": s.recipe.optim.betas[0],
        "whole_images": s.recipe.images.crop_scale == (1.0, 1.0) and not s.recipe.images.flip,
        "unit": "run" if len(runs) >= RUNS else "block",
        "units": len(runs) if len(runs) >= RUNS else len(rows),
    }
    return analyzed(about, rows)


def _measured(s: Continuation) -> Iterator[dict[str, Any]]:
    """The blocks from a checkpoint."""
    length = max(LAGS) + GAP
    with Screen(True).progress("settling, then measuring", s.settle + s.setting.blocks * length) as tick:
        for k in range(s.settle):
            s.train()
            tick(k + 1)
        for block in range(s.setting.blocks):
            for _ in range(GAP if block else 0):
                s.train()
            yield measure(s)
            tick(s.settle + (block + 1) * length)


def analyzed(about: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All results of the page from the rows of the blocks."""
    result = {
        "about": about,
        "targets": [target_line(rows, about["unit"], target) for target in TARGETS],
        "conditions": [condition_line(rows, about["unit"], name) for name in CONDITIONS],
        "points": points(rows, about["unit"]),
        "beta1": over_seeds(per_unit(rows, about["unit"], "beta1")),
        "by_block": {
            name: {
                block: float(np.mean([row["by_block"][name][block] for row in rows]))
                for block in rows[0]["by_block"][name]
            }
            for name in ("same", "other")
        },
    }
    return result | {"findings": findings(result, rows), "rows": rows}


def per_unit(rows: list[dict[str, Any]], unit: str, *path: str) -> Float[np.ndarray, " n"]:
    """A value of every block, given by its keys, or its mean over the blocks of each run."""
    values = np.array([functools.reduce(lambda value, key: value[key], path, row) for row in rows])
    if unit == "block":
        return values
    runs = np.array([row["run"] for row in rows])
    return np.array([values[runs == run].mean() for run in dict.fromkeys(runs)])


def target_line(rows: list[dict[str, Any]], unit: str, target: str) -> dict[str, Any]:
    """A target's cosines on the same batch and on other images, their paired difference, and the fraction of
    c's component along the target on the same batch that is there on other images too (None if none is
    reverted on the same batch)."""
    same, other = (per_unit(rows, unit, "cosine", name, target) for name in ("same", "other"))
    part, other_part = (per_unit(rows, unit, "part", name, target) for name in ("same", "other"))
    reverted = over_seeds(part).low > 0
    return {
        "target": target,
        "what": TARGETS[target],
        "same": over_seeds(same),
        "other": over_seeds(other),
        "contrast": over_seeds(same - other),
        "fraction": ratio_of_means(other_part, part) if reverted else None,
    }


def condition_line(rows: list[dict[str, Any]], unit: str, name: str) -> dict[str, Any]:
    """Similarity of features, cosines with what the last step left, and ratio of the norms, on a batch."""
    values = {key: per_unit(rows, unit, key, name) for key in ("similarity", "ratio")}
    values |= {
        target: per_unit(rows, unit, "cosine", name, target) for target in ("update 1", "moment", "sum")
    }
    intervals = {key: over_seeds(value) for key, value in values.items()}
    return {"condition": name, "what": CONDITIONS[name]} | intervals


def points(rows: list[dict[str, Any]], unit: str) -> list[dict[str, Any]]:
    """The line of S - T at each point of the run, in percent of its length."""
    percents = [round(100 * row["step"] / row["total"]) for row in rows]
    lines = []
    for percent in sorted(set(percents)):
        chosen = [row for row, p in zip(rows, percents, strict=True) if p == percent]
        if len(per_unit(chosen, unit, "step")) > 1:
            lines.append({"percent": percent} | target_line(chosen, unit, "sum"))
    return lines


# --- findings -----------------------------------------------------------------------------------------------


def findings(result: dict[str, Any], rows: list[dict[str, Any]]) -> list[Sentence]:
    """What the tests show, the most important first."""
    about = result["about"]
    notes = start_notes(about)
    if about["gamma"] == 0:
        why = "The consistency loss has weight 0 in this run"
        return [("note", f"{why}, so there is nothing to judge.")]
    if not any(row["ratio"]["other"] for row in rows):
        why = "The consistency gradient is zero on every batch: teacher and student are the same"
        return [("note", f"{why}, so there is nothing to judge.")]
    lines = {line["target"]: line for line in result["targets"]}
    b, low, high = result["beta1"][:3]
    times = (b - about["beta1"]) / (1 - about["beta1"])
    momentum = (
        f"On other images, the consistency gradient along AdamW's first moment is {times:+.1f} times that "
        f"moment, which acts as a beta1 of {b:.3f} ({low:.3f} to {high:.3f}) instead of {about['beta1']:g}."
    )
    words = verdicts([lines[target] for target in TESTED])
    return [
        conditionality(lines["sum"]["fraction"]),
        *notes,
        *[(tone, f"{lines[t]['what']}: {text}") for t, (tone, text) in zip(TESTED, words, strict=True)],
        ("note", momentum),
    ]


def start_notes(about: dict[str, Any]) -> list[Sentence]:
    """What was not as in the run."""
    notes = []
    kinds = {start["kind"]: start for start in about["starts"]}
    if start := kinds.get("raised"):
        notes.append(
            f"The learning rate was set to {start['lr']:.2g} again, from the newest checkpoint (step "
            f"{start['step']:,} of {start['total']:,}), so this is about a network that is heated up, not "
            "about the run; one made with --keep 99 has checkpoints from which it can be continued"
        )
    if start := kinds.get("new"):
        notes.append(f"A new network, at a constant learning rate of {start['lr']:.2g}: not that of a run")
    if not about["fits_recipe"]:
        notes.append(
            f"The batches have {about['batch_size']} images, not the recipe's number, at a learning rate in "
            "proportion"
        )
    return [("note", f"{note}.") for note in notes]


def conditionality(fraction: tuple[float, float, float] | None) -> Sentence:
    """Whether more than half of the removal depends on the images, by the interval of the fraction that does
    not."""
    if fraction is None:
        text = "on the same batch none is shown, so there is no fraction of it on other images"
        return "note", f"Whether the removal of past updates is conditional is inconclusive: {text}."
    mean, low, high = fraction
    text = (
        f"of what the consistency gradient removes of S \N{MINUS SIGN} T on the same batch, it removes "
        f"{mean:.0%} on other images too ({low:.0%} to {high:.0%})"
    )
    rest = "the rest is conditional" if high < 1 else "no conditional part is shown"
    if low >= 0.5:
        return "note", f"The removal of past updates is mostly unconditional: {text}; {rest}."
    if high <= 0.5:
        return "good", f"The removal of past updates is mostly conditional: {text}."
    return "note", f"Whether the removal of past updates is mostly conditional is inconclusive: {text}."


def verdicts(lines: list[dict[str, Any]]) -> list[Sentence]:
    """For a family of targets, whether c reverts more of each on the same batch than on other images, and
    whether anything on those; both families corrected by Holm's method."""
    contrasts, others = ([Difference(*line[key]) for line in lines] for key in ("contrast", "other"))
    clear, alike = different(contrasts), equivalent(contrasts, MARGIN)
    reverted, small = different(others), equivalent(others, MARGIN)
    level = LEVEL / max(1, int((~clear).sum()))
    sentences: list[Sentence] = []
    for i, (d, other) in enumerate(zip(contrasts, others, strict=True)):
        if clear[i]:
            text = f"reverted {'more' if d.mean > 0 else 'less'} on the same batch than on other images"
        elif alike[i]:
            text = f"reverted alike on the same batch and on other images, within {MARGIN}"
        else:
            text = "inconclusive whether reverted more on the same batch than on other images"
        text += f" (difference {_interval(d)}"
        text += ")" if clear[i] else f"; 80 % power at {detectable(d, level):.3f})"
        if small[i]:
            text += f"; near zero on other images, within {MARGIN}"
        elif reverted[i]:
            text += "; reverted on other images too" if other.mean > 0 else "; continued on other images"
        else:
            text += "; inconclusive on other images"
        good = bool(clear[i] and d.mean > 0 and small[i])
        sentences.append(("good" if good else "note", f"{text} ({_interval(other)})."))
    return sentences


def _interval(d: Sequence[float]) -> str:
    mean, low, high = (f"{v:+.3f}".replace("-", "\N{MINUS SIGN}") for v in d[:3])
    return f"{mean}, {low} to {high}"


# --- the page -----------------------------------------------------------------------------------------------


def write_gradients_page(result: dict[str, Any], out: Path) -> Path:
    """The page of a study: see `write_page`."""
    updates = [line for line in result["targets"] if line["target"].startswith("update")]
    colors = {"same": "memory2", "other": "baseline"}
    by_lag = []
    for name, color in colors.items():
        mean, low, high = ([line[name][k] for line in updates] for k in range(3))
        by_lag.append(Line(CONDITIONS[name], color, LAGS, mean, spread=(low, high)))
    layers = {CONDITIONS[name]: (color, result["by_block"][name]) for name, color in colors.items()}
    svgs = {
        "lags": plot(
            by_lag,
            {"": 0.0},
            "reverted (cosine)",
            markers=True,
            xlabel="steps since the update",
            ticks={k: str(k) for k in LAGS},
        ),
        "layers": by_depth(layers, "reverted (cosine)", {"": 0.0}),
    }
    runs = [Path(run).name for run in dict.fromkeys(start["run"] for start in result["about"]["starts"])]
    title = f"What the teacher reverts: {runs[0] if len(runs) == 1 else f'{len(runs)} runs'}"
    return write_page(out, "gradients", "rcmae.lab", result, svgs, title=title, tested=TESTED, lags=LAGS)
