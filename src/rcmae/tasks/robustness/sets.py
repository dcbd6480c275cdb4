"""Classifiers under shift: corrupted images, ImageNet-C, -A, -R, -Sketch and ReaL from their folders, and attacks, image by image.

Every function returns which images each model got right, in a fixed order, so that models can be compared in pairs.
"""

import functools
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from ...data.dataset import plain_errors, quiet_worker, read_image
from ...data.decode import BadImage
from ...data.files import Files
from ...data.sources import Source, open_source
from ...data.views import center
from ...errors import ConfigError, DataError
from .adversarial import Attack, Check, Model, attacked, sanity
from .corruptions import STANDARD, corrupt
from .metrics import Errors, columns, imagenet_classes, mean_corruption_error, mean_error

Labels = Int[np.ndarray, " n"]
"The right column of a model's logits for each image of a source; -1: not known, the image is left out."
Right = Bool[np.ndarray, " n"]
Say = Callable[[str], object]
View = Callable[[UInt8[np.ndarray, "h w c"], int], UInt8[Tensor, "s c ch cw"]]
"An image and its number to what models see of it: s forms of one picture."

SEVERITIES = (1, 2, 3, 4, 5)
C_STYLE, IMAGENET_C = "C-style, not ImageNet-C", "ImageNet-C"
CHECKED = 100
"Images that an attack's sanity checks look at: each costs some six attacks."


@contextmanager
def unshown(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress that nobody sees."""
    yield lambda done: None


@dataclass(frozen=True)
class Loading:
    """How images reach the models: `shape` (height, width), `device`, `batch` images at a time, by `workers` processes (0: by this one).

    Only the shape can change a result, but for the rounding of sums that another batch or device may bring.
    """

    shape: tuple[int, int]
    device: torch.device
    batch: int = 64
    workers: int = 0
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] = unshown
    "like `Screen.progress`: around each pass over images, of what and how many; what it gives is told how many are done"

    @contextmanager
    def passes(self, what: str, total: int) -> Iterator["Loading"]:
        """Loading for several passes, over `total` images together, that are one progress."""
        before = 0
        with self.progress(what, total) as tick:

            @contextmanager
            def part(name: str, images: int) -> Iterator[Callable[[int], None]]:
                nonlocal before
                yield lambda done: tick(before + done)
                before += images

            yield replace(self, progress=part)


# What all have in common.


class _Views(Dataset):
    """The views of chosen images. An unreadable one is a DataError: a score over the others would pass for one over all."""

    def __init__(self, source: Source, indices: Int[np.ndarray, " n"], view: View):
        self.source, self.indices, self.view = source, indices, view

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Tensor:
        index = int(self.indices[place])
        try:
            source, origin = self.source, index
            while isinstance(source, sources.Subset):  # of a subset too: draws are by the number in the whole
                source, origin = source.source, int(source.chosen[origin])
            return self.view(read_image(self.source, index, 3), origin)
        except BadImage as e:
            raise DataError(f"{self.source.where(index)} cannot be read ({e}); mend it, or remove it and say so beside the score") from e


def _images(
    source: Source, indices: Int[np.ndarray, " n"], view: View, loading: Loading, forms: int = 1
) -> Iterator[Float[Tensor, "b s c h w"]]:
    """Batches of pixels in 0 to 1, on the device, in the order of the indices."""
    if not len(indices):
        raise DataError(f"{source.name} has no image with a known label")
    loader = DataLoader(
        _Views(source, indices, view), math.ceil(loading.batch / forms), num_workers=loading.workers, worker_init_fn=quiet_worker,
        pin_memory=loading.device.type == "cuda",
    )  # fmt: skip
    done = 0
    with loading.progress(source.name, len(indices)) as tick:
        for pixels in plain_errors(loader):
            yield pixels.to(loading.device, non_blocking=True).float() / 255
            tick(done := done + len(pixels))


@torch.no_grad()
def predictions(
    models: dict[str, Model], source: Source, indices: Int[np.ndarray, " n"], view: View, loading: Loading, forms: int = 1
) -> Iterator[tuple[slice, dict[str, Float[Tensor, "b s k"]]]]:
    """Which of the `indices` a batch is, and each model's logits of their views, of which `view` makes `forms` an image."""
    first = 0
    for pixels in _images(source, indices, view, loading, forms):
        flat, part = pixels.flatten(0, 1), slice(first, first + len(pixels))
        yield part, {name: model(flat).float().unflatten(0, pixels.shape[:2]) for name, model in models.items()}
        first = part.stop


def _known(source: Source, labels: Labels) -> Int[np.ndarray, " n"]:
    if len(labels) != len(source):
        raise DataError(f"{len(labels)} labels for the {len(source)} images of {source.name}")
    return np.flatnonzero(labels >= 0)


def labels_for(source: Source, classes: Sequence[str]) -> Labels:
    """A source's labels as columns of a model with these classes, by name. DataError if it has none, or a class that is not the model's."""
    if source.labels is None:
        raise DataError(f"{source.name} has no labels; give a folder with a folder for each class")
    place = np.append(columns(classes, source.classes), -1)  # the last for labels of -1
    return place[source.labels]


def _plain(image: UInt8[np.ndarray, "h w c"], index: int, shape: tuple[int, int]) -> UInt8[Tensor, "1 c ch cw"]:
    return center(image, shape)[None]


class Said(NamedTuple):
    """Of one model and every image: whether it is right, and how sure it is (its largest softmax probability). For `metrics.ece`."""

    right: Right
    confidence: Float[np.ndarray, " n"]


def clean(models: dict[str, Model], source: Source, labels: Labels, loading: Loading) -> dict[str, Said]:
    """The images as they are, in the evaluation view; those with a label of -1 are left out, here as everywhere."""
    indices = _known(source, labels)
    said = {name: Said(np.zeros(len(indices), bool), np.zeros(len(indices))) for name in models}
    for part, logits in predictions(models, source, indices, functools.partial(_plain, shape=loading.shape), loading):
        for name, values in logits.items():
            confidence, answer = (x[:, 0].cpu().numpy() for x in values.softmax(2).max(2))
            said[name].right[part], said[name].confidence[part] = answer == labels[indices[part]], confidence
    return said


# Corruptions.


@dataclass(frozen=True)
class Corrupted:
    """One model on corrupted images. `kind` says of which set: C-style numbers and ImageNet-C's do not compare."""

    kind: str
    right: dict[str, Bool[np.ndarray, "s n"]]
    "by corruption, then severity and image"
    published: bool
    "whether it is all of ImageNet-C, with its 15 corruptions, 5 severities and 1,000 classes"

    @property
    def errors(self) -> Errors:
        """By corruption, percent by severity."""
        return {name: (100 * (1 - right.mean(1))).tolist() for name, right in self.right.items()}

    @property
    def mean_error(self) -> float:
        """The plain mean over corruptions and severities, in percent; not mCE."""
        return mean_error(self.errors)

    @property
    def mce(self) -> float | None:
        """AlexNet has 100. Of the published set alone: AlexNet's errors are of it."""
        return mean_corruption_error(self.errors) if self.published else None


def _severities(
    image: UInt8[np.ndarray, "h w c"], index: int, shape: tuple[int, int], corruption: str, severities: tuple[int, ...], seed: int
) -> UInt8[Tensor, "s c ch cw"]:
    picture = center(image, shape).permute(1, 2, 0).numpy()
    return torch.from_numpy(np.stack([corrupt(picture, corruption, s, seed, index) for s in severities])).permute(0, 3, 1, 2)


def corrupted(
    models: dict[str, Model], source: Source, labels: Labels, loading: Loading, seed: int = 0,
    corruptions: Sequence[str] = STANDARD, severities: tuple[int, ...] = SEVERITIES, say: Say = lambda text: None,
) -> dict[str, Corrupted]:  # fmt: skip
    """C-style: the evaluation view of each image is corrupted, once for all models. `say` gets a line after each corruption."""
    indices = _known(source, labels)
    right = {name: {} for name in models}
    with loading.passes("corruptions", len(corruptions) * len(indices)) as loading:
        for corruption in corruptions:
            view = functools.partial(_severities, shape=loading.shape, corruption=corruption, severities=severities, seed=seed)
            for name in models:
                right[name][corruption] = np.zeros((len(severities), len(indices)), bool)
            for part, logits in predictions(models, source, indices, view, loading, len(severities)):
                for name, values in logits.items():
                    right[name][corruption][:, part] = (values.argmax(2).cpu().numpy() == labels[indices[part], None]).T
            say(_line(corruption, {name: right[name][corruption] for name in models}))
    return {name: Corrupted(C_STYLE, right[name], published=False) for name in models}


def _line(corruption: str, right: dict[str, Bool[np.ndarray, "s n"]]) -> str:
    cells = [f"{name} {' '.join(f'{100 * (1 - share):.1f}' for share in hits.mean(1))}" for name, hits in right.items()]
    return f"{corruption}, error by severity in percent: {'; '.join(cells)}"


def _stored(image: UInt8[np.ndarray, "h w c"], index: int, shape: tuple[int, int]) -> UInt8[Tensor, "1 c h w"]:
    if image.shape[:2] != shape:
        raise BadImage(f"{image.shape[0]} x {image.shape[1]}, and the model takes {shape[0]} x {shape[1]}: ImageNet-C is read as stored")
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def _places(root: Path) -> dict[tuple[str, int], Path]:
    """The folder of each corruption and severity."""
    return {(c, s): root / c / str(s) for c in STANDARD for s in SEVERITIES}


def check_imagenet_c(root: Path, classes: Sequence[str], shape: tuple[int, int]) -> None:
    """Before any work. DataError names folders of all ImageNet-C that are missing, classes, or the first image's size."""
    places = _places(root)
    if missing := [f"{c}/{s}" for (c, s), place in places.items() if not place.is_dir()]:
        raise DataError(f"{root} is not all of ImageNet-C: {_some(missing)} of corruption/severity missing; unpack all of its archives")
    for place in places.values():
        _folders(place, classes)
    source, _ = published(next(iter(places.values())), classes, classes)
    _Views(source, np.arange(1), functools.partial(_stored, shape=shape))[0]


def imagenet_c(
    models: dict[str, Model], root: Path, classes: Sequence[str], loading: Loading, say: Say = lambda text: None
) -> dict[str, Corrupted]:
    """The published set, `root/corruption/severity/wnid/*.JPEG`, pixels as stored. DataError names what is missing, when its turn comes."""
    right = {name: {c: [] for c in STANDARD} for name in models}
    places = _places(root)
    first, _ = published(next(iter(places.values())), classes, classes)
    with loading.passes(IMAGENET_C, len(places) * len(first)) as loading:
        for (corruption, severity), place in places.items():
            source, labels = published(place, classes, classes)
            if not np.array_equal(source.names.data, first.names.data):
                raise DataError(
                    f"{place} holds {len(source)} images, and {first.name} {len(first)}, not of the same names; unpack both again"
                )
            hits = _hits(models, source, labels, functools.partial(_stored, shape=loading.shape), loading)
            for name in models:
                right[name][corruption].append(hits[name])
            if severity == SEVERITIES[-1]:
                say(_line(corruption, {name: np.stack(right[name][corruption]) for name in models}))
    whole = set(classes) == set(imagenet_classes())
    return {name: Corrupted(IMAGENET_C, {c: np.stack(parts) for c, parts in right[name].items()}, whole) for name in models}


# Sets in folders.


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _folders(root: Path, wanted: Sequence[str]) -> list[str]:
    """The class folders, which must be the `wanted` ones. DataError names what is missing or extra."""
    if not root.is_dir():
        raise DataError(f"{root} is no folder; give the one that holds the class folders")
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if lacking := sorted(set(wanted) - set(folders)):
        raise DataError(f"{root} has {len(folders)} class folders; {_some(lacking)} of {len(wanted)} missing")
    if extra := sorted(set(folders) - set(wanted)):
        raise DataError(f"{root} has {len(folders)} class folders; {_some(extra)} not among the {len(wanted)} of this set")
    return folders


def published(root: Path, classes: Sequence[str], wanted: Sequence[str]) -> tuple[Files, Labels]:
    """The images of a set with a folder for each of the `wanted` classes, and their columns. DataError names what is missing or extra."""
    folders = _folders(root, wanted)
    source = open_source(str(root))
    if not isinstance(source, Files) or source.labels is None or (source.labels < 0).any():
        raise DataError(f"{root} must hold images in class folders, and nothing beside them")
    if empty := sorted(set(folders) - set(source.classes)):
        raise DataError(f"{root} has empty class folders: {_some(empty)}")
    return source, labels_for(source, classes)


def _hits(models: dict[str, Model], source: Source, labels: Labels, view: View, loading: Loading) -> dict[str, Right]:
    """Argmax over all logits."""
    indices = _known(source, labels)
    right = {name: np.zeros(len(indices), bool) for name in models}
    for part, logits in predictions(models, source, indices, view, loading):
        for name, values in logits.items():
            right[name][part] = values[:, 0].argmax(1).cpu().numpy() == labels[indices[part]]
    return right


class Subset(NamedTuple):
    """Which images are right by the largest logit among the set's own 200 classes (as published), and among all of the model's."""

    among_own: Right
    among_all: Right


def synsets(which: str) -> list[str]:
    """The 200 classes of ImageNet-A ("a") or -R ("r")."""
    return sorted(_timm(f"imagenet_{which}_synsets.txt").split())


def subset(models: dict[str, Model], root: Path, classes: Sequence[str], which: str, loading: Loading) -> dict[str, Subset]:
    """ImageNet-A (`which` "a") or -R ("r"): 200 wnid folders. Its accuracy is that among its own classes.

    So the authors evaluate (natural-adv-examples' eval.py; ImageNet-R: pytorch-image-models/issues/176). Among all classes it is lower.
    """
    own = synsets(which)
    source, labels = published(root, classes, own)
    place = torch.from_numpy(columns(classes, own)).to(loading.device)
    right = {name: Subset(np.zeros(len(labels), bool), np.zeros(len(labels), bool)) for name in models}
    everything, view = np.arange(len(labels)), functools.partial(_plain, shape=loading.shape)
    for part, logits in predictions(models, source, everything, view, loading):
        for name, values in logits.items():
            answers = place[values[:, 0, place].argmax(1)], values[:, 0].argmax(1)
            for hits, answer in zip(right[name], answers, strict=True):
                hits[part] = answer.cpu().numpy() == labels[part]
    return right


def sketch(models: dict[str, Model], root: Path, classes: Sequence[str], loading: Loading) -> dict[str, Right]:
    """ImageNet-Sketch: 1,000 wnid folders, all classes."""
    source, labels = published(root, classes, imagenet_classes())
    return _hits(models, source, labels, functools.partial(_plain, shape=loading.shape), loading)


def validation_images(root: Path, classes: Sequence[str]) -> tuple[Files, list[Int[np.ndarray, " k"]]]:
    """ImageNet's validation images, and of each the columns of all labels that people found right. DataError names what is none."""
    if not root.is_dir():
        raise DataError(f"{root} is no folder; give the one of ImageNet's validation images")
    source = open_source(str(root))
    if not isinstance(source, Files):
        raise DataError(f"{root} holds archives; unpack them")
    numbers = [re.search(rb"(?:^|/)ILSVRC2012_val_(\d{8})\.JPEG$", source.names[i]) for i in range(len(source))]
    real = json.loads(_timm("imagenet_real_labels.json"))
    if (other := next((i for i, n in enumerate(numbers) if n is None or not 1 <= int(n[1]) <= len(real)), None)) is not None:
        raise DataError(f"{source.where(other)} is no image of ImageNet's validation set, by its name")
    place = columns(classes, imagenet_classes())
    return source, [place[real[int(n[1]) - 1]] for n in numbers if n]


def real_labels(models: dict[str, Model], root: Path, classes: Sequence[str], loading: Loading) -> dict[str, Right]:
    """ReaL (Beyer et al. 2020): ImageNet's validation images against all labels that people found right, by file name.

    `root` holds ILSVRC2012_val_00000001.JPEG and so on, flat or in folders. Images for which no label was found right are left out:
    3,163 of the 50,000.
    """
    source, right_ones = validation_images(root, classes)
    indices = np.array([i for i, ones in enumerate(right_ones) if len(ones)], dtype=np.int64)
    right = {name: np.zeros(len(indices), bool) for name in models}
    for part, logits in predictions(models, source, indices, functools.partial(_plain, shape=loading.shape), loading):
        for name, values in logits.items():
            answers = values[:, 0].argmax(1).cpu().numpy()
            right[name][part] = [answer in right_ones[i] for answer, i in zip(answers, indices[part], strict=True)]
    return right


def _timm(name: str) -> str:
    """A list that comes with timm."""
    return files("timm.data").joinpath("_info", name).read_text(encoding="utf-8")


# Attacks.


@dataclass(frozen=True)
class Attacked:
    """One model, the same images under every attack, by its name; "clean" is none. `checks`: the sanity checks of each PGD attack."""

    right: dict[str, Right]
    checks: dict[str, dict[str, Check]]


def adversarial(
    models: dict[str, Model], source: Source, labels: Labels, attacks: Sequence[Attack], loading: Loading, limit: int | None = None,
    seed: int = 0, say: Say = lambda text: None, checked: int = CHECKED,
) -> dict[str, Attacked]:  # fmt: skip
    """Accuracy under attacks, on `limit` images drawn by the seed from all (the same for all models), or on all.

    `say` gets a line for each sanity check, on the first `checked` images, and each attack. Models are attacked each by itself, in
    evaluation mode and without autocast.
    """
    if len({attack.name for attack in attacks}) < len(attacks):
        raise ConfigError("two attacks have the same name; leave one out")
    indices = _known(source, labels)
    if limit is not None and limit < len(indices):
        draws = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(b"limit")]))
        indices = np.sort(draws.choice(indices, limit, replace=False))
    view = functools.partial(_plain, shape=loading.shape)
    found = {name: Attacked({a: np.zeros(len(indices), bool) for a in ("clean", *(a.name for a in attacks))}, {}) for name in models}
    first, done = 0, 0
    with loading.progress("attacks", len(indices) * len(attacks) * len(models)) as tick:
        for pixels in _images(source, indices, view, replace(loading, progress=unshown)):
            images, part = pixels[:, 0], slice(first, first + len(pixels))
            truth = torch.from_numpy(labels[indices[part]]).to(loading.device)
            for name, model in models.items():
                if first == 0 and checked:
                    some = [x[: min(checked, loading.batch)] for x in (images, truth)]
                    found[name].checks.update({a.name: sanity(model, *some, a, seed) for a in attacks if a.steps > 1})
                    for attack, checks in found[name].checks.items():
                        for what, check in checks.items():
                            say(f"{name}, {attack}: {what}: {'yes' if check.holds else 'NO'} ({check.saw}, {len(some[0])} images)")
                with torch.no_grad():
                    found[name].right["clean"][part] = (model(images).argmax(1) == truth).cpu().numpy()
                for attack in attacks:
                    hits = attacked(model, images, truth, attack, seed, indices[part].tolist())[1]
                    found[name].right[attack.name][part] = hits.cpu().numpy()
                    tick(done := done + len(images))
            first = part.stop
    for name, one in found.items():
        say(f"{name}, percent right: " + ", ".join(f"{attack} {100 * hits.mean():.1f}" for attack, hits in one.right.items()))
    return found
