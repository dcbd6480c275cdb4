"""Training Mask R-CNN on a backbone: boxes and masks of objects, all weights move."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...config import Workplace, how_many, recipe_hash
from ...data.supervised import path_seed
from ...engine.checkpoint import replace_file
from ...engine.console import clock
from ...engine.run import RunContext, run_context, write_json
from ...engine.schedules import Progress, warmup_cosine
from ...errors import ConfigError, DataError
from ...interop.timm_export import architecture_of, blueprint
from ...models.backbone import Backbone
from ..features import identity
from ..supervised import ADVICE, Supervised, fitted_batch
from .average_precision import Precision, evaluate, library
from .coco import CocoSet
from .examples import write_examples
from .files import export
from .model import Detector, detector, groups
from .predict import predict
from .settings import Detect, check_detect, load_detect
from .views import Detections, Jitter, detection_batches

SCORED, SCORINGS = 4, 50
"Test images are looked at no more often than once for so many training images, and so often in a run."


class Detected(NamedTuple):
    """What training leaves: the detector of the last step, what it finds on the test images, and its scores over the run."""

    model: Detector
    results: list[dict[str, Any]]
    box: Precision
    mask: Precision
    history: list[dict[str, float]]
    "step, epoch and scores (percent), each time these were taken; the last one is the result"


def train(
    backbone: Backbone, train: CocoSet, test: CocoSet, settings: Detect, machine: Workplace, about: dict[str, Any] | None = None
) -> Detected:
    """Train a detector of `train`'s classes in `machine.out`; a run that is already there goes on, a finished one is scored again.

    Test images are scored by COCO's average precision. `about` goes into machine.json and into the exported config.json. Raises the errors
    of `rcmae.errors`, Preempted when a signal asked it to stop and the state is saved.
    """
    check_detect(settings)
    library()  # said before the work, not after it
    if (train.category_ids, train.classes) != (test.category_ids, test.classes):
        raise DataError(f"{test.name} has other categories than {train.name}; give both parts the same ids and names")
    with run_context(machine, machine.out, ADVICE) as context:
        with contextlib.closing(DetectionTraining(backbone, train, test, settings, context, about or {})) as run:
            return run.train()


def rate(s: Detect, t: Progress) -> float:
    """The learning rate of a step: after the warm-up a cosine to 0, or a tenth of it from 8/9 and a hundredth from 26/27 of the run."""
    if s.schedule == "cosine":
        return warmup_cosine(s.lr, 0.0, s.warmup_steps / t.total_steps, t)
    risen = min(1.0, (t.step + 1) / (s.warmup_steps + 1))
    return s.lr * risen * (0.1 if t.fraction >= 8 / 9 else 1.0) * (0.1 if t.fraction >= 26 / 27 else 1.0)


class DetectionTraining(Supervised):
    """One run: everything that is built before the first step, and what is learned and scored."""

    what = "detection"

    def __init__(self, backbone: Backbone, train: CocoSet, test: CocoSet, settings: Detect, context: RunContext, about: dict[str, Any]):
        s = replace(settings, batch_size=fitted_batch(settings.batch_size, len(train), context.world.size * context.machine.accumulate))
        if s.batch_size < settings.batch_size:
            context.screen.say(
                f"note: {how_many(len(train), 'training image')}: batches of {s.batch_size} instead of {settings.batch_size}"
            )
        super().__init__(s, context, train, about)
        if full := int((train.counts() > s.max_instances).sum()):
            said = f"note: more than {how_many(s.max_instances, 'object')} in {how_many(full, 'training image')}"
            context.screen.say(f"{said}; a view marks no more, what else it shows passes for background (--settings max_instances=N)")
        if s.warmup_steps >= self.total:
            raise ConfigError(f"warmup_steps {s.warmup_steps} is not below the run's {self.total} steps; give --settings warmup_steps=N")
        if s.preset == "benchmarking" and self.world.size > 1 and self.device.type != "cuda":
            raise ConfigError("the statistics of benchmarking's BatchNorm are shared by CUDA devices only; use one process on a CPU")
        self.test_set, self.channels = test, backbone.channels
        self.mean = backbone.mean.flatten().tolist()
        self.architecture = blueprint(backbone.vit, architecture_of(backbone.vit))
        model = detector(backbone, len(train.classes), s).to(self.device).train()
        if s.preset == "benchmarking" and self.world.size > 1:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model.set_grad_checkpointing(self.machine.checkpointing)
        if self.machine.compile:
            for block in model.pyramid.vit.blocks:
                block.compile()
        optimizer = torch.optim.AdamW(groups(model, s), lr=s.lr, betas=s.betas, fused=True)
        self.running = [b for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for b in m.buffers()]
        self.bad_test = self.bad_files(len(test), "bad_test_files.jsonl")
        self.scored: tuple[list[dict[str, Any]], Precision, Precision] | None = None
        data = {"train": train.fingerprint(), "test": test.fingerprint(), "classes": train.classes}
        images = f"{how_many(len(train), 'image')} of {how_many(len(train.classes), 'class')}, {len(test):,} to test on"
        facts = {"train_images": len(train), "test_images": len(test), "classes": len(train.classes)}
        self.learn(model, optimizer, data, identity(backbone), load_detect, images, **facts)

    def loader(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Micro-batches of the steps from `start` to before `stop`, on the device: "image", and "targets" by image."""
        s = self.recipe
        dataset = Detections(self.images, Jitter(s.size, s.jitter, s.flip, s.max_instances, self.mean), s.seed, self.channels)
        return detection_batches(dataset, self.sampler(start, stop), self.machine.workers, self.device, self.bad.note)

    def rate(self, t: Progress) -> float:
        return rate(self.recipe, t)

    def update(self, t: Progress) -> Tensor:
        """Likewise for BatchNorm's running statistics: a step that is skipped, or left in the middle, leaves them as they were."""
        before = [b.clone() for b in self.running]
        applied = torch.zeros((), device=self.device)
        try:
            applied = super().update(t)
        finally:
            for now, old in zip(self.running, before, strict=True):
                now.copy_(torch.where(applied > 0, now, old))
        return applied

    def losses(self, batch: dict[str, Any], step: int, part: int) -> dict[str, Tensor]:
        """Those of the proposals and of the heads, and their sum; proposals are sampled by a function of the numbers."""
        torch.manual_seed(path_seed(self.recipe.seed, step, part))
        losses = self.net(batch["image"], batch["targets"])
        return {"loss": sum(losses.values()), **losses}

    def scorings(self) -> int:
        affordable = self.total * self.recipe.batch_size // (SCORED * len(self.test_set))
        return max(1, min(round(self.total / self.steps_per_epoch), affordable, SCORINGS))

    def score(self) -> dict[str, float]:
        """Average precision of boxes and masks in percent."""
        found: Any = None
        results = predict(
            self.model, self.test_set, size=self.recipe.size, channels=self.channels, device=self.device, precision=self.precision,
            batch=self.part, workers=self.machine.workers, world=self.world, note=self.bad_test.note,
        )  # fmt: skip
        if self.world.first:
            truth = self.test_set.truth
            found = tuple(evaluate(truth, results, kind) for kind in ("bbox", "segm"))
        box, mask = self.world.from_first(found)
        self.scored = results, box, mask
        pairs = {"box AP": box.stats["AP"], "box AP50": box.stats["AP50"], "mask AP": mask.stats["AP"], "mask AP50": mask.stats["AP50"]}
        return {name: 100 * value for name, value in pairs.items()}

    def finish(self) -> Detected:
        """Keep what the last weights find on the test images, and the detector."""
        if self.scored is None:
            self.score()
        results, box, mask = self.scored
        self.model.eval()
        if self.world.first:
            replace_file(self.out / "coco_results.json", json.dumps(results))
            facts = {"train_images": len(self.images), "test_images": len(self.test_set), "preset": self.recipe.preset}
            facts |= {"step": self.step, "recipe_hash": recipe_hash(self.recipe), "data": self.data, "backbone": self.backbone}
            write_json(self.out / "scores.json", self.about | facts | {"box": box._asdict(), "mask": mask._asdict()})
            folder = self.out / "export" / "detector"
            about = self.about | {"step": self.step, "recipe_hash": recipe_hash(self.recipe)}
            export(self.model, folder, self.images, self.recipe, self.architecture, about)
            write_examples(self.out / "examples.safetensors", self.test_set, results, self.channels)
            last = {name: value for name, value in self.history[-1].items() if name not in ("step", "epoch")}
            self.screen.say(
                f"{self.format_scores(last)} after {how_many(self.step, 'step')}, {clock(self.seconds)}; the detector is in {folder}"
            )
        return Detected(self.model, results, box, mask, self.history)
