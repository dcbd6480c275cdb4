"""The input of an evaluation task (a backbone, a labeled data set and the options, with cached feature
extraction), and its result."""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..data.dataset import Bad, Images
from ..data.index import cache_folder
from ..data.labeled import Labeled
from ..data.loader import batches_of
from ..data.sampler import BatchSampler
from ..data.sources import Subset
from ..data.views import Image, center, clipped_crop_box, flip, random_resized_crop
from ..engine.console import Screen
from ..engine.distributed import World, autocast
from ..methods import METHODS
from ..methods.base import Method
from ..models.backbone import Backbone, Features, Pixels, pooled
from ..models.classifier import Classifier
from .evaluation.base import EvaluationOptions, Pool
from .features import ExtractedFeatures, extract
from .score import Scored, score
from .splits import PERCENTS, read_split, write_splits

T = TypeVar("T")


class ProbedModel(nn.Module):
    """A frozen backbone followed by a probe on one of its features (a pool, or "tokens"): pixels in 0 to 1 to
    logits "b c"."""

    def __init__(self, backbone: nn.Module, feature: Pool | Literal["tokens"], layer: nn.Module):
        super().__init__()
        self.backbone, self.feature, self.layer = backbone, feature, layer

    def forward(self, images: Float[Tensor, "b channels h w"]) -> Float[Tensor, "b c"]:
        return self.layer(pooled(self.backbone(images), self.feature))


@dataclass
class EvaluationContext:
    name: str
    which: str
    backbone: Backbone | Pixels
    set: Labeled
    options: EvaluationOptions
    device: torch.device
    world: World
    screen: Screen
    precision: str
    classifier: tuple[Classifier, list[str]] | None = None
    "if the backbone came with a head: the complete model, and its classes"
    extracted: dict[tuple[str, bool, int], ExtractedFeatures] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    "images that have been reported"

    @property
    def method(self) -> type[Method]:
        """The method that trained the backbone; the base class, if it is not known."""
        return METHODS.get(self.backbone.method, Method)

    def network(self, blocks: int) -> Backbone | Pixels:
        """The backbone, with the class tokens of its last `blocks` blocks."""
        return self.backbone if blocks == 1 else cast(Backbone, self.backbone).last(blocks)

    @property
    def cache(self) -> Path:
        return self.options.feature_cache or cache_folder()

    def part(self, part: Literal["train", "test"]) -> Subset:
        """The test part, or the images of the training part whose labels are used."""
        if part == "test":
            return self.set.test
        return self.set.train if self.options.labels == 100 else Subset(self.set.train, self.split())

    def split(self) -> Int[np.ndarray, " k"]:
        """The training images whose labels are used, from a file that all backbones share."""
        train, seed = self.set.train, self.options.seed
        assert train.labels is not None  # open_labeled refuses images without labels
        folder = self.cache / "splits" / f"{train.fingerprint()[:16]}-{seed}"
        file = folder / f"labels-{self.options.labels:g}.json"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_splits(folder, train.labels, seed, sorted({*PERCENTS, self.options.labels}))
        return read_split(file, train.labels)

    def features(
        self, part: Literal["train", "test"], tokens: bool = False, blocks: int = 1
    ) -> ExtractedFeatures:
        """Features of a part, computed once and cached."""
        key = part, tokens, blocks
        if key not in self.extracted:
            images = self.part(part)
            with self.screen.progress(f"features of {images.name}", len(images)) as tick:
                self.extracted[key] = extract(
                    self.network(blocks),
                    images,
                    cache=self.cache / "features",
                    tokens=tokens,
                    device=self.device,
                    precision=self.precision,
                    world=self.world,
                    workers=self.options.workers,
                    tick=tick,
                    note=self.note,
                )
        return self.extracted[key]

    def note(self, bad: list[Bad]) -> None:
        """Report images that cannot be read, each once."""
        for _, path, reason in bad:
            if path not in self.unreadable:
                self.unreadable.append(path)
                self.screen.say(f"note: {path} cannot be read ({reason})")

    def training_features(self, tokens: bool = False, blocks: int = 1) -> ExtractedFeatures:
        """Features and labels of the readable training images."""
        features = self.features("train", tokens, blocks)
        return features if features.readable.all() else features.select(features.readable)

    def correct(self, predictions: Int[np.ndarray, " m"], test: ExtractedFeatures) -> Bool[np.ndarray, " m"]:
        """Which test images are classified correctly; an unreadable image counts as wrong."""
        return (predictions == test.labels) & test.readable

    def score(self, model: nn.Module) -> Scored:
        """Score a model that takes pixels on the test images."""
        test = self.set.test
        with self.screen.progress(f"scoring on {test.name}", len(test)) as tick:
            return score(
                model,
                test,
                shape=self.backbone.shape,
                channels=self.backbone.channels,
                device=self.device,
                precision=self.precision,
                workers=self.options.workers,
                note=self.note,
                tick=tick,
            )

    def crops(
        self, steps: int, batch: int, augment: bool, blocks: int = 1
    ) -> Iterator[tuple[Features, Int[Tensor, " b"]]]:
        """Features and labels for `steps` batches of training images: new crops and flips in every epoch, or
        without `augment` the evaluation view."""
        part = self.part("train")
        sampler = BatchSampler(len(part), batch, start=0, stop=steps, seed=self.options.seed)
        view = functools.partial(_crop, shape=self.backbone.shape, augment=augment)
        crops = Images(part, view, self.options.seed, self.backbone.channels, labeled=True)
        backbone = self.network(blocks).to(self.device).eval()
        batches = batches_of(crops, sampler, part, self.options.workers, self.device, self.note)
        for images in self.counted("fitting on new crops", steps, batches):
            with torch.no_grad(), autocast(self.device, self.precision):
                features = backbone(images["image"].float() / 255)
            yield features, images["label"]

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A progress bar over `total` steps; call the yielded function after each step."""
        done = itertools.count(1)
        with self.screen.progress(what, total) as tick:
            yield lambda: tick(next(done))

    def counted(self, what: str, total: int, steps: Iterable[T]) -> Iterator[T]:
        """The same `steps`, with a progress bar."""
        with self.counting(what, total) as tick:
            for step in steps:
                yield step
                tick()

    @torch.no_grad()
    def token_bytes(self) -> int:
        """The size of all tokens of both parts in half precision."""
        gray = torch.full((1, self.backbone.channels, *self.backbone.shape), 0.5, device=self.device)
        values_per_image = self.backbone.to(self.device).eval()(gray).tokens.numel()
        return 2 * values_per_image * (len(self.part("train")) + len(self.set.test))


def _crop(
    image: Image, draws: np.random.Generator, shape: tuple[int, int], augment: bool
) -> dict[str, Tensor]:
    """A random crop (0.08 to 1 of the area, drawn once) and flip, as in MAE's linear probing, or the
    evaluation view."""
    if not augment:
        return {"image": center(image, shape).contiguous()}
    crop = flip(random_resized_crop(image, shape, (0.08, 1.0), draws, box=clipped_crop_box), draws)
    return {"image": crop.contiguous()}


def results_folder(name: str, options: EvaluationOptions) -> Path:
    if options.out:
        return options.out
    path = Path(name)
    if (path / "recipe.toml").exists():
        return path / "evaluate"
    return Path("runs") / "evaluate" / (re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "backbone")


def stem(kind: str, which: str, options: EvaluationOptions) -> str:
    """The name of the result files: task and network, then the percentage of the labels and the seed unless
    they are the defaults."""
    labels = "" if options.labels == 100 else f"-{options.labels:g}-percent"
    return f"{kind}-{which}{labels}{f'-seed-{options.seed}' if options.seed else ''}"
