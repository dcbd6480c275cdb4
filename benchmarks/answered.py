"""The seven claims of the paper's abstract, and what this package's results say of each: `python -m
benchmarks.answered` draws docs/img/answered-a.png to -g.png.

All numbers come from results/*.json; a claim whose experiment has no results yet has no figure. `table`, for
`benchmarks.tables`, is the section of docs/rcmae-answered.md.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks import ROOT, claim, evaluation, markdown, pictures
from rcmae.engine.run import read_json
from rcmae.lab.gradients import conditionality
from rcmae.report.curves import LIGHT
from rcmae.tasks.interval import Difference, Verdict, judged

RESULTS = ROOT / "results"


class Row(NamedTuple):
    """A line of a figure: a value, with its interval if it has one."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None


class Answer(NamedTuple):
    """What the results say of a claim."""

    word: str
    text: str
    rows: Sequence[Row] = ()
    axis: str = ""
    neutral: float = 0.0
    "the value of no effect"


NOT_RUN = Answer("not run yet", "Its experiment is planned below.")


def _of(name: str) -> dict[str, Any]:
    """The results of an experiment; empty if there are none."""
    return read_json(RESULTS / f"{name}.json")


TITLES = {"mae": "MAE", "dino": "DINO", "ibot": "iBOT", "msn": "MSN", "mocov3": "MoCo v3"}


def _title(name: str) -> str:
    """A method's name as its authors write it, in the name of an arm."""
    method, comma, rest = name.partition(",")
    return TITLES.get(method, method) + comma + rest


def _row(label: str, d: Difference) -> Row:
    return Row(label, *d[:3])


def linear() -> Answer:
    """(a) In a linear model the teacher removes previous gradients, conditionally on similarity. It is taken
    to hold if the cosines are below -0.5 for the same input, within 0.1 for others, and 0 for orthogonal ones
    in every row of the experiment."""
    results = _of("lab_linear")
    names = {"same": "the same input", "different": "another input", "orthogonal": "an orthogonal input"}
    lines = [line for line in results["table"] if line["optimizer"] == "sgd"]
    rows = [
        Row(
            f"{names[line['relation']]}, momentum {line['alpha']:g}",
            line["previous"],
            line["low"],
            line["high"],
        )
        for line in sorted(lines, key=lambda line: [*names].index(line["relation"]))
    ]
    by_relation = {
        relation: [abs(line["previous"]) for line in results["table"] if line["relation"] == relation]
        for relation in names
    }
    same, different, none = (by_relation[relation] for relation in names)
    holds = min(same) > 0.5 and max(different) < 0.1 and max(none) < 0.01
    text = (
        f"The cosine of the consistency gradient and the previous gradient is {-max(same):.2f} to "
        f"{-min(same):.2f} on the same input, {-max(different):.2f} to {-min(different):.2f} on another one, "
        f"and {max(none):.2f} on an orthogonal one, with SGD, momentum and AdamW. "
        + " ".join(results["controls"]["sentences"])
    )
    return Answer(
        "confirmed in the linear model" if holds else "refuted",
        text,
        rows,
        "cosine with the previous gradient",
    )


def network() -> Answer:
    """(b) So it acts as a conditional momentum regularizer: in a network."""
    results = _of("lab_gradients")
    lines = {line["target"]: line for line in results["targets"]}
    chosen = {"sum": "all past updates", "moment": "AdamW's moment", "update 1": "last update"}
    rows = [
        Row(f"{text}, {where}", *lines[target][key][:3])
        for target, text in chosen.items()
        for key, where in (("same", "same batch"), ("other", "other images"))
    ]
    fraction = lines["sum"]["fraction"]
    unconditional = fraction is not None and fraction[1] >= 0.5
    conditional = fraction is not None and fraction[2] <= 0.5
    word = "inconclusive"
    if unconditional or conditional:
        word = "a momentum regularizer, but not conditional" if unconditional else "confirmed"
    b, low, high = results["beta1"][:3]
    text = (
        f"{conditionality(fraction)[1]} It acts as a beta1 of {b:.2f} ({low:.2f} to {high:.2f}) instead of "
        f"{results['about']['beta1']:g}."
    )
    if verdicts := _of("mechanism").get("verdicts"):
        text += " " + " ".join(verdicts)
    return Answer(word, text, rows, "cosine: how much of it is reverted")


def convergence() -> Answer:
    """(c) It converges faster than self-distillation."""
    results = _of("race")
    name = "rcmae"
    (ours,) = (row for row in results["rows"] if row["arm"] == name)
    others = [row["arm"] for row in results["rows"] if not row["arm"].startswith((name, "mae"))]
    gains = {_title(other): Difference(*ours["linear against"][other]) for other in others}
    verdicts = dict(zip(gains, judged(gains.values()), strict=True))
    text = (
        f"Linear probe after {results['about']['budget']} for each, {results['about']['seeds']} seeds, "
        f"each by its bundled recipe, RC-MAE against {_listed(verdicts)}."
    )
    rows = [_row(other, gain) for other, gain in gains.items()]
    return Answer(_confirmed(verdicts.values()), text, rows, "points of RC-MAE above the method")


def memory() -> Answer:
    """(d) It needs less memory than self-distillation."""
    rows, lowest = [], []
    by_model: dict[str, dict[str, float]] = {}
    for row in _of("cost")["rows"]:
        by_model.setdefault(row["model"], {})[row["name"]] = row["peak"]
    for model, peaks in by_model.items():
        ratios = {name: peak / peaks["rcmae"] for name, peak in peaks.items() if name != "rcmae"}
        size = model.removeprefix("vit_").partition("_")[0]
        rows += [Row(f"{_title(name)}, ViT-{size[0].upper()}", ratio) for name, ratio in ratios.items()]
        lowest.append(
            min(ratio for name, ratio in ratios.items() if name in ("dino", "ibot", "msn", "mocov3"))
        )
    text = (
        "Peak memory of a step, predicted by counting what autograd saves: each of DINO, iBOT, MSN and MoCo "
        f"v3 needs at least {min(lowest):.1f} times that of RC-MAE, with the same batch and its own views."
    )
    word = "confirmed, by prediction" if min(lowest) > 1 else "refuted"
    return Answer(word, text, rows, "memory, in units of RC-MAE's", neutral=1.0)


def robustness() -> Answer:
    """(e) It is more robust than MAE."""
    results, rows, verdicts = _of("evaluation"), [], {}
    families = [evaluation.compared(results, "MAE", labels) for labels in evaluation.FAMILIES]
    for (task, percent, measure), (gain, verdict) in sorted(
        (item for family in families for item in family.items()), key=lambda item: item[0][1]
    ):
        if task == "finetune":
            label = f"{measure}, {percent} % of the labels"
            rows.append(_row(label, gain))
            if measure != "clean":
                verdicts[label] = verdict
    text = (
        f"Fine-tuned, {len(results['seeds'])} seeds, the teacher against MAE: {_listed(verdicts)}. Corrected "
        f"within families of {' and '.join(str(len(family)) for family in families)} comparisons, those of "
        "[evaluation.md](evaluation.md); rates were not tuned for each method. The figure has the clean "
        "accuracy too."
    )
    return Answer(_confirmed(verdicts.values()), text, rows, "points of accuracy above MAE")


def classification() -> Answer:
    """(f) It is better than MAE in classification."""
    rows, texts, words = [], [], []
    digits, drawings = _of("claim"), _of("pictures")
    if len(digits.get("seeds", ())) == len(claim.SEEDS):
        texts.append(f"Bundled digits (A): {claim.answer(digits)}")
        against = digits["fine-tuned"]["against"][claim.MAE]
        rows += [Row(f"digits, {arm}", *result["gain"][:3]) for arm, result in against.items()]
        words += [result["verdict"] for result in against.values()]
    if len(drawings.get("seeds", ())) == len(pictures.SEEDS):
        tuned = {k: v for k, v in drawings["against"][pictures.MAE].items() if pictures.LINEAR not in k}
        verdicts = {name: result["verdict"] for name, result in tuned.items()}
        texts.append(f"Drawings (C): {_listed(verdicts)}.")
        rows += [Row(name, *result["gain"][:3]) for name, result in tuned.items()]
        words += [*verdicts.values()]
    if not words:
        return NOT_RUN
    return Answer(_confirmed(words), " ".join(texts), rows, "points of accuracy above MAE")


def detection() -> Answer:
    """(g) It is better than MAE in detection and segmentation."""
    rows, gains = [], {}
    for row in _of("detection")["rows"]:
        for other in ("random init", "MAE"):
            if (against := row["box AP"].get(f"against {other}")) is not None:
                label = f"{row['backbone']} against {other}, {row['scenes']:,} scenes"
                rows.append(Row(label.replace("RC-MAE, teacher", "RC-MAE"), *against[:3]))
                if row["backbone"] == "MAE":
                    gains[f"{row['scenes']:,} scenes"] = Difference(*against)
    rows = [row for row in rows if not row.label.startswith(("random", "RC-MAE, student"))]
    verdicts = dict(zip(gains, judged(gains.values(), unit="AP"), strict=True))
    ranks = any(str(verdict).startswith("better") for verdict in verdicts.values())
    text = f"Box AP on bundled scenes, MAE against random initialization: {_listed(verdicts)}."
    if not ranks:
        text += " A set on which MAE does not help cannot rank backbones, so it says nothing of RC-MAE."
    return Answer("no verdict here" if not ranks else "see docs/detection.md", text, rows, "box AP")


def _listed(verdicts: Mapping[str, Verdict | str]) -> str:
    return "; ".join(f"{name}: {verdict}" for name, verdict in verdicts.items())


def _confirmed(verdicts: Iterable[Verdict | str]) -> str:
    words = {str(verdict).split()[0] for verdict in verdicts}
    if words == {"better"}:
        return "confirmed on this set"
    if "better" in words:
        return "confirmed in part, on this set"
    return "refuted on this set" if words <= {"worse", "equivalent"} else "inconclusive"


class Claim(NamedTuple):
    """A claim of the abstract, in our words."""

    words: str
    command: str
    answer: Callable[[], Answer]
    remains: str
    "what it would take to know it of the paper's setting"


CLAIMS = {
    "a": Claim(
        "In a linear model, the teacher removes previous gradient directions, conditionally on the "
        "similarity of features.",
        "rcmae lab linear",
        linear,
        "nothing: the model is the paper's",
    ),
    "b": Claim(
        "So the teacher is a conditional momentum regularizer.",
        "rcmae lab gradients",
        network,
        "the same measurement on ViT-B and ImageNet, with the paper's half-life of 173 steps",
    ),
    "c": Claim(
        "RC-MAE converges faster than self-distillation.",
        "rcmae compare race",
        convergence,
        "100 epochs of ImageNet with ViT-S for each of five methods, three seeds",
    ),
    "d": Claim(
        "RC-MAE needs less memory than self-distillation.",
        "rcmae compare cost",
        memory,
        "minutes: the peaks of one step on a GPU (`benchmarks/gpu.sh`)",
    ),
    "e": Claim(
        "RC-MAE is more robust than MAE.",
        "python -m benchmarks.evaluation",
        robustness,
        "ViT-B, 800 epochs, three seeds of each, then ImageNet-C, -A, -R and -Sketch",
    ),
    "f": Claim(
        "RC-MAE is better than MAE in classification.",
        "python -m benchmarks.claim, python -m benchmarks.pictures",
        classification,
        "ViT-B, 800 epochs of ImageNet, three seeds of each",
    ),
    "g": Claim(
        "RC-MAE is better than MAE in detection and instance segmentation.",
        "python -m benchmarks.detection",
        detection,
        "the backbones of (f) on COCO",
    ),
}


def table() -> str:
    """The answers to all claims, and below each its numbers and its figure."""
    answers = {letter: each.answer() for letter, each in CLAIMS.items()}
    rows = [
        [f"({letter})", each.words, f"**{answers[letter].word}**", f"`{each.command}`", each.remains]
        for letter, each in CLAIMS.items()
    ]
    head = ["", "claim of the abstract", "answer here", "asked by", "what remains for the paper's setting"]
    parts = [markdown.table(head, rows, left=range(len(head)))]
    for letter, answer in answers.items():
        parts.append(f"**({letter}) {answer.word.capitalize()}.** {answer.text}")
        if answer.rows:
            parts.append(f"![Claim {letter}: {answer.axis}](img/answered-{letter}.png)")
    return "\n\n".join(parts)


def summary() -> str:
    """Three sentences for README."""
    fraction = {line["target"]: line for line in _of("lab_gradients")["targets"]}["sum"]["fraction"]
    words = {letter: each.answer().word for letter, each in CLAIMS.items()}
    mean, low, high = (100 * value for value in fraction)
    return (
        "- **The paper's claims** ([docs/rcmae-answered.md](docs/rcmae-answered.md)), asked of small "
        f"networks: RC-MAE converges faster than self-distillation ({words['c']}), needs less memory "
        f"({words['d']}), is more robust than MAE ({words['e']}) and better in classification "
        f"({words['f']}). In the paper's "
        f"linear model the teacher reverts past gradients only where inputs are similar ({words['a']}). In a "
        f"trained network it reverts past updates on other images {mean:.0f} % ({low:.0f} to {high:.0f}) as "
        f"much as on the same ones: {words['b']}."
    )


def draw(answer: Answer, path: str) -> None:
    """A line for each row, with its interval."""
    figure = Figure(figsize=(4, 0.55 + 0.22 * len(answer.rows)), layout="constrained", dpi=200)
    axes = figure.add_subplot()
    axes.axvline(answer.neutral, color=LIGHT["baseline"], linewidth=1)
    for place, row in enumerate(answer.rows):
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [place, place], color=LIGHT["teacher"], linewidth=1.6)
        axes.plot(row.value, place, "o", color=LIGHT["teacher"], markersize=4.5)
    axes.set_yticks(range(len(answer.rows)), [row.label for row in answer.rows], fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylim(len(answer.rows) - 0.4, -0.6)
    axes.set_xlabel(answer.axis, fontsize=8.5, loc="right")
    axes.grid(axis="x", color=LIGHT["faint"], linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(ROOT / "docs" / "img" / path)


def main() -> None:
    """Draw the figures, and print the section."""
    for letter, each in CLAIMS.items():
        if (answer := each.answer()).rows:
            draw(answer, f"answered-{letter}.png")
    print(table())


if __name__ == "__main__":
    main()
