"""A backbone, a labeled data set and the evaluation options, with cached feature extraction: what a task gets, and what it returns."""

import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..data.dataset import Bad, Images
from ..data.labelled import Labelled
from ..data.loader import batches_of
from ..data.sampler import BatchSampler
from ..data.sources import Subset
from ..data.views import Image, center, flip, random_resized_crop
from ..engine.console import Screen
from ..engine.distributed import World
from ..models.backbone import Backbone, Features, Pixels
from ..models.classifier import Classifier
from .evaluation.base import Evaluation
from .features import ExtractedFeatures, extract
from .score import Scored, score
from .splits import PERCENTS, read_split, write_splits

T = TypeVar("T")


class TaskResult(NamedTuple):
    """Metrics, which test images were right, the model (pixels in 0 to 1 to logits), and the settings it was given or chose."""

    metrics: dict[str, float]
    right: Bool[np.ndarray, " m"]
    model: nn.Module
    settings: dict[str, Any]
    details: dict[str, Any] | None = None
    more: dict[str, Bool[np.ndarray, "..."]] | None = None
    seconds: float | None = None
    "where the work was done before, or in parts"


class ProbedModel(nn.Module):
    """A frozen backbone with a layer on what it makes of pixels in 0 to 1: logits "b c"."""

    def __init__(self, backbone: nn.Module, feature: Literal["mean", "cls", "tokens"], layer: nn.Module):
        super().__init__()
        self.backbone, self.feature, self.layer = backbone, feature, layer

    def forward(self, images: Float[Tensor, "b channels h w"]) -> Float[Tensor, "b c"]:
        return self.layer(getattr(self.backbone(images), self.feature))


@dataclass
class EvaluationContext:
    """A backbone, a labeled data set and the evaluation options, with cached feature extraction."""

    name: str
    which: str
    backbone: Backbone | Pixels
    set: Labelled
    options: Evaluation
    device: torch.device
    world: World
    screen: Screen
    precision: str
    classifier: tuple[Classifier, list[str]] | None = None
    "where the backbone came with a head: the whole, and its classes"
    extracted: dict[tuple[str, bool], ExtractedFeatures] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        return self.options.cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rcmae"

    def part(self, part: Literal["train", "test"]) -> Subset:
        """The test part, or of the training part the images whose labels are used."""
        if part == "test":
            return self.set.test
        return self.set.train if self.options.labels == 100 else Subset(self.set.train, self.split())

    def split(self) -> Int[np.ndarray, " k"]:
        """The images whose labels are used, from a file that all backbones share."""
        train, folder = self.set.train, self.cache / "splits" / f"{self.set.train.fingerprint()[:16]}-{self.options.seed}"
        file = folder / f"labels-{self.options.labels:g}.json"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_splits(folder, train.labels, self.options.seed, sorted({*PERCENTS, self.options.labels}))
        return read_split(file, train.labels)

    def features(self, part: Literal["train", "test"], tokens: bool = False) -> ExtractedFeatures:
        """Features of a part, computed once and cached."""
        if (part, tokens) not in self.extracted:
            images = self.part(part)
            with self.screen.progress(f"features of {images.name}", len(images)) as tick:
                self.extracted[part, tokens] = extract(
                    self.backbone, images, cache=self.cache / "features", tokens=tokens, device=self.device, precision=self.precision,
                    world=self.world, workers=self.options.workers, tick=tick, note=self.note,
                )  # fmt: skip
        return self.extracted[part, tokens]

    def note(self, bad: list[Bad]) -> None:
        """Name images that cannot be read."""
        for _, where, reason in bad:
            self.screen.say(f"note: {where} cannot be read ({reason})")

    def fitted_on(self, tokens: bool = False) -> tuple[ExtractedFeatures, Int[np.ndarray, " n"]]:
        """Features of the readable training images, and their labels."""
        seen = self.features("train", tokens)
        if not seen.readable.all():
            seen = ExtractedFeatures(*(x[seen.readable] if x is not None else None for x in seen))
        return seen, seen.labels

    def hits(self, predicted: Int[np.ndarray, " m"], seen: ExtractedFeatures) -> Bool[np.ndarray, " m"]:
        """Which test images are right; one that cannot be read is wrong."""
        return (predicted == seen.labels) & seen.readable

    def score(self, model: nn.Module) -> Scored:
        """What a model of pixels makes of the test images."""
        test = self.set.test
        with self.screen.progress(f"scoring on {test.name}", len(test)) as tick:
            return score(
                model, test, shape=tuple(self.backbone.shape), channels=self.backbone.channels, device=self.device,
                precision=self.precision, workers=self.options.workers, note=self.note, tick=tick,
            )  # fmt: skip

    def crops(self, steps: int, batch: int, augment: bool) -> Iterator[tuple[Features, Int[Tensor, " b"]]]:
        """Batches of `steps`: what the backbone makes of new crops and flips in every pass (or of the same views), and labels."""
        part = self.part("train")
        sampler = BatchSampler(len(part), batch, start=0, stop=steps, seed=self.options.seed)
        view = functools.partial(_crop, shape=tuple(self.backbone.shape), augment=augment)
        crops = Images(part, view, self.options.seed, self.backbone.channels, labelled=True)
        backbone = self.backbone.to(self.device).eval()
        batches = batches_of(crops, sampler, part, self.options.workers, self.device, self.note)
        for images in self.counted("fitting on new crops", steps, batches):
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                seen = backbone(images["image"].float() / 255)
            yield seen, images["label"]

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """Progress of `total` steps: the body calls what it gets after each."""
        done = 0
        with self.screen.progress(what, total) as tick:

            def step() -> None:
                nonlocal done
                done += 1
                tick(done)

            yield step

    def counted(self, what: str, total: int, steps: Iterable[T]) -> Iterator[T]:
        """The same `steps`, with progress."""
        with self.counting(what, total) as tick:
            for step in steps:
                yield step
                tick()

    @torch.no_grad()
    def token_bytes(self) -> int:
        """What all tokens of both parts take in half precision."""
        grey = torch.full((1, self.backbone.channels, *self.backbone.shape), 0.5, device=self.device)
        return 2 * self.backbone.to(self.device).eval()(grey).tokens.numel() * (len(self.part("train")) + len(self.set.test))


def _crop(image: Image, draws: np.random.Generator, shape: tuple[int, int], augment: bool) -> dict[str, Tensor]:
    """A random crop (0.2 to 1 of the area) and flip, as MAE's linear probe is trained on, or the view of evaluation."""
    view = flip(random_resized_crop(image, shape, (0.2, 1.0), draws), draws) if augment else center(image, shape)
    return {"image": view.contiguous()}


def place(name: str, options: Evaluation) -> Path:
    """The folder that results of a backbone go to."""
    if options.out:
        return options.out
    path = Path(name)
    if (path / "recipe.toml").exists():
        return path / "evaluate"
    return Path("runs") / "evaluate" / (re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "backbone")


def stem(kind: str, which: str, options: Evaluation) -> str:
    """What a result's files are called: the task, the network, and what is unusual: the share of the labels, the seed."""
    share = "" if options.labels == 100 else f"-{options.labels:g}-percent"
    return f"{kind}-{which}{share}{f'-seed-{options.seed}' if options.seed else ''}"
