"""Online probes: is the backbone learning anything? Linear, k-NN and attentive accuracy on a small labelled subset."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from safetensors.torch import save
from torch import Tensor

from ..config import Recipe, how_many
from ..data.decode import BadImage
from ..data.pixels import read_image
from ..data.sources import Source
from ..data.views import center
from ..engine.checkpoint import replace_file
from ..engine.console import Screen
from ..engine.metrics import read_metrics
from ..models.backbone import Backbone
from .attentive_probe import attentive_right
from .features import features
from .knn import Knn
from .linear_probe import linear_right, predict

Scores = dict[str, float]
Right = dict[str, Bool[np.ndarray, " m"]]
"By probe, which test images it got right."

ShowProgress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""`with progress(what, total) as tick: tick(done)`, as `Screen.progress`."""


def percent(right: Right) -> Scores:
    """Accuracy by probe."""
    return {name: 100 * float(hits.mean()) for name, hits in right.items()}


@dataclass(frozen=True)
class ProbeSet:
    """Labelled images for fitting and for scoring."""

    train: UInt8[Tensor, "n c h w"]
    labels: Int[np.ndarray, " n"]
    test: UInt8[Tensor, "m c h w"]
    truth: Int[np.ndarray, " m"]
    attentive: bool = False

    def right(self, train: Float[np.ndarray, "n d"], test: Float[np.ndarray, "m d"]) -> Right:
        """What linear and k-NN probe make of given features."""
        near = Knn(torch.from_numpy(train), torch.from_numpy(self.labels), int(self.labels.max()) + 1, min(20, len(train)))
        return {
            "linear": linear_right(train, self.labels, test, self.truth),
            "knn": predict(near, torch.from_numpy(test)) == self.truth,
        }

    def pixels(self) -> Right:
        """The floor that needs no network: raw pixels, of at most 32 a side."""
        side = [min(s, 32) for s in self.train.shape[2:]]
        return self.right(*(F.adaptive_avg_pool2d(x.float() / 255, side).flatten(1).numpy() for x in (self.train, self.test)))

    def backbone(
        self, backbone: Backbone, device: torch.device, precision: str, progress: ShowProgress | None = None, name: str = ""
    ) -> Right:
        """Of a backbone, linear and k-NN probe see the mean over the patches, the attentive one all tokens."""
        with progress(f"probing {name}", len(self.train) + len(self.test)) if progress else nullcontext(lambda done: None) as tick:
            train, tokens = features(backbone, self.train, device, precision, tokens=self.attentive, tick=tick)
            test, test_tokens = features(
                backbone, self.test, device, precision, tokens=self.attentive, tick=lambda done: tick(len(self.train) + done)
            )
        right = self.right(train, test)
        if tokens is not None and test_tokens is not None:
            right["attentive"] = attentive_right(tokens, self.labels, test_tokens, self.truth)
        return right


def fewer(chosen: ProbeSet, source: Source, recipe: Recipe) -> str:
    """How many images the probes use, in words, where these are fewer than the recipe asks for or some have no label; else empty."""
    p, unlabelled = recipe.probe, int((source.labels < 0).sum())
    if len(chosen.train) >= p.probe_train and len(chosen.test) >= p.probe_test and not unlabelled:
        return ""
    text = f"the probes are fitted on {how_many(len(chosen.train), 'labelled image')} and scored on {len(chosen.test):,}"
    text += f" ({p.probe_train:,} and {p.probe_test:,} were asked for)"
    return text + (f"; {unlabelled:,} of {how_many(len(source), 'image')} without a label" if unlabelled else "")


class Probes:
    """The probes of one run: scores in percent by network; which test images were right is kept in probes/, for paired comparisons."""

    def __init__(self, chosen: ProbeSet, run: Path, device: torch.device, precision: str, progress: ShowProgress | None = None):
        self.set, self.folder, self.device, self.precision, self.progress = chosen, run / "probes", device, precision, progress

    def baselines(self, untrained: Backbone) -> tuple[dict[str, Scores], float]:
        """Scores that need no training, of raw pixels and of the encoder as it is drawn, and the seconds that probing a network takes."""
        started = time.monotonic()
        right = self._right("the untrained encoder", untrained)
        seconds = time.monotonic() - started
        return self._keep({"raw_pixels": self.set.pixels(), "untrained": right}, 0), seconds

    def score(self, backbones: dict[str, Backbone], step: int) -> dict[str, Scores]:
        """Scores of networks as they are at an optimizer step."""
        return self._keep({name: self._right(f"the {name}", backbone) for name, backbone in backbones.items()}, step)

    def _right(self, name: str, backbone: Backbone) -> Right:
        return self.set.backbone(backbone, self.device, self.precision, self.progress, name)

    def _keep(self, right: dict[str, Right], step: int) -> dict[str, Scores]:
        self.folder.mkdir(exist_ok=True)
        tensors = {f"{who}/{probe}": torch.from_numpy(hits) for who, of in right.items() for probe, hits in of.items()}
        replace_file(self.folder / f"{step:08d}.safetensors", save(tensors))
        return {who: percent(of) for who, of in right.items()}


def probe_set(source: Source, recipe: Recipe, progress: ShowProgress | None = None) -> ProbeSet | None:
    """The probe's images: what the source has for probes, else two parts of it; None without labels.

    Pre-training has seen the images of both parts (not the labels); what is in the first part is left out of the second.

    A labelled source gives at most one class in twenty training images, so that each has enough of them. `progress` is told how far
    reading is.
    """
    p = recipe.probe
    if p.probes == 0 or source.labels is None:
        return None
    if parts := source.for_probes(p.probe_train, p.probe_test, recipe.seed):
        read = [_read(part, np.arange(len(part)), recipe, progress) for part in parts]
    else:
        rng = np.random.Generator(np.random.Philox(key=recipe.seed))
        classes = np.unique(source.labels[source.labels >= 0])
        classes = classes[np.linspace(0, len(classes) - 1, min(len(classes), max(2, p.probe_train // 20))).astype(int)]
        chosen = rng.permutation(np.flatnonzero(np.isin(source.labels, classes)))[: p.probe_train + p.probe_test]
        cut = len(chosen) * p.probe_train // (p.probe_train + p.probe_test)
        read = [_read(source, part, recipe, progress) for part in (chosen[:cut], chosen[cut:])]
    (train, labels), (test, truth) = read
    known = {image.numpy().tobytes() for image in train}
    new = np.array([image.numpy().tobytes() not in known for image in test], dtype=bool)
    test, truth = test[torch.from_numpy(new)], truth[new]
    if len(np.unique(labels)) < 2 or not len(truth):
        return None
    return ProbeSet(train, labels, test, truth, p.attentive)


def _read(source: Source, indices: np.ndarray, recipe: Recipe, progress: ShowProgress | None) -> tuple[Tensor, np.ndarray]:
    images, labels = [], []
    with progress("reading labelled images for the probes", len(indices)) if progress else nullcontext(lambda done: None) as tick:
        for done, i in enumerate(indices, 1):
            tick(done)
            try:
                image = read_image(source, int(i), recipe.images.channels)
            except BadImage:
                continue  # training counts and names it
            images.append(center(image, recipe.images.shape))
            labels.append(source.labels[i])
    shape = (0, recipe.images.channels, *recipe.images.shape)
    return torch.stack(images) if images else torch.zeros(shape, dtype=torch.uint8), np.array(labels, dtype=np.int64)


def show_table(run: Path, screen: Screen) -> None:
    """The last table: the baselines, then every network."""
    lines = read_metrics(run)
    floor = next((line for line in lines if line["kind"] == "floor"), None)
    probe = next((line for line in reversed(lines) if line["kind"] == "probe"), None)
    if floor and probe:
        rows = {"raw pixels": floor["raw_pixels"], "untrained encoder": floor["untrained"]}
        rows |= {name: scores for name, scores in probe.items() if isinstance(scores, dict)}
        table = [[name, f"{s['linear']:.1f}", f"{s['knn']:.1f}"] for name, s in rows.items()]
        screen.table(f"Percent right at step {probe['step']:,}, on mean-pooled patches", ["", "linear probe", "k-NN"], table)
