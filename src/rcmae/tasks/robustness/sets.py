"""Classifiers on corrupted images, on ImageNet-C, -A, -R, -Sketch and ReaL from their folders, and under
attacks.

Every function returns which images each model classifies correctly, in a fixed order, for paired comparisons
of models.
"""

import functools
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...data import sources
from ...data.dataset import in_processes, plain_errors
from ...data.decode import BadImage
from ...data.files import Files
from ...data.pixels import open_image
from ...data.sources import Source, open_source
from ...data.views import Image, center
from ...engine.console import ShowProgress, no_progress
from ...errors import ConfigError, DataError
from ..score import Scored
from .adversarial import Attack, Check, Model, attacked, sanity
from .corruptions import STANDARD, corrupt, table_for
from .metrics import Errors, columns, imagenet_classes, mean_corruption_error

Labels = Int[np.ndarray, " n"]
"The index of the correct logit for each image of a source; -1 if unknown: the image is left out."
Correct = Bool[np.ndarray, " n"]
Say = Callable[[str], object]
View = Callable[[Image, int], UInt8[Tensor, "s c ch cw"]]
"An image and its index to the input of the models: s variants of the image."

SEVERITIES = (1, 2, 3, 4, 5)
C_STYLE, IMAGENET_C = "C-style, not ImageNet-C", "ImageNet-C"
CHECKED = 100
"Number of images for the sanity checks of an attack: each costs about six attacks."


@dataclass(frozen=True)
class Loading:
    """How images are loaded: resized to `shape` (height, width), onto `device`, in batches of `batch` images,
    by `workers` processes (0: by this process).

    Only the shape affects results, apart from rounding, which depends on batch and device.
    """

    shape: tuple[int, int]
    device: torch.device
    batch: int = 64
    workers: int = 0
    bits: int = 16
    "those of 16-bit images, see `Source.bits`"
    progress: ShowProgress = no_progress
    "for each pass over images"

    def view(self) -> View:
        """The evaluation view of an image."""
        return functools.partial(_plain, shape=self.shape)

    @contextmanager
    def passes(self, what: str, total: int) -> Iterator["Loading"]:
        """Loading for several passes over `total` images that share a progress bar."""
        before = 0
        with self.progress(what, total) as tick:

            @contextmanager
            def part(name: str, images: int) -> Iterator[Callable[[int], None]]:
                nonlocal before
                yield lambda done: tick(before + done)
                before += images

            yield replace(self, progress=part)


# Loading and prediction.


class _Views(Dataset):
    """Views of selected images. An unreadable image raises DataError: a score over the others would not be
    the score of the set."""

    def __init__(self, source: Source, indices: Int[np.ndarray, " n"], view: View):
        self.source, self.indices, self.view = source, indices, view

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Tensor:
        index = int(self.indices[i])
        try:
            source, origin = self.source, index
            while isinstance(source, sources.Subset):  # random draws depend on the index in the full set
                origin = int(source.chosen[origin])
                source = source.source
            return self.view(open_image(self.source, index, 3), origin)
        except BadImage as e:
            raise DataError(
                f"{self.source.where(index)} cannot be read ({e}); fix it, or remove it and mention that "
                "with the score"
            ) from e


def _images(
    source: Source, indices: Int[np.ndarray, " n"], view: View, loading: Loading, variants: int = 1
) -> Iterator[Float[Tensor, "b s c h w"]]:
    """Batches of pixels in 0 to 1, on the device, in the order of the indices."""
    if not len(indices):
        raise DataError(f"{source.name} has no image with a known label")
    loader = DataLoader(
        _Views(source, indices, view),
        math.ceil(loading.batch / variants),
        pin_memory=loading.device.type == "cuda",
        **in_processes(loading.workers),
    )
    done = 0
    with loading.progress(source.name, len(indices)) as tick:
        for pixels in plain_errors(loader):
            yield pixels.to(loading.device, non_blocking=True).float() / 255
            tick(done := done + len(pixels))


@torch.no_grad()
def predictions(
    models: dict[str, Model],
    source: Source,
    indices: Int[np.ndarray, " n"],
    view: View,
    loading: Loading,
    variants: int = 1,
) -> Iterator[tuple[slice, Float[Tensor, "m b s k"]]]:
    """For each batch, its slice of `indices` and the logits of the m models. `view` makes `variants` views of
    an image."""
    first = 0
    for pixels in _images(source, indices, view, loading, variants):
        flat, part = pixels.flatten(0, 1), slice(first, first + len(pixels))  # [b * s, c, h, w]
        logits = torch.stack([model(flat).float() for model in models.values()])
        yield part, logits.unflatten(1, pixels.shape[:2])
        first = part.stop


def _known(source: Source, labels: Labels) -> Int[np.ndarray, " n"]:
    if len(labels) != len(source):
        raise DataError(f"{len(labels)} labels for the {len(source)} images of {source.name}")
    return np.flatnonzero(labels >= 0)


def labels_for(source: Source, classes: Sequence[str]) -> Labels:
    """A source's labels as indices of the logits of a model with these classes, matched by name. Raises
    DataError for a source without labels, and for a class that the model does not have."""
    if source.labels is None:
        raise DataError(f"{source.name} has no labels; give a folder with a folder for each class")
    index = np.append(columns(classes, source.classes), -1)  # index[-1] is for labels of -1
    return index[source.labels]


def _plain(image: Image, index: int, shape: tuple[int, int]) -> UInt8[Tensor, "1 c ch cw"]:
    return center(image, shape)[None]


def clean(models: dict[str, Model], source: Source, labels: Labels, loading: Loading) -> dict[str, Scored]:
    """Scores on the unchanged images, in the evaluation view. Images with a label of -1 are left out, as in
    all functions of this module."""
    indices = _known(source, labels)
    correct, confidence = (np.zeros((len(models), len(indices)), kind) for kind in (bool, float))
    for part, logits in predictions(models, source, indices, loading.view(), loading):
        best = logits[:, :, 0].softmax(2).max(2)  # [m, b]
        correct[:, part] = best.indices.cpu().numpy() == labels[indices[part]]
        confidence[:, part] = best.values.cpu().numpy()
    return {name: Scored(*rows) for name, *rows in zip(models, correct, confidence, strict=True)}


# Corruptions.


@dataclass(frozen=True)
class Corrupted:
    """The results of a model on corrupted images. `kind` is the set: C-style numbers are not comparable with
    ImageNet-C's."""

    kind: str
    correct: dict[str, Bool[np.ndarray, "s n"]]
    "by corruption, then severity and image"
    published: bool
    "whether the set is the complete ImageNet-C, with its 15 corruptions, 5 severities and 1,000 classes"

    @property
    def errors(self) -> Errors:
        """By corruption, the errors in percent by severity."""
        return {name: (100 * (1 - correct.mean(1))).tolist() for name, correct in self.correct.items()}

    @property
    def mean_error(self) -> float:
        """The plain mean over corruptions and severities, in percent; not mCE."""
        return float(np.mean([np.mean(e) for e in self.errors.values()]))

    @property
    def mce(self) -> float | None:
        """Mean corruption error relative to AlexNet (100). Only for the published set, on which AlexNet's
        errors were measured."""
        return mean_corruption_error(self.errors) if self.published else None


def _severities(
    image: Image, index: int, shape: tuple[int, int], corruption: str, seed: int
) -> UInt8[Tensor, "s c ch cw"]:
    picture = center(image, shape).permute(1, 2, 0).numpy()
    return torch.from_numpy(
        np.stack([corrupt(picture, corruption, s, seed, index) for s in SEVERITIES])
    ).permute(0, 3, 1, 2)


def corrupted(
    models: dict[str, Model],
    source: Source,
    labels: Labels,
    loading: Loading,
    seed: int = 0,
    corruptions: Sequence[str] = STANDARD,
    say: Say = lambda text: None,
) -> dict[str, Corrupted]:
    """C-style: the evaluation view of each image is corrupted, once for all models. `say` receives a line on
    the constants if none are published for this size, and one after each corruption."""
    (side, factor), shorter = table_for(loading.shape), min(loading.shape)
    if side != shorter:
        text = "" if factor == 1 else f", with lengths in pixels times {factor:.3g}"
        say(f"note: no constants are published for {shorter} px: corruptions use those for {side} px{text}")
    indices = _known(source, labels)
    correct = {c: np.zeros((len(models), len(SEVERITIES), len(indices)), bool) for c in corruptions}
    with loading.passes("corruptions", len(corruptions) * len(indices)) as loading:
        for corruption in corruptions:
            view = functools.partial(_severities, shape=loading.shape, corruption=corruption, seed=seed)
            for part, logits in predictions(models, source, indices, view, loading, len(SEVERITIES)):
                right = logits.argmax(3).cpu().numpy() == labels[indices[part], None]  # [m, b, s]
                correct[corruption][:, :, part] = right.swapaxes(1, 2)
            say(_line(corruption, models, correct[corruption]))
    return _by_model(models, C_STYLE, correct, published=False)


def _by_model(
    models: dict[str, Model], kind: str, correct: dict[str, Bool[np.ndarray, "m s n"]], published: bool
) -> dict[str, Corrupted]:
    return {
        name: Corrupted(kind, {c: rows[i] for c, rows in correct.items()}, published)
        for i, name in enumerate(models)
    }


def _line(corruption: str, models: dict[str, Model], correct: Bool[np.ndarray, "m s n"]) -> str:
    cells = [
        f"{name} {' '.join(f'{error:.1f}' for error in 100 * (1 - rows.mean(1)))}"
        for name, rows in zip(models, correct, strict=True)
    ]
    return f"{corruption}, error by severity in percent: {'; '.join(cells)}"


def _stored(image: Image, index: int, shape: tuple[int, int]) -> UInt8[Tensor, "1 c h w"]:
    if image.shape[:2] != shape:
        raise BadImage(
            f"{image.shape[0]} x {image.shape[1]}, but the model takes {shape[0]} x {shape[1]}: ImageNet-C "
            "is used as stored"
        )
    return center(image, shape)[None]


def _c_folders(root: Path) -> dict[tuple[str, int], Path]:
    """The folder of each corruption and severity."""
    return {(c, s): root / c / str(s) for c in STANDARD for s in SEVERITIES}


def check_imagenet_c(root: Path, classes: Sequence[str], shape: tuple[int, int]) -> None:
    """Check ImageNet-C before any work. Raises DataError for missing folders, for wrong class folders, and if
    the first image has the wrong size."""
    folders = _c_folders(root)
    if missing := [f"{c}/{s}" for (c, s), folder in folders.items() if not folder.is_dir()]:
        raise DataError(
            f"{root} is not the complete ImageNet-C: {_first(missing)} of corruption/severity missing; "
            "unpack all of its archives"
        )
    for folder in folders.values():
        _folders(folder, classes)
    source, _ = published(next(iter(folders.values())), classes, classes)
    _Views(source, np.arange(1), functools.partial(_stored, shape=shape))[0]


def imagenet_c(
    models: dict[str, Model],
    root: Path,
    classes: Sequence[str],
    loading: Loading,
    say: Say = lambda text: None,
) -> dict[str, Corrupted]:
    """The published set, `root/corruption/severity/wnid/*.JPEG`, with the pixels as stored. Raises DataError
    on reaching a folder with missing images (see `check_imagenet_c`)."""
    parts: dict[str, list[Bool[np.ndarray, "m n"]]] = {c: [] for c in STANDARD}
    folders = _c_folders(root)
    first, _ = published(next(iter(folders.values())), classes, classes)
    with loading.passes(IMAGENET_C, len(folders) * len(first)) as loading:
        for (corruption, severity), folder in folders.items():
            source, labels = published(folder, classes, classes, loading.bits)
            if not np.array_equal(source.names.data, first.names.data):
                raise DataError(
                    f"{folder} holds {len(source)} images, and {first.name} {len(first)}, with different "
                    "names; unpack both again"
                )
            view = functools.partial(_stored, shape=loading.shape)
            parts[corruption].append(_correct(models, source, labels, view, loading))
            if severity == SEVERITIES[-1]:
                say(_line(corruption, models, np.stack(parts[corruption], 1)))
    complete = set(classes) == set(imagenet_classes())
    return _by_model(models, IMAGENET_C, {c: np.stack(rows, 1) for c, rows in parts.items()}, complete)


# Published sets in folders.


def _first(names: Sequence[str]) -> str:
    """The first three names in words, and how many more there are."""
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _open(root: Path, bits: int) -> Source:
    source = open_source(str(root), value_range="dtype")
    source.bits = bits
    return source


def _folders(root: Path, wanted: Sequence[str]) -> list[str]:
    """The class folders. Raises DataError unless they are the `wanted` ones."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the folder that contains the class folders")
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if missing := sorted(set(wanted) - set(folders)):
        raise DataError(
            f"{root} has {len(folders)} class folders; {_first(missing)} of {len(wanted)} missing"
        )
    if extra := sorted(set(folders) - set(wanted)):
        raise DataError(
            f"{root} has {len(folders)} class folders; {_first(extra)} not among the {len(wanted)} of this "
            "set"
        )
    return folders


def published(
    root: Path, classes: Sequence[str], wanted: Sequence[str], bits: int = 16
) -> tuple[Files, Labels]:
    """The images of a set with a folder for each of the `wanted` classes, and their labels; `bits` are those
    of 16-bit images. Raises DataError for missing or additional folders."""
    folders = _folders(root, wanted)
    source = _open(root, bits)
    if not isinstance(source, Files) or source.labels is None or (source.labels < 0).any():
        raise DataError(f"{root} must contain images in class folders, and nothing else")
    if empty := sorted(set(folders) - set(source.classes)):
        raise DataError(f"{root} has empty class folders: {_first(empty)}")
    return source, labels_for(source, classes)


def _correct(
    models: dict[str, Model], source: Source, labels: Labels, view: View, loading: Loading
) -> Bool[np.ndarray, "m n"]:
    """Which images are correct by the largest of all logits, for the m models."""
    indices = _known(source, labels)
    correct = np.zeros((len(models), len(indices)), bool)
    for part, logits in predictions(models, source, indices, view, loading):
        correct[:, part] = logits[:, :, 0].argmax(2).cpu().numpy() == labels[indices[part]]
    return correct


class SubsetCorrect(NamedTuple):
    """Which images are correct by the largest logit among the 200 classes of the set (as published), and
    among all classes of the model."""

    among_200: Correct
    among_all: Correct


def synsets(which: str) -> list[str]:
    """The 200 classes of ImageNet-A ("a") or -R ("r")."""
    return sorted(_timm(f"imagenet_{which}_synsets.txt").split())


def subset(
    models: dict[str, Model], root: Path, classes: Sequence[str], which: str, loading: Loading
) -> dict[str, SubsetCorrect]:
    """ImageNet-A (`which` "a") or -R ("r"): 200 wnid folders. The reported accuracy is that among these 200
    classes.

    This is how the authors evaluate (natural-adv-examples' eval.py; ImageNet-R:
    pytorch-image-models/issues/176). Among all classes it is lower.
    """
    wnids = synsets(which)
    source, labels = published(root, classes, wnids, loading.bits)
    index = torch.from_numpy(columns(classes, wnids)).to(loading.device)
    n = len(labels)
    among_200, among_all = (np.zeros((len(models), n), bool) for _ in range(2))
    for part, logits in predictions(models, source, np.arange(n), loading.view(), loading):
        values = logits[:, :, 0]  # [m, b, k]
        among_200[:, part] = index[values[:, :, index].argmax(2)].cpu().numpy() == labels[part]
        among_all[:, part] = values.argmax(2).cpu().numpy() == labels[part]
    return {name: SubsetCorrect(*rows) for name, *rows in zip(models, among_200, among_all, strict=True)}


def sketch(
    models: dict[str, Model], root: Path, classes: Sequence[str], loading: Loading
) -> dict[str, Correct]:
    """ImageNet-Sketch: 1,000 wnid folders, all classes."""
    source, labels = published(root, classes, imagenet_classes(), loading.bits)
    return dict(zip(models, _correct(models, source, labels, loading.view(), loading), strict=True))


def validation_images(
    root: Path, classes: Sequence[str], bits: int = 16
) -> tuple[Files, list[Int[np.ndarray, " k"]]]:
    """ImageNet's validation images, and for each the indices of all ReaL labels. Raises DataError for other
    files."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the folder of ImageNet's validation images")
    source = _open(root, bits)
    if not isinstance(source, Files):
        raise DataError(f"{root} holds archives; unpack them")
    numbers = [
        re.search(rb"(?:^|/)ILSVRC2012_val_(\d{8})\.JPEG$", source.names[i]) for i in range(len(source))
    ]
    real = json.loads(_timm("imagenet_real_labels.json"))
    for i, n in enumerate(numbers):
        if n is None or not 1 <= int(n[1]) <= len(real):
            raise DataError(f"{source.where(i)} is no image of ImageNet's validation set, by its name")
    index = columns(classes, imagenet_classes())
    return source, [index[real[int(n[1]) - 1]] for n in numbers if n]


def real_labels(
    models: dict[str, Model], root: Path, classes: Sequence[str], loading: Loading
) -> dict[str, Correct]:
    """ReaL (Beyer et al. 2020): ImageNet's validation images, scored on the set of reassessed labels of each
    image.

    `root` contains ILSVRC2012_val_00000001.JPEG and so on, flat or in folders. Images without a label in ReaL
    are left out: 3,163 of the 50,000.
    """
    source, real = validation_images(root, classes, loading.bits)
    indices = np.array([i for i, labels in enumerate(real) if len(labels)], dtype=np.int64)
    right = np.zeros((len(source), len(classes)), bool)
    for row, labels in zip(right, real, strict=True):
        row[labels] = True
    correct = np.zeros((len(models), len(indices)), bool)
    for part, logits in predictions(models, source, indices, loading.view(), loading):
        correct[:, part] = right[indices[part], logits[:, :, 0].argmax(2).cpu().numpy()]
    return dict(zip(models, correct, strict=True))


def _timm(name: str) -> str:
    """A data file of the timm package."""
    return files("timm.data").joinpath("_info", name).read_text(encoding="utf-8")


# Attacks.


@dataclass(frozen=True)
class Attacked:
    """The results of a model on the same images under each attack, by the attack's name, and without one
    ("clean"). `checks` are the sanity checks of each PGD attack."""

    correct: dict[str, Correct]
    checks: dict[str, dict[str, Check]]


def adversarial(
    models: dict[str, Model],
    source: Source,
    labels: Labels,
    attacks: Sequence[Attack],
    loading: Loading,
    limit: int | None = None,
    seed: int = 0,
    say: Say = lambda text: None,
    checked: int = CHECKED,
) -> dict[str, Attacked]:
    """Accuracy under attacks, on all images or on `limit` of them, drawn with the seed (the same for all
    models).

    `say` receives a line for each sanity check, on the first `checked` images, and a summary for each model.
    Models are attacked separately, in evaluation mode and without autocast.
    """
    if len({attack.name for attack in attacks}) < len(attacks):
        raise ConfigError("two attacks have the same name; leave one out")
    indices = _known(source, labels)
    if limit is not None and limit < len(indices):
        draws = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(b"limit")]))
        indices = np.sort(draws.choice(indices, limit, replace=False))
    view = loading.view()
    conditions = ("clean", *(attack.name for attack in attacks))
    results = {name: Attacked({c: np.zeros(len(indices), bool) for c in conditions}, {}) for name in models}
    first, done = 0, 0
    with loading.progress("attacks", len(indices) * len(attacks) * len(models)) as tick:
        for pixels in _images(source, indices, view, replace(loading, progress=no_progress)):
            images, part = pixels[:, 0], slice(first, first + len(pixels))  # [b, c, h, w]
            truth = torch.from_numpy(labels[indices[part]]).to(loading.device)
            for name, model in models.items():
                result = results[name]
                if first == 0 and checked:
                    count = min(checked, loading.batch, len(images))
                    for attack in attacks:
                        if attack.steps > 1:
                            checks = sanity(model, images[:count], truth[:count], attack, seed)
                            result.checks[attack.name] = checks
                            for what, check in checks.items():
                                say(
                                    f"{name}, {attack.name}: {what}: {'yes' if check.holds else 'NO'} "
                                    f"({check.numbers}, {count} images)"
                                )
                with torch.no_grad():
                    result.correct["clean"][part] = (model(images).argmax(1) == truth).cpu().numpy()
                for attack in attacks:
                    _, survived = attacked(model, images, truth, attack, seed, indices[part].tolist())
                    result.correct[attack.name][part] = survived.cpu().numpy()
                    tick(done := done + len(images))
            first = part.stop
    for name, result in results.items():
        accuracies = ", ".join(f"{c} {100 * correct.mean():.1f}" for c, correct in result.correct.items())
        say(f"{name}, accuracy in percent: {accuracies}")
    return results
