"""Whether pre-training has learned something: the answer at the top of a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from ..engine.console import Screen
from ..engine.metrics import read_metrics
from ..methods.diagnostics import Sentence
from .interval import MARGIN_NOTE, detectable, judged, paired, points
from .probe import (
    INITIAL,
    KINDS,
    KNN_NOTE,
    PIXELS,
    RANDOM,
    Correct,
    final_correct,
    final_scores,
    image_count,
    score_table,
)


class Answer(NamedTuple):
    """Whether a network has learned something, decided by intervals that cover 95 %.

    With labels, the linear probe of the network that is meant to be used (the teacher, or the student of a
    method without one) is compared with that of the same network before training, on the same test images:

    - yes: the interval of the difference lies above 0;
    - no: it lies below 0, so training has made the features worse;
    - not shown: it contains 0. There may be a gain that these test images are too few to show.

    Raw pixels do not decide: they answer whether the features are worth having, not whether training has
    improved them, and on small simple images they are hard to beat. The text always compares with them, and a
    yes below them is no good news ("note").

    Without labels only the training task can be judged (`Method.judge`). It cannot give a yes, since a task
    can be learned with useless features; it gives a no if the loss is no better than its references, or the
    outputs have collapsed.
    """

    word: Literal["yes", "not shown", "no"]
    tone: str
    "as in `Sentence`"
    text: str


def learned(correct: Mapping[str, Correct], judged: Sequence[Sentence]) -> Answer:
    """The answer from the last probe and the baselines (`final_correct`), empty without labels, and from the
    sentences on the loss."""
    if not correct:
        return _without_labels(judged)
    network = best_network(correct)
    names = (network, before := _before(correct), PIXELS)
    if not all("linear" in correct.get(name, {}) for name in names):
        text = (
            "No probe has been made since the start, or its results for each image (probes/) are missing, or "
            "the test images have changed since the start."
        )
        return Answer("not shown", "note", text)
    features, start, pixels = (correct[name]["linear"] for name in names)
    against_start = paired(features, start)
    gain, low, high = against_start[:3]
    against_pixels = paired(features, pixels)
    text = (
        f"A linear probe on the {network}'s features has an accuracy of {100 * features.mean():.1f} % on "
        f"{len(features):,} test images: {_relation(*against_start[:3])} the {before} "
        f"({100 * start.mean():.1f} %; {points(against_start)}), and "
        f"{_relation(*against_pixels[:3])} raw pixels ({100 * pixels.mean():.1f} %; "
        f"{points(against_pixels)})."
    )
    if low > 0:
        return Answer("yes", "note" if against_pixels[2] < 0 else "good", text)
    if high < 0:
        return Answer("no", "bad", f"{text} Training has made the features worse.")
    advice = "a longer run or more labeled images may show a gain"
    text += f" Training has not helped yet; {advice}." if gain < 0 else f" No clear gain: {advice}."
    text += f" A gain of {detectable(against_start):.1f} points would have been found (80 % power)."
    return Answer("not shown", "note", text)


def below_start(correct: Mapping[str, Correct]) -> list[Sentence]:
    """A sentence for every other probe that is worse than that of the network before training."""
    network, start = best_network(correct), _before(correct)
    before, after = correct.get(start, {}), correct.get(network, {})
    gains = {
        kind: paired(after[kind], before[kind])
        for kind in KINDS
        if kind != "linear" and kind in after and kind in before
    }
    return [
        (
            "bad",
            f"By the {KINDS[kind]}, the {network}'s features are worse than those of the {start} "
            f"({100 * before[kind].mean():.1f} %; {points(gains[kind])}).",
        )
        for kind, verdict in zip(gains, judged(gains.values()), strict=True)
        if verdict.word == "worse"
    ]


def show_table(run: Path, screen: Screen) -> None:
    """The final table (the baselines, then every network) and the answer."""
    lines = read_metrics(run)
    if scores := final_scores(lines):
        correct = final_correct(run, lines)
        names, rows = score_table(scores, image_count(correct))
        screen.table("Accuracy (%) after the last step", ["", *names], rows)
        screen.say(f"{MARGIN_NOTE} {KNN_NOTE}")
        screen.say("Learned: {0}. {2}".format(*learned(correct, ())))


def best_network(correct: Mapping[str, Correct]) -> str:
    """The network that is meant to be used; chosen in advance, not by its score."""
    return "teacher" if "teacher" in correct else "student"


def _before(correct: Mapping[str, Correct]) -> str:
    """The name of the network before training."""
    return INITIAL if INITIAL in correct else RANDOM


def _without_labels(judged: Sequence[Sentence]) -> Answer:
    tones = {tone for tone, _ in judged}
    why = "The images have no labels (or probes are off), so only the training task can be judged"
    if "bad" in tones:
        return Answer("no", "bad", f"{why}, and it is not learned (see below).")
    task = "it is being learned" if "good" in tones else "nothing speaks against it"
    text = f"{why}: {task}. Whether the features are useful is not measured."
    return Answer("not shown", "note", text)


def _relation(gain: float, low: float, high: float) -> str:
    """How an accuracy lies to another one, from the interval of the difference."""
    if low > 0 or high < 0:
        return "above" if low > 0 else "below"
    return "not clearly above" if gain >= 0 else "below, though not clearly,"
