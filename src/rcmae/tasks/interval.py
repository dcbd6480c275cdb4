"""Differences, most of them of accuracies, with 95 % intervals and verdicts, over the test images of a run
and over seeds.

**The model of several seeds.** The probability that an arm on a seed classifies a test image correctly
depends on the seed, the image, and both. The difference of two arms on seed s and image i is then

    d[s, i] = difference + seed[s] + image[i] + noise[s, i],

with independent terms of mean 0. What a seed or an image does to both arms is gone; `seed` is what a seed
does to one arm only, `image` what an image does to one arm only on every seed, and `noise` the rest, with the
binomial variance. The mean over n seeds with m test images each has the variance

    var(seed) / n + var(noise) / (n m) + var(image) * k,

where k is 1 / m if all seeds have the same test images, and 1 / (n m) if each has its own.

**The estimator.** Let D[s] be the mean over the images of a seed, and s² the variance of the n means. If each
seed has its own images, s² / n estimates the variance above, and Student's t is right. Images that two seeds
share make their means covary, which s² does not contain: this covariance is added, once. The sum over shared
images of

    (d[s, i] - D[s]) (d[t, i] - D[t]) / m²,

averaged over the pairs of seeds s != t, estimates it without bias (for the same images on all seeds, this is
the two-way analysis of variance). s² / n has n - 1 degrees of freedom, the other part as many as images. The
critical value is Cochran's (Biometrics 20, 1964): the mean of Student's and the normal one, weighted by the
parts of the variance. s is taken as one image, 1 / m, at least: the means are counts, and those of a few
seeds can agree by chance, which would make any difference certain.

**Assumptions.** Seeds are independent, and so are images (copies of an image, such as corrupted ones, count
as one); D[s] is normal, as means over many images nearly are. Then the coverage is, by integration and
depending on the ratio of the parts, 0.950 to 0.971 for 3 seeds, to 0.962 for 6 and to 0.954 for 16, and 0.939
to 0.978 for 2. (With Satterthwaite's degrees of freedom it would fall to 0.92 for 3.) At the lower levels
that Holm's method asks for, 3 seeds err up to 1.6 times as often as they should (level 0.3 %).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy import optimize, special, stats

MARGIN_NOTE = "±: half of a 95 % interval (Wilson's) over the test images."

LEVEL, POWER = 0.05, 0.8
"Of two-sided tests, and of intervals; and the probability with which `detectable` differences are found."

EQUIVALENT = 1.0
"Points within which two arms count as equivalent."

Correct = list[Bool[np.ndarray, " m"]]
"For each seed, which test images were classified correctly."


class Difference(NamedTuple):
    """A mean difference in points with its 95 % interval, and what that is made of."""

    mean: float
    low: float
    high: float
    seeds: float
    "standard error over seeds, including the noise within each"
    images: float
    "standard error from test images that seeds share, or of the test images of a single run"
    df: int
    "degrees of freedom of `seeds`: the number of seeds - 1"


def percents(correct: Correct) -> list[float]:
    """The accuracy of each seed in percent."""
    return [100 * float(c.mean()) for c in correct]


def points(difference: Sequence[float], unit: str = "points") -> str:
    """A difference and its interval in words."""
    mean, low, high = difference[:3]
    return f"{mean:+.1f} {unit}, {low:+.1f} to {high:+.1f}"


def margin(percent: float, images: int) -> float:
    """Half the length, in points, of the Wilson interval of an accuracy on independent test images."""
    result = stats.binomtest(round(percent / 100 * images), images)
    low, high = result.proportion_ci(1 - LEVEL, method="wilson")
    return 50 * float(high - low)


def with_margin(percent: float, images: int) -> str:
    """An accuracy and its margin, such as "54.8 ± 4.1"; without the margin if the number of images is
    unknown (0)."""
    return f"{percent:.1f} ± {margin(percent, images):.1f}" if images else f"{percent:.1f}"


def paired(correct: Bool[np.ndarray, " m"], others: Bool[np.ndarray, " m"]) -> Difference:
    """Difference of two accuracies on the same test images, with the interval by Agresti and Min (2005): that
    of a mean of paired differences, after half an image is added to each of the four cells of the table (both
    correct, the first only, the second only, none), so that it also holds for few images.

    It covers the choice of the test images, not that of the seed.
    """
    n, first, second = len(correct), int((correct & ~others).sum()), int((others & ~correct).sum())
    mean, center = 100 * (first - second) / n, 100 * (first - second) / (n + 2)
    error = float(np.sqrt((1e4 * (first + second + 1) / (n + 2) - center**2) / (n + 2)))
    half = error * float(_critical(0.0, 1, LEVEL))
    return Difference(mean, center - half, center + half, 0.0, error, 1)


def difference(
    correct: Correct, others: Correct, images: Sequence[Shaped[np.ndarray, " m"]] | None = None
) -> Difference:
    """The mean difference of two arms that are paired by seed, for two seeds or more. `images` names the test
    images of each seed; without it all seeds have the same ones, in the same order."""
    differences = [a.astype(float) - b for a, b in zip(correct, others, strict=True)]
    deviations = [(d - d.mean()) / len(d) for d in differences]
    n, distinct = len(differences), len(differences[0])
    if images is None:
        by_image = np.stack(deviations)  # [n, m]
    else:
        names, place = np.unique(np.concatenate(images), return_inverse=True)
        seed = np.repeat(np.arange(n), [len(d) for d in deviations])
        by_image = np.zeros((n, len(names)))
        np.add.at(by_image, (seed, place), np.concatenate(deviations))
        distinct = min(len(np.unique(each)) for each in images)
    products = by_image @ by_image.T
    shared = max(0.0, float(products.sum() - np.trace(products)) / (n * (n - 1)))
    return _over_seeds(100 * np.array([d.mean() for d in differences]), 100 * shared**0.5, 100 / distinct)


def over_seeds(values: Sequence[float] | Float[np.ndarray, " n"]) -> Difference:
    """The mean of a value per seed, with the interval of Student's t: test images that seeds share are taken
    as given, not as a sample."""
    return _over_seeds(np.asarray(values), 0.0, 0.0)


def _over_seeds(values: Float[np.ndarray, " n"], images: float, least: float) -> Difference:
    """`least` is that of the standard deviation of the seeds."""
    mean, n = float(values.mean()), len(values)
    seeds = max(float(values.std(ddof=1)), least) / n**0.5
    half = float(_half(seeds, images, n - 1, LEVEL))
    return Difference(mean, mean - half, mean + half, seeds, images, n - 1)


def _critical(weight: Float[np.ndarray, " *k"] | float, df: int, level: float) -> Float[np.ndarray, " *k"]:
    """Cochran's critical value for a part of the variance, `weight`, with `df` degrees of freedom."""
    return -weight * special.stdtrit(df, level / 2) - (1 - weight) * special.ndtri(level / 2)


def _half(
    seeds: Float[np.ndarray, " *k"] | float, images: float, df: int, level: float
) -> Float[np.ndarray, " *k"]:
    """Half the length of an interval that excludes a true value with the probability `level`."""
    variance = np.square(seeds) + images**2
    weight = np.square(seeds) / np.maximum(variance, 1e-30)
    return _critical(weight, df, level) * np.sqrt(variance)


def p_value(d: Difference, distance: float) -> float:
    """The probability of a mean further than `distance` from a true difference: the level whose interval
    reaches so far."""
    smallest = 1e-100

    def excess(log: float) -> float:
        return float(_half(d.seeds, d.images, d.df, float(np.exp(log)))) - distance

    if distance <= 0 or excess(np.log(smallest)) <= 0:
        return 1.0 if distance <= 0 else smallest
    return float(np.exp(optimize.brentq(excess, np.log(smallest), 0.0)))


def detectable(d: Difference, level: float = LEVEL) -> float:
    """The smallest true difference in points that a test of this `level` would have found with a probability
    of 80 %, if the standard errors are what was estimated (for few seeds, a rough estimate)."""
    error = float(np.hypot(d.seeds, d.images))
    # A repetition would estimate the spread of the seeds again.
    draws = stats.chi2.ppf((np.arange(1000) + 0.5) / 1000, d.df) / d.df
    half = _half(d.seeds * np.sqrt(draws), d.images, d.df, level)

    def excess(true: float) -> float:
        power = special.ndtr((true - half) / error) + special.ndtr((-true - half) / error)
        return float(np.mean(power)) - POWER

    return float(optimize.brentq(excess, 0.0, float(half.max()) + 9 * error)) if error else 0.0


def ratio_of_means(
    values: Float[np.ndarray, " n"], references: Float[np.ndarray, " n"]
) -> tuple[float, float, float] | None:
    """The mean of `values` over that of `references`, which are paired, with the 95 % interval of Fieller
    (1954): all ratios r for which the mean of `values - r * references` is not shown to differ from 0.

    None if the mean of the references is not shown to differ from 0: the interval would then be unbounded.
    """
    n, y, x = len(values), float(values.mean()), float(references.mean())
    critical = float(special.stdtrit(n - 1, 1 - LEVEL / 2)) ** 2 / n
    (yy, xy), (_, xx) = critical * np.cov(values, references)
    a, b, c = x * x - xx, x * y - xy, y * y - yy  # a r^2 - 2 b r + c <= 0
    if a <= 0:
        return None
    half = max(b * b - a * c, 0.0) ** 0.5
    return y / x, (b - half) / a, (b + half) / a


class Verdict(NamedTuple):
    """What a comparison shows."""

    word: str
    "better, worse, equivalent or inconclusive"
    numbers: str
    "difference, interval and, unless a difference was found, the one that would have been"
    within: str = f"{EQUIVALENT:g} point"
    "the margin of equivalence"

    def __str__(self) -> str:
        within = f" within {self.within}" if self.word == "equivalent" else ""
        return f"{self.word}{within} ({self.numbers})"


def judged(family: Iterable[Difference], margin: float = EQUIVALENT, unit: str = "points") -> list[Verdict]:
    """The verdicts on a family of comparisons, corrected by Holm's method: the probability that any of those
    without a true difference is called better or worse is 5 % at most.

    Equivalent are those whose difference is not only inconclusive but shown to be smaller than `margin`, in
    the `unit` of the differences. The smallest detectable differences are those at the level that Holm's
    method leaves to what has not been found.
    """
    family = list(family)
    clear, small = different(family), equivalent(family, margin)
    level = LEVEL / max(1, int((~clear).sum()))
    within = f"{margin:g} {unit.removesuffix('s') if margin == 1 else unit}"
    verdicts = []
    for index, d in enumerate(family):
        numbers = points(d, unit)
        if clear[index]:
            verdicts.append(Verdict("better" if d.mean > 0 else "worse", numbers))
            continue
        numbers += "; not 0 if judged alone" if d.low * d.high > 0 else ""
        numbers += f"; 80 % power at {detectable(d, level):.1f} {unit}"
        verdicts.append(Verdict("equivalent" if small[index] else "inconclusive", numbers, within))
    return verdicts


def different(family: Sequence[Difference]) -> Bool[np.ndarray, " k"]:
    """Which of a family are not 0, by Student's t and Holm's method."""
    return holm([p_value(d, abs(_center(d))) for d in family]) < LEVEL


def equivalent(family: Sequence[Difference], margin: float) -> Bool[np.ndarray, " k"]:
    """Which of a family are shown to lie between -margin and margin, by two one-sided tests for each and
    Holm's method."""
    return holm([_outside(d, margin) for d in family]) < LEVEL


def level_note(comparisons: int | None) -> str:
    """The level of the verdicts of `judged`, for a page; None for families of different sizes."""
    number = "the number of comparisons in a family" if comparisons is None else f"{comparisons} comparisons"
    corrected = f", corrected for {number} (Holm's method), which the 95 % intervals are not"
    return f"Verdicts are at a level of 5 %{'' if comparisons == 1 else corrected}."


def correction_note(comparisons: int | None) -> str:
    """What the verdicts of `judged` mean, for a page; None for families of different sizes."""
    return (
        f"{level_note(comparisons)} 80 % power at x points: a true difference of x points would have been "
        "found with a probability of 80 %."
    )


def holm(p: Sequence[float]) -> Float[np.ndarray, " k"]:
    """p-values that are corrected for their number by Holm's method."""
    order = np.argsort(p)
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1))
    return np.minimum(corrected, 1)


def _center(d: Difference) -> float:
    """The center of the interval, so that tests and intervals agree: not the mean for `paired`."""
    return (d.low + d.high) / 2


def _outside(d: Difference, margin: float) -> float:
    """The p-value against a difference of `margin` or more, in either direction."""
    inside = margin - abs(_center(d))
    half = p_value(d, abs(inside)) / 2  # one-sided
    return half if inside > 0 else 1 - half
