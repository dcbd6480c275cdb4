"""95 % intervals: of an accuracy and of a paired difference over the test images of one run, and of paired
differences over a few seeds, where the bootstrap is corrected for their small number."""

import numpy as np
from jaxtyping import Bool
from scipy import stats

MARGIN_NOTE = "±: half of a 95 % interval (Wilson's) over the test images."

Correct = list[Bool[np.ndarray, " m"]]
"For each seed, which test images were classified correctly."


def percents(correct: Correct) -> list[float]:
    """The accuracy of each seed in percent."""
    return [100 * float(c.mean()) for c in correct]


def points(mean: float, low: float, high: float) -> str:
    """A difference and its interval in words."""
    return f"{mean:+.1f} points, {low:+.1f} to {high:+.1f}"


def margin(percent: float, images: int) -> float:
    """Half the length, in points, of the Wilson interval of an accuracy on independent test images."""
    result = stats.binomtest(round(percent / 100 * images), images)
    low, high = result.proportion_ci(0.95, method="wilson")
    return 50 * float(high - low)


def with_margin(percent: float, images: int) -> str:
    """An accuracy and its margin, such as "54.8 ± 4.1"; without the margin if the number of images is
    unknown (0)."""
    return f"{percent:.1f} ± {margin(percent, images):.1f}" if images else f"{percent:.1f}"


def paired(correct: Bool[np.ndarray, " m"], others: Bool[np.ndarray, " m"]) -> list[float]:
    """Difference of two accuracies on the same test images in points, and its interval by Agresti and Min
    (2005): that of a mean of paired differences, after half an image is added to each of the four cells of
    the table (both correct, the first only, the second only, none), so that it also holds for few images.

    It covers the choice of the test images, not that of the seed.
    """
    n, first, second = len(correct), int((correct & ~others).sum()), int((others & ~correct).sum())
    mean, center = (first - second) / n, (first - second) / (n + 2)
    half = stats.norm.ppf(0.975) * np.sqrt(((first + second + 1) / (n + 2) - center**2) / (n + 2))
    return [100 * mean, 100 * float(center - half), 100 * float(center + half)]


def interval(correct: Correct, others: Correct, draws: int = 4000) -> list[float]:
    """Mean difference of two arms in points, and its 95 % interval by a bootstrap over the seeds and, within
    each, the test images.

    Few seeds underestimate the spread, so the bootstrap interval is widened by the factor that follows from
    Student's t and the unbiased standard deviation (9.2 for two seeds, 2.7 for three, 1.4 for six). Its
    coverage is then about 95 %, and higher if images vary more than seeds.
    """
    rng = np.random.Generator(np.random.Philox(key=0))
    differences = [a.astype(np.int8) - b.astype(np.int8) for a, b in zip(correct, others, strict=True)]
    n, images = len(differences), np.array([len(d) for d in differences])
    fractions = np.stack([[(d == v).mean() for v in (-1, 0, 1)] for d in differences])
    seeds = rng.integers(n, size=(draws, n))
    drawn = rng.multinomial(images[seeds], fractions[seeds])  # equivalent to resampling the images
    means = ((drawn[..., 2] - drawn[..., 0]) / images[seeds]).mean(1)
    mean = float((fractions[:, 2] - fractions[:, 0]).mean())
    factor = float(stats.t.ppf(0.975, n - 1) / stats.norm.ppf(0.975) * np.sqrt(n / (n - 1)))
    low, high = (mean + factor * (float(q) - mean) for q in np.percentile(means, [2.5, 97.5]))
    return [100 * mean, 100 * low, 100 * high]
