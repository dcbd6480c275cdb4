"""Whether pre-training has learned something: intervals with their coverage, and the answer that follows."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from rcmae.engine.console import no_progress
from rcmae.tasks.interval import margin, paired, with_margin
from rcmae.tasks.learned import below_start, learned
from rcmae.tasks.probe import PIXELS, RANDOM, Probes, ProbeSet, final_correct
from tests.mutations import catches


def _unpaired(old):
    """The interval of two independent sets of test images."""

    def interval(a, b):
        gain = a.mean() - b.mean()
        half = 1.96 * np.sqrt((a.var() + b.var()) / len(a))
        return [100 * gain, 100 * (gain - half), 100 * (gain + half)]

    return interval


@catches("pairs are ignored", "rcmae.tasks.interval:paired", _unpaired)
@pytest.mark.parametrize("images", [60, 400])
@pytest.mark.parametrize(("first", "second"), [(0.1, 0.1), (0.12, 0.05), (0.01, 0.01)])
def test_paired_intervals_cover_the_true_difference(images, first, second):
    """Of 1,000 draws of test images, about 950 (never fewer than 930, and without needless width where there
    are enough images) contain the true difference. `first`, `second`: images that only one is correct on."""
    rng = np.random.default_rng(0)
    draws = rng.random((1000, images))
    covered = 0
    for draw in draws:
        only_first, only_second, both = draw < first, draw > 1 - second, abs(draw - 0.5) < 0.2
        _, low, high, *_ = paired(only_first | both, only_second | both)
        covered += low <= 100 * (first - second) <= high
    assert covered >= 930
    if images == 400 and first > 0.05:
        assert covered <= 975


def test_a_margin_is_half_of_wilsons_interval():
    low, high = binomtest(219, 400).proportion_ci(method="wilson")
    assert margin(54.75, 400) == pytest.approx(50 * (high - low))
    assert with_margin(54.75, 400) == "54.8 ± 4.9" and with_margin(54.75, 0) == "54.8"
    assert margin(100.0, 20) > 5, "twenty correct images do not prove perfection"


def correct(images: int, **accuracies: float) -> dict:
    """Results by network; a better network is correct wherever a worse one is, but for a tenth of them."""
    rng = np.random.default_rng(0)
    order = rng.random(images)
    names = {"pixels": PIXELS, "random": RANDOM}
    swap = rng.random(images) < 0.1

    def results(accuracy: float) -> np.ndarray:
        return np.where(swap, rng.random(images), order) < accuracy / 100

    return {
        names.get(name, name): {"linear": results(a), "knn": results(a)} for name, a in accuracies.items()
    }


def test_the_answer_follows_from_the_interval_not_from_the_gain():
    """The same gain of five points on 60 and on 1,200 test images; a clear gain, and a clear loss. The answer
    is that of the teacher."""
    both, better, worse = (
        np.arange(60) < 30,
        np.arange(60) >= 54,
        (np.arange(60) >= 30) & (np.arange(60) < 33),
    )
    for repeats, word in ((1, "not shown"), (20, "yes")):
        features, random, none = (np.tile(c, repeats) for c in (both | better, both | worse, both & worse))
        results = {"student": ~none, "teacher": features, RANDOM: random, PIXELS: none}
        answer = learned({name: {"linear": c} for name, c in results.items()}, ())
        assert answer.word == word and "+5.0 points" in answer.text
    assert learned(correct(400, teacher=70, random=50, pixels=60), ())[:2] == ("yes", "good")
    worse = correct(400, teacher=40, random=60, pixels=50)
    answer = learned(worse, ())
    assert answer[:2] == ("no", "bad") and "made the features worse" in answer.text
    assert [tone for tone, _ in below_start(worse)] == ["bad"]
    assert not below_start(correct(400, teacher=70, random=50, pixels=60))


def test_raw_pixels_do_not_decide_but_are_always_mentioned():
    answer = learned(correct(400, student=60, random=40, pixels=85), ())
    assert answer[:2] == ("yes", "note") and "below raw pixels (8" in answer.text


def test_a_loss_on_few_images_is_remarked_on():
    answer = learned(correct(60, student=48, random=52, pixels=20), ())
    assert answer.word == "not shown" and "below, though not clearly, the randomly" in answer.text
    assert "has not helped" in answer.text


@pytest.mark.parametrize(
    ("tones", "word"), [(["good"], "not shown"), (["note"], "not shown"), (["good", "bad"], "no")]
)
def test_without_labels_the_training_task_is_judged(tones, word):
    assert learned({}, [(tone, "") for tone in tones]).word == word


def test_results_on_other_test_images_are_not_compared(tmp_path):
    """A resumed run reads them again: an image may have become unreadable, or have another label."""
    images, labels = torch.zeros(20, 1, 2, 2, dtype=torch.uint8), np.arange(20) % 2
    lines = [{"kind": "baseline", "step": 0}, {"kind": "probe", "step": 2}]

    def keep(truth: np.ndarray, step: int, *names: str) -> None:
        chosen = ProbeSet(images, labels, images[: len(truth)], truth)
        probes = Probes(chosen, tmp_path, torch.device("cpu"), "fp32", "never", no_progress)
        probes._keep({name: {"linear": truth == 0} for name in names}, step)

    keep(labels, 0, "raw_pixels", "random_init")
    for truth, same in ((labels, True), (labels[1:], False), (1 - labels, False)):
        keep(truth, 2, "student")
        results = final_correct(tmp_path, lines)
        assert [name for name, by_probe in results.items() if by_probe] == [PIXELS, RANDOM, "student"][
            0 if same else 2 :
        ]
        assert ("have changed since the start" in learned(results, ()).text) is not same


def test_before_the_first_probe_nothing_is_shown():
    assert learned(correct(400, random=40, pixels=80), ())[:2] == ("not shown", "note")
