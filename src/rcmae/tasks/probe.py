"""Online probes: is the backbone learning anything? Linear, k-NN and attentive accuracy on a small labelled subset."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from ..config import Recipe
from ..data.decode import BadImage
from ..data.pixels import read_image
from ..data.sources import Source
from ..data.views import center
from ..models.backbone import Backbone
from .attentive import attentive_right
from .features import features
from .knn import Knn
from .linear import linear_right, said

Scores = dict[str, float]
Right = dict[str, Bool[np.ndarray, " m"]]
"By probe, which test images it got right."


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
            "knn": said(near, torch.from_numpy(test)) == self.truth,
        }

    def pixels(self) -> Right:
        """The floor that needs no network: raw pixels, of at most 32 a side."""
        side = [min(s, 32) for s in self.train.shape[2:]]
        return self.right(*(F.adaptive_avg_pool2d(x.float() / 255, side).flatten(1).numpy() for x in (self.train, self.test)))

    def backbone(self, backbone: Backbone, device: torch.device, precision: str) -> Right:
        """Of a backbone, linear and k-NN probe see the mean over the patches, the attentive one all tokens."""
        (train, tokens), (test, test_tokens) = (
            features(backbone, x, device, precision, tokens=self.attentive) for x in (self.train, self.test)
        )
        right = self.right(train, test)
        if tokens is not None and test_tokens is not None:
            right["attentive"] = attentive_right(tokens, self.labels, test_tokens, self.truth)
        return right


def probe_set(source: Source, recipe: Recipe, tick: Callable[[int], None] = lambda done: None) -> ProbeSet | None:
    """The probe's images: what the source has for probes, else two parts of it; None without labels.

    Pre-training has seen the images of both parts (not the labels); what is in the first part is left out of the second.

    A labelled source gives at most one class in twenty training images, so that each has enough of them. `tick` is told how many of at
    most probe_train + probe_test images are read.
    """
    p = recipe.probe
    if p.probes == 0 or source.labels is None:
        return None
    if parts := source.for_probes(p.probe_train, p.probe_test, recipe.seed):
        chosen = [(part, np.arange(len(part))) for part in parts]
    else:
        rng = np.random.Generator(np.random.Philox(key=recipe.seed))
        classes = np.unique(source.labels[source.labels >= 0])
        classes = classes[np.linspace(0, len(classes) - 1, min(len(classes), max(2, p.probe_train // 20))).astype(int)]
        drawn = rng.permutation(np.flatnonzero(np.isin(source.labels, classes)))[: p.probe_train + p.probe_test]
        cut = len(drawn) * p.probe_train // (p.probe_train + p.probe_test)
        chosen = [(source, drawn[:cut]), (source, drawn[cut:])]
    done = itertools.count()
    (train, labels), (test, truth) = (_read(part, indices, recipe, lambda: tick(next(done))) for part, indices in chosen)
    known = {image.numpy().tobytes() for image in train}
    new = np.array([image.numpy().tobytes() not in known for image in test], dtype=bool)
    test, truth = test[torch.from_numpy(new)], truth[new]
    if len(np.unique(labels)) < 2 or not len(truth):
        return None
    return ProbeSet(train, labels, test, truth, p.attentive)


def _read(source: Source, indices: np.ndarray, recipe: Recipe, tick: Callable[[], None]) -> tuple[Tensor, np.ndarray]:
    images, labels = [], []
    for i in indices:
        tick()
        try:
            image = read_image(source, int(i), recipe.images.channels)
        except BadImage:
            continue  # the training loop counts and names it
        images.append(center(image, recipe.images.shape))
        labels.append(source.labels[i])
    shape = (0, recipe.images.channels, *recipe.images.shape)
    return torch.stack(images) if images else torch.zeros(shape, dtype=torch.uint8), np.array(labels, dtype=np.int64)
