"""The bundled data sets: handwritten digits over photographs, generated without any download.

scikit-learn's 1,797 handwritten digits (8 x 8) are drawn at random positions, sizes, slight rotations and
bright colors over darkened photographs that ship with scikit-learn, among distractor strokes. Only the shape
depends on the label. No glyph and no region of a photograph is in both splits. An image is a pure function of
(seed, split, index).
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from ..errors import ConfigError
from .base import OpenOptions, Source

GENERATOR = 1
"Version of the generator. Raise it when images change: results of different versions are not comparable."

# The difficulty, chosen by measurements (benchmarks/digits_difficulty.py, docs/bundled.md).
BRIGHT = (0.55, 1.0)
"channel values of a digit or stroke"
DARK = 0.45
"factor on the photographs"
WIDTH = (0.55, 0.8)
"width of a digit, as a fraction of the width of a single-digit image"
ANGLE = 0.2
"largest rotation in radians"
STROKES = 2
"distractor strokes per image"

_FINE = 64  # glyphs are stored as 64 x 64 masks, enlarged once by bicubic interpolation
_SPLITS = ("train", "test")


@dataclass(frozen=True)
class Instance:
    """One digit of a scene: its class, and box (x, y, w, h) and mask (bool [h, w]) of the visible part."""

    label: int
    box: tuple[int, int, int, int]
    mask: Bool[np.ndarray, "h w"]


@functools.cache
def _glyphs() -> tuple[Float[np.ndarray, "n 64 64"], Int[np.ndarray, " n"], dict[str, Int[np.ndarray, " m"]]]:
    """Masks with values 0 to 1, labels, and the glyphs of each split: a shuffled fifth of each class is the
    test split."""
    from sklearn.datasets import load_digits  # imported here to keep --help fast

    digits = load_digits()
    images = [
        Image.fromarray(g.astype(np.float32) / 16).resize((_FINE, _FINE), Image.Resampling.BICUBIC)
        for g in digits.images
    ]
    masks = np.clip((np.stack([np.asarray(i) for i in images]) - 0.3) / 0.4, 0, 1).astype(np.float32)
    masks = np.pad(masks, ((0, 0), (1, 1), (1, 1)))  # zeros outside of the glyph
    splits: dict[str, list[int]] = {"train": [], "test": []}
    for label in range(10):
        generator = np.random.Generator(np.random.Philox(key=label))
        glyphs = generator.permutation(np.flatnonzero(digits.target == label))
        splits["test"] += glyphs[::5].tolist()
        splits["train"] += np.delete(glyphs, np.s_[::5]).tolist()
    return masks, digits.target.astype(np.int64), {k: np.array(sorted(v)) for k, v in splits.items()}


@functools.cache
def _textures(split: str) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Photographs at two scales; the left three quarters are for training, the rest for testing."""
    from sklearn.datasets import load_sample_images

    parts = []
    for photo in load_sample_images().images:
        cut = photo.shape[1] * 3 // 4
        part = photo[:, :cut] if split == "train" else photo[:, cut:]
        for factor in (1, 2):
            size = part.shape[1] // factor, part.shape[0] // factor
            parts.append(np.asarray(Image.fromarray(part).resize(size, Image.Resampling.BOX)))
    return parts


def _rng(seed: int, split: str, index: int, form: int) -> np.random.Generator:
    return np.random.Generator(
        np.random.Philox(key=[seed, 2 * form + _SPLITS.index(split)], counter=[0, 0, 0, index])
    )


def _shapes(
    size: int, glyph: np.ndarray, x: np.ndarray, y: np.ndarray, width: np.ndarray, angle: np.ndarray
) -> np.ndarray:
    """Masks 0 to 1 [n, size, size] of glyphs with center (x, y), width and angle, all [n], in pixels and
    radians."""
    masks = _glyphs()[0]
    # Rounded, so that images do not depend on the last bit of a platform's sine.
    cos, sin = (np.round(f(angle), 9)[:, None, None] for f in (np.cos, np.sin))
    axis = np.arange(size) + 0.5
    dx, dy = axis[None, None, :] - x[:, None, None], axis[None, :, None] - y[:, None, None]
    scale = (_FINE / width)[:, None, None]
    u, v = (
        (p * scale + _FINE / 2 + 0.5).clip(0, _FINE + 0.999)
        for p in (cos * dx + sin * dy, cos * dy - sin * dx)
    )
    i, j = v.astype(np.int64), u.astype(np.int64)
    fv, fu = v - i, u - j
    base = (glyph * (_FINE + 2) ** 2)[:, None, None] + i * (_FINE + 2) + j
    flat = masks.ravel()
    top = flat[base] * (1 - fu) + flat[base + 1] * fu
    bottom = flat[base + _FINE + 2] * (1 - fu) + flat[base + _FINE + 3] * fu
    return top * (1 - fv) + bottom * fv


def _lines(size: int, ends: Float[np.ndarray, "n 4"], thick: Float[np.ndarray, " n"]) -> np.ndarray:
    """Masks [n, size, size] of anti-aliased segments from (x0, y0) to (x1, y1)."""
    axis = np.arange(size) + 0.5
    x0, y0, x1, y1 = (ends[:, k, None, None] for k in range(4))
    px, py = axis[None, None, :] - x0, axis[None, :, None] - y0
    dx, dy = x1 - x0, y1 - y0
    along = ((px * dx + py * dy) / np.maximum(dx * dx + dy * dy, 1e-9)).clip(0, 1)
    distance = np.sqrt((px - along * dx) ** 2 + (py - along * dy) ** 2)
    return (thick[:, None, None] / 2 + 0.5 - distance).clip(0, 1)


def _background(rng: np.random.Generator, split: str, size: int) -> Float[np.ndarray, "size size 3"]:
    textures = _textures(split)
    photo = textures[rng.integers(len(textures))]
    if min(photo.shape[:2]) < size:
        photo = max(textures, key=lambda t: min(t.shape[:2]))
        photo = np.tile(photo, (1 + size // photo.shape[0], 1 + size // photo.shape[1], 1))
    top, left = (rng.integers(side - size + 1) for side in photo.shape[:2])
    part = photo[top : top + size, left : left + size]
    if rng.random() < 0.5:
        part = part[:, ::-1]
    return part * (DARK / 255)


def _draw(
    seed: int, split: str, indices: np.ndarray, size: int
) -> tuple[UInt8[np.ndarray, "n size size 3"], Int[np.ndarray, " n"]]:
    _, labels, splits = _glyphs()
    n, glyphs = len(indices), splits[split]
    glyph = np.empty(n, dtype=np.int64)
    pose, color = np.empty((n, 4)), np.empty((n, 1 + STROKES, 3))
    ends, thick = np.empty((n, STROKES, 4)), np.empty((n, STROKES))
    canvas = np.empty((n, size, size, 3))
    for k, index in enumerate(indices):
        rng = _rng(seed, split, int(index), form=0)
        glyph[k] = glyphs[rng.integers(len(glyphs))]
        width = rng.uniform(*WIDTH) * size
        slack = (size - width) / 2
        pose[k] = (
            size / 2 + rng.uniform(-slack, slack),
            size / 2 + rng.uniform(-slack, slack),
            width,
            rng.uniform(-ANGLE, ANGLE),
        )
        color[k] = rng.uniform(*BRIGHT, (1 + STROKES, 3))
        ends[k, :, :2] = rng.uniform(0, size, (STROKES, 2))
        ends[k, :, 2:] = ends[k, :, :2] + rng.uniform(-size / 4, size / 4, (STROKES, 2))
        thick[k] = rng.uniform(0.5, 1.5, STROKES) * size / 32
        canvas[k] = _background(rng, split, size)
    for s in range(STROKES):
        mask = _lines(size, ends[:, s], thick[:, s])[..., None]
        canvas += mask * (color[:, None, None, 1 + s] - canvas)
    mask = _shapes(size, glyph, *pose.T)[..., None]
    canvas += mask * (color[:, None, None, 0] - canvas)
    return (canvas * 255 + 0.5).astype(np.uint8), labels[glyph]


@functools.cache
def glyphs_of(seed: int, split: str, count: int) -> Int[np.ndarray, " n"]:
    """The number of the handwritten digit in each of the first images of a split. There are 364 for testing,
    and images of one are no independent samples."""
    glyphs = _glyphs()[2][split]
    return np.array([glyphs[_rng(seed, split, i, form=0).integers(len(glyphs))] for i in range(count)])


def digit(seed: int, split: str, index: int, size: int = 32) -> tuple[UInt8[np.ndarray, "size size 3"], int]:
    """One labeled image of a single digit, `size` pixels wide and high (designed for 32 to 64)."""
    images, labels = _draw(seed, split, np.array([index]), size)
    return images[0], int(labels[0])


def scene(
    seed: int, split: str, index: int, size: int = 128
) -> tuple[UInt8[np.ndarray, "size size 3"], list[Instance]]:
    """Three to eight digits that occlude each other, later ones in front. Mostly hidden ones are omitted."""
    rng = _rng(seed, split, index, form=1)
    _, labels, splits = _glyphs()
    canvas = _background(rng, split, size)
    for _ in range(2 * STROKES):
        start = rng.uniform(0, size, 2)
        ends = np.concatenate([start, start + rng.uniform(-size / 8, size / 8, 2)])[None]
        mask = _lines(size, ends, rng.uniform(0.5, 1.5, 1) * size / 64)[0][..., None]
        canvas = canvas + mask * (rng.uniform(*BRIGHT, 3) - canvas)
    n = int(rng.integers(3, 9))
    glyph = splits[split][rng.integers(len(splits[split]), size=n)]
    width = rng.uniform(0.2, 0.4, n) * size
    x, y = (rng.uniform(width / 2, size - width / 2) for _ in range(2))
    masks = _shapes(size, glyph, x, y, width, rng.uniform(-ANGLE, ANGLE, n))
    solid = masks >= 0.5
    instances = []
    for k in range(n):
        canvas = canvas + masks[k][..., None] * (rng.uniform(*BRIGHT, 3) - canvas)
        visible = solid[k] & ~solid[k + 1 :].any(0)
        if visible.sum() >= max(12, 0.25 * solid[k].sum()):
            rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
            box = (int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1)
            instances.append(Instance(int(labels[glyph[k]]), box, visible))
    return (canvas * 255 + 0.5).astype(np.uint8), instances


def set_hash(size: int = 32, count: int = 64) -> str:
    """SHA-256 over the first images of both splits, which identifies the version of the set."""
    digest = hashlib.sha256()
    for split in _SPLITS:
        digest.update(_draw(0, split, np.arange(count), size)[0].tobytes())
    return digest.hexdigest()


TEST_IMAGES = 4000
"Default number of test images."


class BundledSource(Source):
    """Common parts of the two bundled sets."""

    kind, recipe, in_memory = "bundled", "bundled", True
    split: str

    @classmethod
    def check(cls, options: OpenOptions) -> None:
        """Raises ConfigError for options that the sets do not support."""
        if options.channels != 3:
            raise ConfigError(f"{cls.form} has 3 channels, not {options.channels}; leave --channels out")

    def where(self, index: int) -> str:
        return f"{self.name}/{self.split}/{index}"


class DigitsSource(BundledSource):
    """Bundled: digits over photographs, with labels; no download.

    All images are generated when the source is opened. A split may be appended: bundled:digits:test.
    """

    form = "bundled:digits"

    @classmethod
    def matches(cls, spec: str) -> bool:
        return spec in (cls.form, *(f"{cls.form}:{split}" for split in _SPLITS))

    @classmethod
    def open(cls, spec: str, options: OpenOptions) -> "DigitsSource":
        cls.check(options)
        if spec.endswith(":test"):
            return cls("test", TEST_IMAGES, options.size, options.seed)
        return cls("train", size=options.size, seed=options.seed)

    @classmethod
    def parts(cls, spec: str) -> tuple[str, str] | None:
        return (spec, f"{spec}:test") if spec == cls.form else None

    def __init__(self, split: str = "train", count: int = 16384, size: int = 32, seed: int = 0):
        self.name, self.classes = self.form, [str(d) for d in range(10)]
        self.split, self.size, self.seed = split, size, seed
        parts = [_draw(seed, split, np.arange(i, min(i + 256, count)), size) for i in range(0, count, 256)]
        self.images = np.concatenate([p[0] for p in parts])
        self.labels = np.concatenate([p[1] for p in parts])

    def samples(self) -> Int[np.ndarray, " n"]:
        """The handwritten digits."""
        return glyphs_of(self.seed, self.split, len(self))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> UInt8[np.ndarray, "size size 3"]:
        return self.images[index]

    def fingerprint(self) -> str:
        about = f"{GENERATOR} {self.split} {len(self)} {self.size} {self.seed} {set_hash()}"
        return hashlib.sha256(about.encode()).hexdigest()

    def for_probes(self, train: int, test: int, seed: int) -> tuple[Source, Source]:
        """The images for fitting come from the training split with another seed."""
        return DigitsSource("train", train, self.size, seed + 1), DigitsSource("test", test, self.size, seed)


class ScenesSource(BundledSource):
    """Bundled: scenes of many digits, without labels; no download.

    Each is generated when it is first read (about 5 ms at 128 px), and cached.
    """

    form, has_objects = "bundled:scenes", True

    @classmethod
    def open(cls, spec: str, options: OpenOptions) -> "ScenesSource":
        cls.check(options)
        return cls("train", size=options.size, seed=options.seed)

    @classmethod
    def with_objects(cls, split: str, images: int, options: OpenOptions) -> tuple[Source, dict[str, Any]]:
        if options.channels != 3:
            raise ConfigError(f"{cls.form} has 3 channels, but the backbone expects {options.channels}")
        scenes = cls(split, images, options.size, options.seed)
        return scenes, scenes.coco()

    def __init__(self, split: str = "train", count: int = 4096, size: int = 128, seed: int = 0):
        self.name, self.split, self.size, self.seed = self.form, split, size, seed
        self.images = np.zeros((count, size, size, 3), np.uint8)  # memory is only allocated when written
        self.drawn = np.zeros(count, dtype=bool)

    def __len__(self) -> int:
        return len(self.images)

    def objects(self, index: int) -> list[Instance]:
        """The objects of a scene. Generates the image."""
        self.images[index], instances = scene(self.seed, self.split, index, self.size)
        self.drawn[index] = True
        return instances

    def read(self, index: int) -> UInt8[np.ndarray, "size size 3"]:
        if not self.drawn[index]:
            self.objects(index)
        return self.images[index]

    def fingerprint(self) -> str:
        about = f"{GENERATOR} scenes {self.split} {len(self)} {self.size} {self.seed} {set_hash()}"
        return hashlib.sha256(about.encode()).hexdigest()

    def coco(self) -> dict[str, Any]:
        """The objects of all scenes in COCO format: category d + 1 is digit d, image i + 1 is scene i, masks
        are run lengths."""
        size = self.size
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(len(self)):
            images.append({"id": index + 1, "file_name": f"{index:06d}.png", "width": size, "height": size})
            annotations += [
                {
                    "id": len(annotations) + k + 1,
                    "image_id": index + 1,
                    "category_id": i.label + 1,
                    "bbox": list(i.box),
                    "iscrowd": 0,
                    "area": int(i.mask.sum()),
                    "segmentation": {"size": [size, size], "counts": run_lengths(i.mask)},
                }
                for k, i in enumerate(self.objects(index))
            ]
        info = {
            "description": "rcmae bundled scenes",
            "version": str(GENERATOR),
            "seed": self.seed,
            "hash": set_hash(),
        }
        categories = [{"id": d + 1, "name": str(d)} for d in range(10)]
        return {"info": info, "images": images, "categories": categories, "annotations": annotations}


def write_coco(folder: Path, split: str, count: int, size: int = 128, seed: int = 0) -> Path:
    """Write scenes in COCO format, `folder/images/<split>/*.png` and `annotations/instances_<split>.json`.
    Returns the path of the latter."""
    (folder / "images" / split).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    source = ScenesSource(split, count, size, seed)
    annotations = source.coco()
    for index, image in enumerate(annotations["images"]):
        Image.fromarray(source.read(index)).save(folder / "images" / split / image["file_name"])
    path = folder / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(annotations), encoding="utf-8")
    return path


def run_lengths(mask: Bool[np.ndarray, "h w"]) -> list[int]:
    """COCO's uncompressed run lengths: column by column, starting with a run of zeros."""
    flat = mask.ravel(order="F").astype(np.int8)
    return np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat, prepend=0)), [flat.size]])).tolist()
