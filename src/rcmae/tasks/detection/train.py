"""Training Mask R-CNN on a backbone, end to end."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...config import BaseRuntimeConfig, how_many, recipe_hash
from ...data.supervised import path_seed
from ...engine.checkpoint import replace_file
from ...engine.console import clock
from ...engine.distributed import World
from ...engine.run import RunContext, run_context, write_json
from ...engine.schedules import Progress, warmup_cosine
from ...errors import ConfigError, DataError
from ...models.backbone import Backbone
from ...models.blueprint import architecture_of, blueprint
from ..features import identity
from ..supervised import ADVICE, Supervised, fitted_batch
from .average_precision import Precision, evaluate_all, library
from .coco import CocoSet
from .examples import write_examples
from .files import export
from .model import Detector, detector, groups
from .predict import Predictions, images_scored, predict
from .settings import DetectionRecipe, check, load_detect
from .views import Detections, Jitter, detection_batches

SCORED, SCORINGS = 4, 50
"""Limits of the evaluation: one test image per `SCORED` training images, and `SCORINGS` evaluations per
run."""


class Detected(NamedTuple):
    """The result of training: the detector of the last step, its results on the test images, and the scores
    over the run."""

    model: Detector
    results: list[dict[str, Any]]
    box: Precision
    mask: Precision
    history: list[dict[str, float]]
    "step, epoch and scores (in percent) at each evaluation; the last one is the result"


def train(
    backbone: Backbone,
    train: CocoSet,
    test: CocoSet,
    settings: DetectionRecipe,
    runtime: BaseRuntimeConfig,
    about: dict[str, Any] | None = None,
) -> Detected:
    """Train a detector of `train`'s classes in `runtime.out`. An existing run is resumed, a finished one is
    scored again.

    The scores are COCO's average precision on the test images. `about` is written to machine.json and to the
    exported config.json. Raises the errors of `rcmae.errors`, including Preempted after a signal has stopped
    the run and its state is saved.
    """
    check(settings)
    library()  # raises an error now instead of after the training
    if (train.category_ids, train.classes) != (test.category_ids, test.classes):
        raise DataError(
            f"{test.name} has other categories than {train.name}; give both parts the same ids and names"
        )
    with run_context(runtime, runtime.out, ADVICE) as context:
        with contextlib.closing(
            DetectionTraining(backbone, train, test, settings, context, about or {})
        ) as run:
            return run.train()


def check_ranks(s: DetectionRecipe, world: World, device: torch.device) -> None:
    """Raise ConfigError if the preset cannot be trained by several ranks on this device."""
    if s.preset == "benchmarking" and world.size > 1 and device.type != "cuda":
        raise ConfigError(
            "the preset benchmarking synchronizes BatchNorm on CUDA devices only; use one process on a CPU"
        )


def rate(s: DetectionRecipe, t: Progress) -> float:
    """The learning rate of a step: a linear warm-up, then a cosine to 0, or a tenth of lr from 8/9 of the run
    on and a hundredth from 26/27 on."""
    if s.schedule == "cosine":
        return warmup_cosine(s.lr, 0.0, s.warmup_steps / t.total_steps, t)
    warmup = min(1.0, (t.step + 1) / (s.warmup_steps + 1))
    return s.lr * warmup * (0.1 if t.fraction >= 8 / 9 else 1.0) * (0.1 if t.fraction >= 26 / 27 else 1.0)


class DetectionTraining(Supervised):
    """A detection run."""

    what = "detection"
    model: Detector
    images: CocoSet

    def __init__(
        self,
        backbone: Backbone,
        train: CocoSet,
        test: CocoSet,
        settings: DetectionRecipe,
        context: RunContext,
        about: dict[str, Any],
    ):
        parts = context.world.size * context.runtime.accumulate
        s = replace(settings, batch_size=fitted_batch(settings.batch_size, len(train), parts))
        if s.batch_size < settings.batch_size:
            context.screen.say(
                f"note: {how_many(len(train), 'training image')}: batches of {s.batch_size} instead of "
                f"{settings.batch_size}"
            )
        super().__init__(s, context, train, about)
        if crowded := int((train.counts() > s.max_instances).sum()):
            context.screen.say(
                f"note: more than {how_many(s.max_instances, 'object')} in "
                f"{how_many(crowded, 'training image')}; a view has at most that many, and others count as "
                "background (--settings max_instances=N)"
            )
        grid = s.size // backbone.vit.patch_embed.patch_size[0]
        if s.window > grid:
            context.screen.say(
                f"note: a window of {s.window} x {s.window} patches contains the whole grid of {grid} x "
                f"{grid}, so attention is global in all blocks"
            )
        if s.warmup_steps >= self.total:
            raise ConfigError(
                f"warmup_steps {s.warmup_steps} is not below the run's {self.total} steps; give --settings "
                "warmup_steps=N"
            )
        check_ranks(s, self.world, self.device)
        self.test_set, self.channels = test, backbone.channels
        self.mean = tuple(backbone.mean.flatten().tolist())
        self.architecture = blueprint(backbone.vit, architecture_of(backbone.vit))
        model = detector(backbone, len(train.classes), s).to(self.device).train()
        if s.preset == "benchmarking" and self.world.size > 1:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model.set_grad_checkpointing(self.runtime.checkpointing)
        if self.runtime.compile:
            for block in model.pyramid.vit.blocks:
                block.compile()
        optimizer = torch.optim.AdamW(groups(model, s), lr=s.lr, betas=s.betas, fused=True)
        batch_norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        self.running_statistics = [buffer for m in batch_norms for buffer in m.buffers()]
        self.bad_test = self.bad_files(len(test), "bad_test_files.jsonl")
        self.scored: tuple[Predictions, dict[str, Precision]] | None = None
        data = {
            "train": train.fingerprint(),
            "range_of_16-bit_images": f"{train.bits or 16} bits",
            "test": test.fingerprint(),
            "classes": train.classes,
        }
        about_data = (
            f"{how_many(len(train), 'image')} of {how_many(len(train.classes), 'class')}, {len(test):,} to "
            "test on"
        )
        facts = {"train_images": len(train), "test_images": len(test), "classes": len(train.classes)}
        self.learn(model, optimizer, data, identity(backbone), load_detect, about_data, **facts)

    def loader(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Micro-batches of the steps from `start` to before `stop`, on the device: "image", and "targets" by
        image."""
        s = self.recipe
        dataset = Detections(
            self.images, Jitter(s.size, s.jitter, s.flip, s.max_instances, self.mean), s.seed, self.channels
        )
        return detection_batches(
            dataset, self.sampler(start, stop), self.runtime.workers, self.device, self.bad.note
        )

    def rate(self, t: Progress) -> float:
        return rate(self.recipe, t)

    def update(self, t: Progress) -> Tensor:
        """Also restore BatchNorm's running statistics if a step is skipped or interrupted."""
        before = [b.clone() for b in self.running_statistics]
        applied = torch.zeros((), device=self.device)
        try:
            applied = super().update(t)
        finally:
            for buffer, old in zip(self.running_statistics, before, strict=True):
                buffer.copy_(torch.where(applied > 0, buffer, old))
        return applied

    def losses(self, batch: dict[str, Any], step: int, part: int) -> dict[str, Tensor]:
        """The losses of RPN and heads, and their sum. The sampling of proposals is a function of the seed,
        `step` and `part`."""
        torch.manual_seed(path_seed(self.recipe.seed, step, part))
        losses = self.net(batch["image"], batch["targets"])
        return {"loss": sum(losses.values()), **losses}

    def scorings(self) -> int:
        affordable = self.total * self.recipe.batch_size // (SCORED * len(self.test_set))
        return max(1, min(round(self.total / self.steps_per_epoch), affordable, SCORINGS))

    def score(self) -> dict[str, float]:
        """Average precision of boxes and masks in percent."""
        predictions = predict(
            self.model,
            self.test_set,
            size=self.recipe.size,
            channels=self.channels,
            device=self.device,
            precision=self.precision,
            batch=self.part,
            workers=self.runtime.workers,
            world=self.world,
            note=self.bad_test.note,
        )
        scores: dict[str, Precision] = {}
        if self.world.is_main:
            scores = evaluate_all(predictions.readable(self.test_set).truth, predictions.results)
        scores = self.world.broadcast(scores)
        self.scored = predictions, scores
        fractions = {
            f"{kind} {name}": precision.stats[name]
            for kind, precision in scores.items()
            for name in ("AP", "AP50")
        }
        # A set without objects is refused, so AP exists.
        return {name: 100 * value for name, value in fractions.items() if value is not None}

    def format_scores(self, scores: dict[str, float]) -> str:
        """Also the number of test images, if some of them could not be read."""
        assert self.scored is not None  # set by score()
        images = images_scored(len(self.test_set), unreadable := len(self.scored[0].unreadable))
        return super().format_scores(scores) + (f" on {images}" if unreadable else "")

    def finish(self) -> Detected:
        """Write the results of the last weights on the test images, and export the detector."""
        if self.scored is None:
            self.score()
        assert self.scored is not None  # set by score()
        predictions, scores = self.scored
        self.model.eval()
        if self.world.is_main:
            replace_file(self.out / "coco_results.json", json.dumps(predictions.results))
            facts = {
                "train_images": len(self.images),
                "test_images": len(self.test_set),
                "unreadable": [path for _, path, _ in predictions.unreadable],
                "preset": self.recipe.preset,
                "step": self.step,
                "recipe_hash": recipe_hash(self.recipe),
                "data": self.data,
                "backbone": self.backbone,
            }
            precisions = {name: precision._asdict() for name, precision in scores.items()}
            write_json(self.out / "scores.json", self.about | facts | precisions)
            folder = self.out / "export" / "detector"
            about = self.about | {"step": self.step, "recipe_hash": recipe_hash(self.recipe)}
            export(self.model, folder, self.images, self.recipe, self.architecture, about)
            readable = predictions.readable(self.test_set)
            write_examples(self.out / "examples.safetensors", readable, predictions.results, self.channels)
            last = {name: value for name, value in self.history[-1].items() if name not in ("step", "epoch")}
            self.screen.say(
                f"{self.format_scores(last)} after {how_many(self.step, 'step')}, {clock(self.seconds)}; the "
                f"detector is in {folder}"
            )
        return Detected(self.model, predictions.results, scores["box"], scores["mask"], self.history)
