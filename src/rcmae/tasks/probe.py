"""Online probes: is the backbone learning anything? Linear and k-NN accuracy on a small labelled subset."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

from ..config import Recipe
from ..data.dataset import read_image
from ..data.decode import BadImage
from ..data.digits import DigitsSource
from ..data.sources import Source
from ..data.views import center
from ..models.backbone import Backbone
from .features import mean_patches
from .knn import knn_accuracy
from .linear import linear_accuracy

Scores = dict[str, float]


@dataclass(frozen=True)
class ProbeSet:
    """Labelled images for fitting and for scoring."""

    train: UInt8[Tensor, "n c h w"]
    labels: Int[np.ndarray, " n"]
    test: UInt8[Tensor, "m c h w"]
    truth: Int[np.ndarray, " m"]

    def scores(self, train: np.ndarray, test: np.ndarray) -> Scores:
        """Percent right of both probes on given features."""
        sets = (train, self.labels, test, self.truth)
        return {"linear": linear_accuracy(*sets), "knn": knn_accuracy(*sets)}

    def pixels(self) -> Scores:
        """The floor that needs no network: raw pixels, of at most 32 a side."""
        side = [min(s, 32) for s in self.train.shape[2:]]
        return self.scores(*(F.adaptive_avg_pool2d(x.float() / 255, side).flatten(1).numpy() for x in (self.train, self.test)))

    def backbone(self, backbone: Backbone, device: torch.device, precision: str) -> Scores:
        """Mean-pooled patch tokens of a backbone."""
        return self.scores(*(mean_patches(backbone, x, device, precision) for x in (self.train, self.test)))


def probe_set(source: Source, recipe: Recipe) -> ProbeSet | None:
    """The probe's images: the embedded set's own test split, else two parts of a labelled source; None without labels.

    Pre-training has seen the images of both parts (not the labels); what is in the first part is left out of the second.

    A labelled source gives at most one class in twenty training images, so that each has enough of them.
    """
    p = recipe.probe
    if p.probes == 0 or source.labels is None:
        return None
    if source.kind == "embedded":
        size = recipe.images.size
        parts = [DigitsSource("train", p.probe_train, size, recipe.seed + 1), DigitsSource("test", p.probe_test, size, recipe.seed)]
        read = [_read(part, np.arange(len(part)), recipe) for part in parts]
    else:
        rng = np.random.Generator(np.random.Philox(key=recipe.seed))
        classes = np.unique(source.labels[source.labels >= 0])
        classes = classes[np.linspace(0, len(classes) - 1, min(len(classes), max(2, p.probe_train // 20))).astype(int)]
        chosen = rng.permutation(np.flatnonzero(np.isin(source.labels, classes)))[: p.probe_train + p.probe_test]
        cut = len(chosen) * p.probe_train // (p.probe_train + p.probe_test)
        read = [_read(source, part, recipe) for part in (chosen[:cut], chosen[cut:])]
    (train, labels), (test, truth) = read
    known = {image.numpy().tobytes() for image in train}
    new = np.array([image.numpy().tobytes() not in known for image in test], dtype=bool)
    test, truth = test[torch.from_numpy(new)], truth[new]
    if len(np.unique(labels)) < 2 or not len(truth):
        return None
    return ProbeSet(train, labels, test, truth)


def _read(source: Source, indices: np.ndarray, recipe: Recipe) -> tuple[Tensor, np.ndarray]:
    images, labels = [], []
    for i in indices:
        try:
            image = read_image(source, int(i), recipe.images.channels)
        except BadImage:
            continue  # the training loop counts and names it
        images.append(center(image, recipe.images.shape))
        labels.append(source.labels[i])
    shape = (0, recipe.images.channels, *recipe.images.shape)
    return torch.stack(images) if images else torch.zeros(shape, dtype=torch.uint8), np.array(labels, dtype=np.int64)
