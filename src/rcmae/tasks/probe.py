"""Online probes: linear, k-NN and attentive accuracy of the backbone on a small labeled subset, measured
during pre-training."""

import functools
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ..config import Recipe, how_many
from ..data.decode import BadImage
from ..data.pixels import open_image
from ..data.sources import Source
from ..data.views import center
from ..engine.checkpoint import replace_file
from ..engine.console import ShowProgress, no_progress
from ..engine.metrics import BASELINES, INITIAL, KINDS, PIXELS, RANDOM, of_kind
from ..models.backbone import Backbone
from .attentive_probe import attentive_correct
from .features import features
from .interval import with_margin
from .linear_probe import linear_correct, predict
from .nearest_neighbors import NearestNeighbors

Scores = dict[str, float]
Correct = dict[str, Bool[np.ndarray, " m"]]
"By probe, which test images it classifies correctly."

TEST_IMAGE_KEY = "test images"
"Key of the numbers of the test images, beside the results of the probes."

KNN_NOTE = (
    "The linear probe is the main metric: distances, and so k-NN, depend most on the directions of largest "
    "variance, which often describe color and background."
)


def accuracies(correct: Correct) -> Scores:
    """Accuracy in percent by probe."""
    return {probe: 100 * float(c.mean()) for probe, c in correct.items()}


@dataclass(frozen=True)
class ProbeSet:
    """Labeled images for fitting and for scoring."""

    train: UInt8[Tensor, "n c h w"]
    labels: Int[np.ndarray, " n"]
    test: UInt8[Tensor, "m c h w"]
    truth: Int[np.ndarray, " m"]
    samples: Int[np.ndarray, " m"] | None = None
    "of the test images, see `Source.samples`"

    def test_hash(self) -> str:
        """Identifies the test images and their labels. A resumed run reads them again, without those that
        have become unreadable."""
        return hashlib.sha256(self.test.numpy().tobytes() + self.truth.tobytes()).hexdigest()

    def test_images(self) -> Int[np.ndarray, " m"]:
        """A number for each test image: of its sample if the source knows it, otherwise of its pixels."""
        if self.samples is not None:
            return self.samples
        hashes = (hashlib.sha256(image.numpy().tobytes()).digest() for image in self.test)
        return np.array([int.from_bytes(h[:8], "little", signed=True) for h in hashes])

    def probe_features(self, train: Float[np.ndarray, "n d"], test: Float[np.ndarray, "m d"]) -> Correct:
        """The results of the linear and the k-NN probe on features."""
        knn = NearestNeighbors(
            torch.from_numpy(train),
            torch.from_numpy(self.labels),
            int(self.labels.max()) + 1,
            min(20, len(train)),
        )
        return {
            "linear": linear_correct(train, self.labels, test, self.truth),
            "knn": predict(knn, torch.from_numpy(test)) == self.truth,
        }

    def pixels(self) -> Correct:
        """The baseline without a network: raw pixels, downsampled to at most 32 x 32."""
        h, w = (min(side, 32) for side in self.train.shape[2:])
        train, test = (
            F.adaptive_avg_pool2d(x.float() / 255, (h, w)).flatten(1).numpy() for x in (self.train, self.test)
        )  # [n, c * h * w]
        return self.probe_features(train, test)

    def backbone(
        self,
        backbone: Backbone,
        device: torch.device,
        precision: str,
        attentive: bool = False,
        progress: ShowProgress = no_progress,
        name: str = "",
    ) -> Correct:
        """The results on a backbone: the linear and the k-NN probe use the mean over the patches, the
        attentive one, if requested, all tokens."""
        extract = functools.partial(features, backbone, device=device, precision=precision, tokens=attentive)
        with progress(f"probing {name}", len(self.train) + len(self.test)) as tick:
            train, tokens = extract(self.train, tick=tick)
            test, test_tokens = extract(self.test, tick=lambda done: tick(len(self.train) + done))
        correct = self.probe_features(train, test)
        if tokens is not None and test_tokens is not None:
            correct["attentive"] = attentive_correct(tokens, self.labels, test_tokens, self.truth)
        return correct


def size_note(probe_images: ProbeSet, source: Source, recipe: Recipe) -> str:
    """A note on the number of images of the probes if it is lower than the recipe requests or some images
    have no label; otherwise empty."""
    assert source.labels is not None  # without labels there is no ProbeSet
    p, unlabeled = recipe.probe, int(np.count_nonzero(source.labels < 0))
    train, test = len(probe_images.train), len(probe_images.test)
    if train >= p.probe_train and test >= p.probe_test and not unlabeled:
        return ""
    text = (
        f"the probes are fitted on {how_many(train, 'labeled image')} and scored on {test:,} "
        f"({p.probe_train:,} and {p.probe_test:,} were requested)"
    )
    if unlabeled:
        text += f"; {unlabeled:,} of {how_many(len(source), 'image')} without a label"
    return text


class Probes:
    """The probes of a run: accuracy in percent by network. The results for each test image are written to
    probes/, for paired comparisons."""

    def __init__(
        self,
        probe_set: ProbeSet,
        run: Path,
        device: torch.device,
        precision: str,
        attentive: Literal["last", "every", "never"],
        progress: ShowProgress,
    ):
        self.set, self.folder, self.attentive = probe_set, run / "probes", attentive
        self.device, self.precision, self.progress = device, precision, progress

    def baselines(self, random_init: Backbone) -> tuple[dict[str, Scores], float]:
        """The baselines: scores of raw pixels and of the randomly initialized encoder; and the seconds that
        probing a network takes."""
        started = time.monotonic()
        correct = self._correct("randomly initialized encoder", random_init, last=True)
        seconds = time.monotonic() - started
        return self._keep({"raw_pixels": self.set.pixels(), "random_init": correct}, 0), seconds

    def initial(self, backbone: Backbone) -> dict[str, Scores]:
        """One more baseline: the weights that a run starts from."""
        correct = self._correct(INITIAL, backbone, last=True)
        return self._keep({"initial_weights": correct}, 0, load_file(self._file(0)))

    def score(self, backbones: dict[str, Backbone], step: int, last: bool) -> dict[str, Scores]:
        """Scores of the networks after an optimizer step, which is the `last` one or not."""
        correct = {name: self._correct(name, backbone, last) for name, backbone in backbones.items()}
        return self._keep(correct, step)

    def _correct(self, name: str, backbone: Backbone, last: bool) -> Correct:
        attentive = self.attentive == "every" or (self.attentive == "last" and last)
        return self.set.backbone(
            backbone, self.device, self.precision, attentive, self.progress, f"the {name}"
        )

    def _file(self, step: int) -> Path:
        return self.folder / f"{step:08d}.safetensors"

    def _keep(
        self, correct: dict[str, Correct], step: int, before: dict[str, Tensor] | None = None
    ) -> dict[str, Scores]:
        self.folder.mkdir(exist_ok=True)
        tensors = (before or {}) | {
            f"{network}/{probe}": torch.from_numpy(c)
            for network, by_probe in correct.items()
            for probe, c in by_probe.items()
        }
        tensors[TEST_IMAGE_KEY] = torch.from_numpy(self.set.test_images())
        about = {"test": self.set.test_hash()}
        replace_file(self._file(step), save(tensors, about))
        return {network: accuracies(by_probe) for network, by_probe in correct.items()}


def probe_set(source: Source, recipe: Recipe, progress: ShowProgress = no_progress) -> ProbeSet | None:
    """The images of the probes: those that the source reserves for probes, or two parts of it; None without
    labels.

    Pre-training uses the images of two such parts (not the labels). Images of the first part are removed from
    the second. There is at most one class per twenty training images, so that each class has enough of them.
    `progress` shows the reading.
    """
    p = recipe.probe
    if p.probes == 0 or source.labels is None:
        return None
    if parts := source.for_probes(p.probe_train, p.probe_test, recipe.seed):
        read = [read_images(part, np.arange(len(part)), recipe, progress) for part in parts]
    else:
        rng = np.random.Generator(np.random.Philox(key=recipe.seed))
        classes = np.unique(source.labels[source.labels >= 0])
        count, wanted = min(len(classes), max(2, p.probe_train // 20)), p.probe_train + p.probe_test
        classes = classes[np.linspace(0, len(classes) - 1, count).astype(int)]
        chosen = rng.permutation(np.flatnonzero(np.isin(source.labels, classes)))[:wanted]
        cut = len(chosen) * p.probe_train // wanted
        read = [read_images(source, part, recipe, progress) for part in (chosen[:cut], chosen[cut:])]
    (train, labels, _), (test, truth, samples) = read
    train_images = {image.numpy().tobytes() for image in train}
    new = np.array([image.numpy().tobytes() not in train_images for image in test], dtype=bool)
    test, truth = test[torch.from_numpy(new)], truth[new]
    if len(np.unique(labels)) < 2 or not len(truth):
        return None
    return ProbeSet(train, labels, test, truth, None if samples is None else samples[new])


def read_images(
    source: Source, indices: np.ndarray, recipe: Recipe, progress: ShowProgress
) -> tuple[Tensor, np.ndarray, np.ndarray | None]:
    """The readable ones of these images, center-cropped to the size of the recipe, their labels, and their
    samples if the source knows them."""
    assert source.labels is not None  # probe_set returns None without labels
    images, readable = [], []
    with progress("reading labeled images for the probes", len(indices)) as tick:
        for done, i in enumerate(indices, 1):
            tick(done)
            try:
                image = open_image(source, int(i), recipe.images.channels)
                images.append(center(image, recipe.images.shape))
            except BadImage:
                continue  # pre-training counts and reports it
            readable.append(i)
    labels, samples = source.labels[readable], source.samples()
    none = torch.zeros(0, recipe.images.channels, *recipe.images.shape, dtype=torch.uint8)
    pixels = torch.stack(images) if images else none
    return pixels, labels, None if samples is None else samples[readable]


def final_correct(run: Path, lines: list[dict[str, Any]]) -> dict[str, Correct]:
    """The results for each test image of the baselines and, in the last probe, of every network, by their
    names; empty without probes, and without results where their file is missing. Baselines on other test
    images than those of the last probe are left out, since results are compared image by image."""
    baselines = of_kind(lines, "baseline")[:1]
    results: dict[str, Correct] = {PIXELS: {}, RANDOM: {}} if baselines else {}
    compared: tuple[Any, ...] | None = None
    for line in [*of_kind(lines, "probe")[-1:], *baselines]:
        try:
            with safe_open(run / "probes" / f"{line['step']:08d}.safetensors", "np") as file:
                about, names = file.metadata() or {}, file.keys()
                tensors = {name: file.get_tensor(name) for name in names if name != TEST_IMAGE_KEY}
        except (OSError, SafetensorError):
            continue
        images = about.get("test"), *{len(correct) for correct in tensors.values()}
        compared = compared or images
        for key, correct in tensors.items() if images == compared else ():
            network, _, probe = key.partition("/")
            name = BASELINES.get(network, network)
            results.setdefault(name, {})[probe] = correct.astype(bool)
    return results


def final_scores(lines: list[dict[str, Any]]) -> dict[str, Scores]:
    """From the records of a run, the scores of the baselines and, in the last probe, of every network; empty
    without probes."""
    baselines, probes = of_kind(lines, "baseline"), of_kind(lines, "probe")
    if not baselines:
        return {}
    first, last = baselines[0], probes[-1] if probes else {}
    scores = {text: first[name] for name, text in BASELINES.items() if name in first}
    return scores | {name: s for name, s in last.items() if isinstance(s, dict)}


def score_table(scores: dict[str, Scores], images: int = 0) -> tuple[list[str], list[list[str]]]:
    """The names of the probes, and for each network its name and accuracies in percent, empty where it was
    not measured, with their margins if the number of test `images` is known."""
    kinds = [kind for kind in KINDS if any(kind in s for s in scores.values())]
    rows = [
        [name, *(with_margin(s[k], images) if k in s else "" for k in kinds)] for name, s in scores.items()
    ]
    return [KINDS[k] for k in kinds], rows


def image_count(correct: dict[str, Correct]) -> int:
    """The number of test images of the probes; 0 without results."""
    return max((len(c) for by_probe in correct.values() for c in by_probe.values()), default=0)
