"""Intervals over seeds: coverage from both sides, verdicts on families of comparisons, and their power."""

import numpy as np
import pytest
from scipy import special, stats

from benchmarks.intervals import simulated
from rcmae.tasks.interval import (
    Difference,
    _half,
    correction_note,
    detectable,
    difference,
    different,
    equivalent,
    holm,
    judged,
    over_seeds,
    p_value,
    paired,
    ratio_of_means,
)
from tests.mutations import catches


def covered(races, true: float, **options) -> float:
    results = [difference(correct, others, **options)[1:3] for correct, others in races]
    return float(np.mean([low <= true <= high for low, high in results]))


@catches(
    "the variance of shared images is left out",
    "rcmae.tasks.interval:_over_seeds",
    lambda old: lambda values, images, least: old(values, 0.0, least),
    case="0.4-0.0-16",
)
@catches(
    "the variance of images is counted for every seed again",
    "rcmae.tasks.interval:_over_seeds",
    lambda old: lambda values, images, least: old(values, 2 * images, least),
    case="0.4-0.0-16",
)
@catches(
    "a normal distribution over seeds",
    "rcmae.tasks.interval:_critical",
    lambda old: lambda weight, df, level: old(0 * weight, df, level),
    case="0.0-0.05-3",
)
@pytest.mark.parametrize("seeds", [3, 6, 16])
@pytest.mark.parametrize("seed_effect", [0.0, 0.05])
@pytest.mark.parametrize("image_effect", [0.0, 0.4])
def test_intervals_over_seeds_cover_95_percent(seeds, seed_effect, image_effect):
    """Neither fewer nor more: two arms that differ, on the same 200 test images in all seeds."""
    true, races = simulated(np.random.default_rng(1), seeds, 200, seed_effect, image_effect, 1500)
    assert 0.93 <= covered(races, true) <= 0.97


@catches(
    "images of different seeds count as different",
    "rcmae.tasks.interval:difference",
    lambda old: lambda a, b, images: old(a, b, [i + 1000 * s for s, i in enumerate(images)]),
)
def test_seeds_may_share_some_of_their_images():
    """Each of 16 seeds is tested on 150 of 300 images."""
    rng = np.random.default_rng(0)
    true, races = simulated(rng, 16, 300, 0.0, 0.5, 600)
    count = 0
    for correct, others in races:
        images = [rng.permutation(300)[:150] for _ in correct]
        parts = ([c[i] for c, i in zip(arm, images, strict=True)] for arm in (correct, others))
        _, low, high, *_ = difference(*parts, images)
        count += low <= true <= high
    assert 0.93 <= count / 600 <= 0.97


def test_copies_of_an_image_count_as_one():
    _, races = simulated(np.random.default_rng(0), 3, 100, 0.0, 0.4, 1)
    ((correct, others),) = races
    repeated = ([np.tile(c, 5) for c in arm] for arm in (correct, others))
    images = [np.tile(np.arange(100), 5)] * 3
    assert difference(*repeated, images) == pytest.approx(difference(correct, others))


def test_the_coverage_is_what_the_docstring_says():
    """By integration over the estimated spread of the seeds, for every ratio of the two parts."""
    for seeds, lowest, highest in (
        (2, 0.939, 0.978),
        (3, 0.950, 0.971),
        (6, 0.950, 0.962),
        (16, 0.950, 0.954),
    ):
        spread = stats.chi2.ppf((np.arange(20000) + 0.5) / 20000, seeds - 1) / (seeds - 1)
        coverage = []
        for part in np.linspace(0.02, 1, 50):
            half = _half(np.sqrt(part * spread), (1 - part) ** 0.5, seeds - 1, 0.05)
            coverage.append(np.mean(2 * special.ndtr(half) - 1))
        assert min(coverage) == pytest.approx(lowest, abs=6e-4)
        assert max(coverage) == pytest.approx(highest, abs=6e-4)


def test_intervals_are_paired_by_image():
    """Two arms that are correct on the same images do not differ, for any difficulty of the images and any
    seed."""
    correct = [np.random.default_rng(i).random(500) < fraction for i, fraction in enumerate((0.2, 0.5, 0.9))]
    same = difference(correct, correct)
    assert same.mean == same.images == 0 and -1 < same.low < 0 < same.high < 1
    better = [c | (np.arange(500) < 100) for c in correct]
    gain = difference(better, correct)
    assert gain.mean == pytest.approx(100 * (np.mean(better) - np.mean(correct)))
    assert gain.low < gain.mean < gain.high


def test_seeds_that_agree_by_chance_are_no_certainty():
    arm = np.arange(200) < 100
    gain = difference([arm] * 3, [arm & (np.arange(200) >= 6)] * 3)
    assert gain.mean == 3 and gain.seeds == pytest.approx(0.5 / 3**0.5)


def test_p_values_and_power_are_those_of_students_t():
    values = [1.0, 2.0, -1.5, 3.0, 2.5]
    d = over_seeds(values)
    assert p_value(d, d.mean) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert p_value(d, d.mean - d.low) == pytest.approx(0.05)
    for level in (0.05, 0.01):
        critical, shift = stats.t.ppf(1 - level / 2, 4), detectable(d, level) / d.seeds
        power = stats.nct.sf(critical, 4, shift) + stats.nct.cdf(-critical, 4, shift)
        assert power == pytest.approx(0.8, abs=1e-3)
    one_run = Difference(1, 0, 2, 0, 1, 1)
    assert detectable(one_run) == pytest.approx(1.960 + 0.842, abs=1e-3)


@pytest.mark.parametrize("n", [8, 20, 60])
def test_the_verdict_on_two_networks_agrees_with_its_interval(n):
    for first in range(n // 2):
        for second in range(n // 2):
            correct = np.arange(n) < first
            others = (np.arange(n) >= first) & (np.arange(n) < first + second)
            d = paired(correct, others)
            word = "better" if d.low > 0 else "worse" if d.high < 0 else ""
            verdict = judged([d])[0].word
            expected = (word,) if word else ("equivalent", "inconclusive")
            assert verdict in expected, (first, second)


@catches(
    "the references of a ratio are taken as exact",
    "rcmae.tasks.interval:ratio_of_means",
    lambda old: lambda values, references: old(values, references * 0 + references.mean()),
)
def test_ratios_of_paired_means_cover_95_percent():
    rng, covered, ratio = np.random.default_rng(0), 0, 0.7
    for _ in range(2000):
        shared, noise = rng.normal(0, 0.2, 5), rng.normal(0, 0.1, (2, 5))
        result = ratio_of_means(ratio + shared + noise[0], 1 + shared + noise[1])
        assert result is not None
        covered += result[1] <= ratio <= result[2]
    assert 0.93 <= covered / 2000 <= 0.97


def test_a_ratio_needs_a_reference_that_is_not_0():
    assert ratio_of_means(np.array([1.0, 2.0, 1.5]), np.array([1.0, -1.0, 0.2])) is None
    assert ratio_of_means(np.array([2.0, 2.1]), np.array([4.0, 4.2])) == pytest.approx((0.5, 0.5, 0.5))


def test_margins_and_units_are_those_given():
    small, large = over_seeds([0.021, 0.02, 0.019, 0.02]), over_seeds([0.3, 0.31, 0.29, 0.3])
    assert [*different([small, large])] == [True, True]
    assert [*equivalent([small, large], 0.05)] == [True, False]
    unclear = over_seeds([0.01, -0.02, 0.02, 0.0])
    (verdict,) = judged([unclear], margin=0.1, unit="%")
    assert str(verdict).startswith("equivalent within 0.1 % (+0.0 %, ")
    assert "80 % power at 0.0 %" in str(verdict)


def test_holms_method_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == pytest.approx([1, 1])


@catches("families are not corrected", "rcmae.tasks.interval:holm", lambda old: np.asarray)
def test_a_family_of_comparisons_without_differences_rarely_shows_one():
    rng = np.random.default_rng(0)
    words = [
        {verdict.word for verdict in judged(over_seeds(rng.normal(0, 5, 6)) for _ in range(8))}
        for _ in range(200)
    ]
    assert np.mean([word != {"inconclusive"} for word in words]) < 0.08


def test_a_verdict_says_what_was_found_or_could_have_been():
    better, worse = over_seeds([5.0, 5.5, 6.0, 5.2]), over_seeds([-5.0, -5.5, -6.0, -5.2])
    unclear, same = over_seeds([5.0, -4.0, 3.0, 1.0]), over_seeds([0.1, -0.1, 0.2, 0.1])
    verdicts = judged([better, worse, unclear, same])
    assert [verdict.word for verdict in verdicts] == ["better", "worse", "inconclusive", "equivalent"]
    assert str(verdicts[0]) == "better (+5.4 points, +4.7 to +6.1)"
    power = detectable(unclear, 0.05 / 2)
    assert str(verdicts[2]) == f"inconclusive (+1.2 points, -4.9 to +7.4; 80 % power at {power:.1f} points)"
    assert str(verdicts[3]).startswith(
        "equivalent within 1 point (+0.1 points, -0.1 to +0.3; 80 % power at 0."
    )
    # A difference that is clear alone, but not among many.
    alone = over_seeds([2.0, 3.0, 4.0])
    assert judged([alone])[0].word == "better"
    assert judged([alone, *[unclear] * 9])[0].word == "inconclusive"
    assert "corrected for 10 comparisons" in correction_note(10) and "corrected" not in correction_note(1)
    assert judged([]) == []
    assert [v.word for v in judged([over_seeds([0.0] * 3), over_seeds([2.0] * 3)])] == [
        "equivalent",
        "better",
    ]
