"""The 15 corruptions of ImageNet-C and its 4 extra ones, at 5 severities, for images of any size: "C-style,
not ImageNet-C".

Written from the formulas and constants of Hendrycks and Dietterich 2019 (arXiv 1903.12261;
github.com/hendrycks/robustness), using only numpy, scipy and Pillow. Results are not comparable with
published ones, because

- the published set consists of 224 px crops, stored as JPEG files; here the network's input pixels are
  corrupted, without compression;
- the constants of glass blur, snow, frost, elastic transform, spatter and saturate are our own: with the
  published ones, the measured mean distance to the clean image does not increase with every severity (for the
  same reason, defocus blur has a single softness of the rim, motion blur a single kernel length and at 32 px
  2.25 instead of 2, fog at 224 px 3 and 4 instead of 2.5 and 3);
- frost is generated (the original uses six photographs), snow is a fraction of the area, spatter is always
  mud (the original's water needs OpenCV's edge detection), motion blur sums shifted images (the original uses
  ImageMagick), glass blur samples nearby pixels (the original swaps neighbors one after the other), elastic
  transform samples once instead of twice, gray pixels stay gray when saturated, and values are rounded
  instead of truncated.

Constants are published for 224 px (ImageNet-C), 64 px (Tiny-ImageNet-C) and 32 px (CIFAR-10-C): at 32 px,
those of 224 px would leave nothing of an image under noise, and change nothing by blur. We use those whose
size is closest, on a log scale, to the shorter side: CIFAR's up to 45 px, Tiny-ImageNet's up to 119 px.
Lengths in pixels are multiplied by (shorter side / published size), but never fall below their value at 32
px; fractions, noise levels and qualities are not scaled.
"""

import io
import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import cKDTree

from ...errors import ConfigError

Picture = UInt8[np.ndarray, "h w 3"]
Pixels = Float[np.ndarray, "h w 3"]
"Values in 0 to 1."
Layers = Float[np.ndarray, "h w c"]
RNG = np.random.Generator
Constants = Sequence[float | tuple[float, ...]]


def generator(seed: int, index: int, corruption: str) -> RNG:
    """The random generator of an image: counter-based as `data.views.rng`, with a second key word, so that
    its draws are independent of those of the crops.

    All severities use the same draws: severity 3 is the snowfall of severity 2, but heavier. (Published sets
    draw separately for each severity. The error at each severity is unbiased either way; the errors of an
    image are correlated, which intervals over images account for.)
    """
    key, counter = [seed, zlib.crc32(b"corruption")], [0, 0, index, zlib.crc32(corruption.encode())]
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def corrupt(image: Picture, corruption: str, severity: int, seed: int = 0, index: int = 0) -> Picture:
    """Apply one of `CORRUPTIONS` to image `index` at a severity of 1 to 5. Raises ConfigError.

    A gray image needs its channel repeated.
    """
    if corruption not in CORRUPTIONS:
        raise ConfigError(f"no corruption is called {corruption!r}; there are {', '.join(CORRUPTIONS)}")
    if severity not in range(1, 6):
        raise ConfigError(f"severity must be 1 to 5, not {severity}")
    size, px = table_for(image.shape[:2])
    change, *tables = CORRUPTIONS[corruption]
    constants = np.atleast_1d(tables[SIZES.index(size)][severity - 1]).astype(float).tolist()
    return _uint8(change(image / 255, generator(seed, index, corruption), px, *constants))


def table_for(shape: tuple[int, ...]) -> tuple[int, float]:
    """For images of this height and width, the published size whose constants are used, and the factor of
    their lengths in pixels."""
    side = max(32, min(shape))
    size = min(SIZES, key=lambda size: abs(math.log(side / size)))
    return size, side / size


# Every corruption takes pixels, a generator, px (the scale of lengths: pixels of this image per pixel of the
# constants), and its constants.


def gaussian_noise(x: Pixels, rng: RNG, px: float, std: float) -> Pixels:
    return x + std * rng.standard_normal(x.shape)


def shot_noise(x: Pixels, rng: RNG, px: float, photons: float) -> Pixels:
    """White is `photons` photons on average."""
    return rng.poisson(photons * x) / photons


def impulse_noise(x: Pixels, rng: RNG, px: float, fraction: float) -> Pixels:
    """A fraction of the values, independently for each channel, becomes 0 or 1."""
    u = rng.random(x.shape)
    return np.where(u < fraction, u < fraction / 2, x)


def defocus_blur(x: Pixels, rng: RNG, px: float, radius: float) -> Pixels:
    """The mean over a disc with a rim softened by half a pixel: a small disc would lie inside a single pixel
    and blur nothing."""
    reach = math.ceil(radius * px) + 2
    fine = (np.arange(8 * (2 * reach + 1)) + 0.5) / 8 - (reach + 0.5)  # 8 x 8 points per pixel
    disc = (fine[:, None] ** 2 + fine**2 <= (radius * px) ** 2).astype(float)
    return _filtered(
        x, gaussian_filter(disc, 8 * 0.5).reshape(2 * reach + 1, 8, 2 * reach + 1, 8).mean((1, 3))
    )


def glass_blur(x: Pixels, rng: RNG, px: float, sigma: float, reach: float) -> Pixels:
    """Blur, sample each pixel from a random position up to `reach` away along each axis, blur again."""
    source = np.mgrid[: x.shape[0], : x.shape[1]] + rng.uniform(-reach * px, reach * px, (2, *x.shape[:2]))
    return gaussian_blur(_fetched(gaussian_blur(x, rng, px, sigma), source), rng, px, sigma)


def motion_blur(x: Pixels, rng: RNG, px: float, sigma: float) -> Pixels:
    return _smeared(x, rng.uniform(-45, 45), sigma * px)


def zoom_blur(x: Pixels, rng: RNG, px: float, most: float, step: float) -> Pixels:
    """The mean of the image (twice, as published) and of its enlargements by 1 + step, 1 + 2 step, ... up to
    `most`."""
    factors = 1 + step * np.arange(1, round((most - 1) / step) + 1)
    return (2 * x + sum(_enlarged(x, factor) for factor in factors)) / (len(factors) + 2)


def snow(x: Pixels, rng: RNG, px: float, fraction: float, flake: float, sigma: float, keep: float) -> Pixels:
    """Pale the image, then add flakes (the highest `fraction` of noise enlarged `flake` times) with motion
    blur in falling direction, and the same flakes rotated by 180 degrees."""
    noise = _enlarged(rng.standard_normal((*x.shape[:2], 1)), flake * px)
    flakes = _smeared(
        (noise > np.quantile(noise, 1 - fraction)).astype(float), rng.uniform(-135, -45), sigma * px
    )
    luma = x @ (0.299, 0.587, 0.114)  # ITU-R BT.601
    pale = np.maximum(x, 1.5 * luma[..., None] + 0.5)
    return keep * x + (1 - keep) * pale + flakes + flakes[::-1, ::-1]


def frost(x: Pixels, rng: RNG, px: float, thick: float) -> Pixels:
    """Blend with bluish white, by up to `thick`, in clouds and more strongly along seams between crystals.

    A seam is where the two nearest of 60 random points are equally distant (Worley 1996); its width is 0.15
    of their mean distance.
    """
    h, w = x.shape[:2]
    near = cKDTree(rng.random((60, 2)) * (h, w)).query(np.moveaxis(np.mgrid[:h, :w], 0, 2), k=2)[0]
    seams = np.exp(-(near[..., 1] - near[..., 0]) / (0.15 * math.sqrt(h * w / 60)))
    ice = thick * np.clip(0.2 + 0.5 * _plasma(rng, h, w, 1.3) + 0.5 * seams, 0, 1)[..., None]
    return (1 - ice) * x + ice * (0.85, 0.95, 1.0)


def fog(x: Pixels, rng: RNG, px: float, thick: float, decay: float) -> Pixels:
    """Add clouds of up to `thick`, then scale the image so that its brightest value stays in range."""
    top = x.max()
    return (x + thick * _plasma(rng, x.shape[0], x.shape[1], decay)[..., None]) * top / (top + thick)


def brightness(x: Pixels, rng: RNG, px: float, more: float) -> Pixels:
    """Increase HSV's value, which is the largest channel. Hue and saturation stay, so all channels are
    multiplied by the same factor. Black becomes gray."""
    value = x.max(2, keepdims=True)
    target = np.minimum(value + more, 1)
    return np.where(value > 0, x * target / np.maximum(value, 1e-9), target)


def contrast(x: Pixels, rng: RNG, px: float, fraction: float) -> Pixels:
    mean = x.mean((0, 1))
    return mean + fraction * (x - mean)


def elastic_transform(x: Pixels, rng: RNG, px: float, shift: float, jitter: float) -> Pixels:
    """A random smooth displacement and a random affine map, in fractions of the shorter side.

    The displacement has a standard deviation of `shift` and a smoothness of 0.04. The affine map moves three
    corners of a centered square by up to `jitter`.
    """
    h, w = x.shape[:2]
    side = min(h, w)
    wave = gaussian_filter(rng.standard_normal((2, h, w)), (0, 0.04 * side, 0.04 * side), mode="wrap")
    grid = np.mgrid[:h, :w] + side * shift * wave / np.maximum(wave.std((1, 2), keepdims=True), 1e-9)
    corners = np.array([h, w]) // 2 + max(1, side // 3) * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + side * rng.uniform(-jitter, jitter, (3, 2))
    # The affine map from a position in the result to its position in the image.
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)
    return _fetched(x, np.einsum("ij,ihw->jhw", back[:2], grid) + back[2][:, None, None])


def pixelate(x: Pixels, rng: RNG, px: float, fraction: float) -> Pixels:
    """Downsample by box averaging to a fraction of each side, and upsample again."""
    h, w = x.shape[:2]
    coarse = Image.fromarray(_uint8(x)).resize(
        (max(1, int(w * fraction)), max(1, int(h * fraction))), Image.Resampling.BOX
    )
    return np.asarray(coarse.resize((w, h), Image.Resampling.BOX)) / 255


def jpeg_compression(x: Pixels, rng: RNG, px: float, quality: float) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(_uint8(x)).save(file, "JPEG", quality=int(quality))
    return np.asarray(Image.open(file)) / 255


def speckle_noise(x: Pixels, rng: RNG, px: float, std: float) -> Pixels:
    return x + x * std * rng.standard_normal(x.shape)


def gaussian_blur(x: Pixels, rng: RNG, px: float, sigma: float) -> Pixels:
    return gaussian_filter(x, (sigma * px, sigma * px, 0), mode="nearest")


def spatter(x: Pixels, rng: RNG, px: float, fraction: float, drop: float) -> Pixels:
    """Brown mud at the highest `fraction` of noise smoothed over `drop`, with edges softened by half a
    pixel."""
    noise = gaussian_filter(rng.standard_normal(x.shape[:2]), drop * px)
    mud = gaussian_filter((noise > np.quantile(noise, 1 - fraction)).astype(float), 0.5)[..., None]
    return (1 - mud) * x + mud * (63 / 255, 42 / 255, 20 / 255)


def saturate(x: Pixels, rng: RNG, px: float, times: float, more: float) -> Pixels:
    """Multiply HSV's saturation, 1 - smallest / largest channel, by `times` and add `more`: the distances to
    the largest channel are scaled accordingly."""
    value, low = x.max(2, keepdims=True), x.min(2, keepdims=True)
    saturation = (value - low) / np.maximum(value, 1e-9)
    target = np.clip(saturation * times + more, 0, 1)
    return np.where(saturation > 0, value - (value - x) * target / np.maximum(saturation, 1e-9), x)


# Building blocks of the corruptions.


def _uint8(x: Pixels) -> Picture:
    return np.rint(255 * np.clip(x, 0, 1)).astype(np.uint8)


def _filtered(x: Layers, kernel: Float[np.ndarray, "k k"]) -> Layers:
    """Convolve: a weighted mean of shifted images, without negligible weights; borders are replicated."""
    kernel = np.where(kernel < 1e-3 * kernel.max(), 0, kernel)
    reach, (h, w) = len(kernel) // 2, x.shape[:2]
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), "edge")
    return sum(kernel[i, j] * padded[i : i + h, j : j + w] for i, j in np.argwhere(kernel)) / kernel.sum()


def _smeared(x: Layers, angle: float, sigma: float) -> Layers:
    """One-sided motion blur along `angle` (in degrees) by half a Gaussian with standard deviation `sigma` px,
    cut off at 2.5 sigma."""
    reach = max(1, round(2.5 * sigma))
    steps, kernel = np.arange(reach + 1), np.zeros((2 * reach + 1, 2 * reach + 1))
    rows, columns = (
        reach + np.rint(steps * f(math.radians(angle))).astype(int) for f in (math.sin, math.cos)
    )
    np.add.at(kernel, (rows, columns), np.exp(-(steps**2) / (2 * sigma**2)))
    return _filtered(x, kernel)


def _enlarged(x: Layers, factor: float) -> Layers:
    """The center, enlarged to the size of the image by linear interpolation; a factor below 1 counts as 1."""
    (h, w), half = x.shape[:2], 0.5 / max(1, factor)
    box = ((0.5 - half) * w, (0.5 - half) * h, (0.5 + half) * w, (0.5 + half) * h)
    layers = (
        Image.fromarray(layer.astype(np.float32)).resize((w, h), Image.Resampling.BILINEAR, box)
        for layer in np.moveaxis(x, 2, 0)
    )
    return np.stack([np.asarray(layer, dtype=float) for layer in layers], 2)


def _fetched(x: Pixels, source: Float[np.ndarray, "2 h w"]) -> Pixels:
    """The pixels at fractional positions (row, column), by linear interpolation; the image is mirrored at its
    borders."""
    channels = [map_coordinates(x[..., channel], source, order=1, mode="mirror") for channel in range(3)]
    return np.stack(channels, axis=2)


def _plasma(rng: RNG, h: int, w: int, decay: float) -> Float[np.ndarray, "h w"]:
    """Clouds with values 0 to 1, by the diamond-square algorithm (Fournier, Fussell and Carpenter 1982) on a
    torus.

    The grid starts with a single point and doubles: the centers of squares, then those of edges, become the
    mean of their four neighbors plus noise. The noise shrinks by decay^2 per doubling, because the published
    code multiplies two amplitudes that shrink by `decay` each.
    """
    field, noise = np.zeros((1, 1)), 1.0
    while len(field) < max(h, w, 2):
        n = len(field)
        right, below = np.roll(field, -1, 1), np.roll(field, -1, 0)
        middle = (field + right + below + np.roll(below, -1, 1)) / 4 + rng.uniform(-noise, noise, (n, n))
        across = (field + right + middle + np.roll(middle, 1, 0)) / 4 + rng.uniform(-noise, noise, (n, n))
        down = (field + below + middle + np.roll(middle, 1, 1)) / 4 + rng.uniform(-noise, noise, (n, n))
        finer = np.empty((2 * n, 2 * n))
        finer[::2, ::2], finer[::2, 1::2], finer[1::2, ::2], finer[1::2, 1::2] = field, across, down, middle
        field, noise = finer, noise / decay**2
    field -= field.min()
    return (field / field.max())[:h, :w]


_ELASTIC = [(0.005, 0.02), (0.01, 0.03), (0.015, 0.04), (0.02, 0.05), (0.03, 0.06)]

SIZES = (224, 64, 32)
"Sides in pixels for which constants are published."

CORRUPTIONS: dict[str, tuple[Callable[..., Pixels], Constants, Constants, Constants]] = {
    "gaussian_noise": (
        gaussian_noise,
        [0.08, 0.12, 0.18, 0.26, 0.38],
        [0.04, 0.08, 0.12, 0.15, 0.18],
        [0.04, 0.06, 0.08, 0.09, 0.10],
    ),
    "shot_noise": (shot_noise, [60, 25, 12, 5, 3], [250, 100, 50, 30, 15], [500, 250, 100, 75, 50]),
    "impulse_noise": (
        impulse_noise,
        [0.03, 0.06, 0.09, 0.17, 0.27],
        [0.01, 0.02, 0.05, 0.08, 0.14],
        [0.01, 0.02, 0.03, 0.05, 0.07],
    ),
    "defocus_blur": (defocus_blur, [3, 4, 6, 8, 10], [0.5, 1, 1.5, 2.5, 3], [0.3, 0.4, 0.5, 1, 1.5]),
    "glass_blur": (
        glass_blur,
        # The published maximum distances, times the square root of the published number of iterations.
        [(0.7, 1.4), (0.9, 2), (1, 3.5), (1.1, 4.2), (1.5, 5.7)],
        [(0.1, 0.7), (0.5, 1), (0.6, 1.4), (0.7, 2), (0.9, 2.8)],
        [(0.1, 0.4), (0.2, 0.6), (0.3, 0.8), (0.3, 1.1), (0.4, 1.4)],
    ),
    "motion_blur": (motion_blur, [3, 5, 8, 12, 15], [1, 1.5, 2, 2.5, 3], [1, 1.5, 2, 2.25, 2.5]),
    "zoom_blur": (
        zoom_blur,
        [(1.1, 0.01), (1.15, 0.01), (1.2, 0.02), (1.24, 0.02), (1.3, 0.03)],
        [(1.05, 0.01), (1.1, 0.01), (1.15, 0.01), (1.2, 0.01), (1.25, 0.01)],
        [(1.05, 0.01), (1.1, 0.01), (1.15, 0.01), (1.2, 0.01), (1.25, 0.01)],
    ),
    "snow": (
        snow,
        [(0.03, 3, 4, 0.8), (0.05, 3, 4, 0.7), (0.06, 4, 8, 0.7), (0.09, 4, 8, 0.65), (0.12, 4, 12, 0.55)],
        [
            (0.01, 1, 3, 0.8),
            (0.02, 1, 4, 0.8),
            (0.04, 1.75, 4, 0.7),
            (0.06, 2.25, 6, 0.65),
            (0.1, 2.25, 12, 0.6),
        ],
        [(0.01, 1, 1, 0.95), (0.02, 1, 1, 0.9), (0.03, 1, 1.5, 0.9), (0.04, 1, 1.5, 0.85), (0.06, 1, 2, 0.8)],
    ),
    "frost": (frost, [0.6, 0.7, 0.8, 0.9, 1], [0.4, 0.5, 0.6, 0.7, 0.8], [0.2, 0.3, 0.4, 0.5, 0.6]),
    "fog": (
        fog,
        [(1.5, 2), (2, 2), (2.5, 1.7), (3, 1.5), (4, 1.4)],
        [(0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)],
        [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
    ),
    "brightness": (
        brightness,
        [0.1, 0.2, 0.3, 0.4, 0.5],
        [0.1, 0.2, 0.3, 0.4, 0.5],
        [0.05, 0.1, 0.15, 0.2, 0.3],
    ),
    "contrast": (
        contrast,
        [0.4, 0.3, 0.2, 0.1, 0.05],
        [0.4, 0.3, 0.2, 0.1, 0.05],
        [0.75, 0.5, 0.4, 0.3, 0.15],
    ),
    "elastic_transform": (elastic_transform, _ELASTIC, _ELASTIC, _ELASTIC),
    "pixelate": (
        pixelate,
        [0.6, 0.5, 0.4, 0.3, 0.25],
        [0.9, 0.8, 0.7, 0.6, 0.5],
        [0.95, 0.9, 0.85, 0.75, 0.65],
    ),
    "jpeg_compression": (jpeg_compression, [25, 18, 15, 10, 7], [65, 58, 50, 40, 25], [80, 65, 58, 50, 40]),
    "speckle_noise": (
        speckle_noise,
        [0.15, 0.2, 0.35, 0.45, 0.6],
        [0.15, 0.2, 0.25, 0.3, 0.35],
        [0.06, 0.1, 0.12, 0.16, 0.2],
    ),
    "gaussian_blur": (gaussian_blur, [1, 2, 3, 4, 6], [0.5, 0.75, 1, 1.25, 1.5], [0.4, 0.6, 0.7, 0.8, 1]),
    "spatter": (
        spatter,
        [(0.04, 4), (0.08, 4), (0.12, 4), (0.18, 4), (0.25, 4)],
        [(0.03, 1.5), (0.07, 1.5), (0.1, 1.5), (0.15, 1.5), (0.2, 1.5)],
        [(0.03, 1), (0.06, 1), (0.09, 1), (0.12, 1), (0.16, 1)],
    ),
    "saturate": (
        saturate,
        [(1.5, 0), (2, 0), (3, 0.05), (5, 0.1), (20, 0.2)],
        [(1.5, 0), (2, 0), (3, 0.05), (5, 0.1), (30, 0.2)],
        [(1.25, 0), (1.5, 0), (1.75, 0.05), (2, 0.1), (2.5, 0.2)],
    ),
}
"""Name -> (function, constants of severity 1 to 5 for each of `SIZES`), in the published order; the
last four are the extra corruptions."""

STANDARD = tuple(CORRUPTIONS)[:15]
"The 15 corruptions of the mean corruption error."
