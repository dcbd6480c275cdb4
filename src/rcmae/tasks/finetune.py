"""End-to-end fine-tuning of a backbone with a classification head.

The protocol is MAE's (He et al. 2022, appendix A.2): mean of the patches, layer decay, RandAugment, mixup,
cutmix, erasing, drop path.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor

from ..config import BaseRuntimeConfig, check, how_many, recipe_hash
from ..data.dataset import Images
from ..data.sources import Source
from ..data.supervised import Mixing, SupervisedView, path_seed
from ..engine.checkpoint import replace_file
from ..engine.console import clock
from ..engine.run import RunContext, run_context
from ..engine.schedules import Progress, warmup_cosine
from ..errors import ConfigError, DataError
from ..interop.timm_export import export
from ..models.backbone import Backbone
from ..models.blueprint import architecture_of, blueprint
from ..models.classifier import Classifier, classifier
from .features import identity
from .finetune_recipe import FineTuneRecipe, load_finetune
from .score import Scored, score
from .supervised import ADVICE, Supervised, fitted_batch


class FineTuned(NamedTuple):
    """The result of fine-tuning, for the weights of the last step."""

    model: Classifier
    correct: Bool[np.ndarray, " m"]
    confidence: Float[np.ndarray, " m"]
    history: list[dict[str, float]]
    """step, epoch and test accuracy (in percent) at each evaluation; the last one is the result"""
    seconds: float
    "duration of the training, including resumed parts"


def finetune(
    backbone: Backbone,
    train: Source,
    test: Source,
    classes: list[str],
    settings: FineTuneRecipe,
    runtime: BaseRuntimeConfig,
    about: dict[str, Any] | None = None,
) -> FineTuned:
    """Train a classifier of `classes` in `runtime.out`. An existing run is resumed, a finished one is scored
    again.

    All images of both sources need labels, which are indices of `classes`. `about` is written to machine.json
    and to the exported config.json. Raises the errors of `rcmae.errors`, including Preempted after a signal
    has stopped the run and its state is saved.
    """
    check(settings)
    if len(classes) < 2:
        raise DataError(f"{train.name} has {how_many(len(classes), 'class')}; two or more are needed")
    for source in (train, test):
        check_labels(source, len(classes))
    if settings.randaugment and backbone.channels != 3:
        raise ConfigError(
            f"RandAugment is for images of 3 channels, not {backbone.channels}; give --settings "
            "'randaugment='"
        )
    # Before anything is written: some networks cannot be fine-tuned, or not be exported afterwards.
    blueprint(classifier(backbone, len(classes)), architecture_of(backbone.vit))
    with run_context(runtime, runtime.out, ADVICE) as context:
        run = FineTuning(backbone, train, test, classes, settings, context, about or {})
        with contextlib.closing(run):
            return run.train()


def check_labels(source: Source, classes: int) -> None:
    """Raise DataError unless all images have labels below `classes`; it names the first one that does not."""
    if not len(source):
        raise DataError(f"{source.name} has no images with labels")
    if source.labels is None:
        raise DataError(
            f"{source.name} has no labels; give class folders, a list with labels, or shards with .cls files"
        )
    if (invalid := np.flatnonzero((source.labels < 0) | (source.labels >= classes))).size:
        raise DataError(
            f"{source.where(int(invalid[0]))} has no label among the {classes} classes "
            f"({how_many(invalid.size, 'such image')})"
        )


def fitted(settings: FineTuneRecipe, images: int, parts: int = 1) -> FineTuneRecipe:
    """The settings with a batch of at most `images`, see `fitted_batch`. If it is lowered, `mix_group` is
    lowered to a divisor of a micro-batch."""
    batch = fitted_batch(settings.batch_size, images, parts, least=1 + settings.mixes)  # mixtures need two
    if batch == settings.batch_size:
        return settings
    return replace(settings, batch_size=batch, mix_group=math.gcd(settings.mix_group, batch // parts))


def layer_decay_groups(vit: VisionTransformer, weight_decay: float, decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW, each with a `weight_decay` and an `lr_scale`, a factor of the learning rate
    that the caller has to apply.

    The scale is decay ** (depth + 1 - layer): layer 0 consists of patch embedding, position embedding, class
    and register tokens; layers 1 to depth are the blocks; layer depth + 1 is the rest, which is the head with
    its norm at the full rate. Vectors, position embeddings and tokens have no weight decay.

    timm's rule equals MAE's if patches are averaged before the last norm (`fc_norm`), as in MAE's
    fine-tuning. With a class token (`norm`), timm assigns that norm to the last block, MAE to the head.
    """
    return param_groups_layer_decay(
        vit, weight_decay=weight_decay, no_weight_decay_list=vit.no_weight_decay(), layer_decay=decay
    )


class FineTuning(Supervised):
    what, rate_name = "fine-tuning", "base_lr"
    model: Classifier

    def __init__(
        self,
        backbone: Backbone,
        train: Source,
        test: Source,
        classes: list[str],
        settings: FineTuneRecipe,
        context: RunContext,
        about: dict[str, Any],
    ):
        s = fitted(settings, len(train), context.world.size * context.runtime.accumulate)
        if s.batch_size < settings.batch_size:
            context.screen.say(
                f"note: {how_many(len(train), 'training image')}: batches of {s.batch_size} instead of "
                f"{settings.batch_size}"
            )
        super().__init__(s, context, train, about)
        self.test_set, self.classes = test, classes
        if s.mixes and self.part % s.mix_group:
            raise ConfigError(
                f"mix_group {s.mix_group} does not divide a micro-batch of {self.part}; lower --accumulate, "
                f"or give --settings mix_group={math.gcd(s.mix_group, self.part)}"
            )
        self.warmup = s.warmup_epochs * self.steps_per_epoch / self.total
        if self.warmup >= 1:
            epochs = self.total / self.steps_per_epoch
            raise ConfigError(
                f"warmup_epochs {s.warmup_epochs:g} is not below the length of the run, {epochs:.2f} epochs"
            )
        vit = classifier(backbone, len(classes), drop_path=s.drop_path, seed=s.seed)
        model = Classifier(vit, *backbone.statistics).to(self.device).train()
        model.license = backbone.license
        vit.set_grad_checkpointing(self.runtime.checkpointing)
        if self.runtime.compile:
            for block in vit.blocks:
                block.compile()
        groups = layer_decay_groups(vit, s.weight_decay, s.layer_decay)
        mixing = ("mixup", "cutmix", "mix_prob", "switch_prob", "smoothing", "mix_group")
        self.mixing = Mixing(len(classes), seed=s.seed, **{k: getattr(s, k) for k in mixing})
        self.bad_test = self.bad_files(len(test), "bad_test_files.jsonl")
        self.scored: Scored | None = None
        data = {
            "train": train.fingerprint(),
            "range_of_16-bit_images": f"{train.bits or 16} bits",
            "train_labels": _hash(train.labels),
            "test": test.fingerprint(),
            "test_labels": _hash(test.labels),
            "classes": classes,
        }
        optimizer = torch.optim.AdamW(groups, lr=s.peak_lr, betas=s.betas, fused=True)
        images = (
            f"{how_many(len(train), 'image')} of {how_many(len(classes), 'class')}, {len(test):,} to test on"
        )
        facts = {
            "train_images": len(train),
            "test_images": len(test),
            "classes": len(classes),
            "left_out": dict(train.left_out),
            "test_left_out": dict(test.left_out),
        }
        self.learn(model, optimizer, data, identity(backbone), load_finetune, images, **facts)

    def loader(self, start: int, stop: int) -> Iterator[dict[str, Tensor]]:
        """Micro-batches of the steps from `start` to before `stop`, on the device: "image" and "label"."""
        s, model = self.recipe, self.model
        view = SupervisedView(
            model.shape,
            *model.statistics,
            scale=s.crop_scale,
            flip=s.flip,
            randaugment=s.randaugment,
            erasing=s.erasing,
        )
        dataset = Images(self.images, view, s.seed, model.channels, labeled=True)
        return self.batches_from(dataset, start, stop)

    def rate(self, t: Progress) -> float:
        return warmup_cosine(self.recipe.peak_lr, self.recipe.min_lr, self.warmup, t)

    def losses(self, batch: dict[str, Tensor], step: int, part: int) -> dict[str, Tensor]:
        """Cross-entropy with the mixed targets, of the `part`-th micro-batch of the step."""
        pixels = batch["image"]
        images, targets = self.mixing(
            pixels if pixels.is_floating_point() else pixels.float() / 255, batch["label"], step, part
        )
        torch.manual_seed(path_seed(self.recipe.seed, step, part))
        return {"loss": F.cross_entropy(self.net(images), targets)}

    def scorings(self) -> int:
        """Once per epoch, but in total on at most half as many images as are trained on."""
        affordable = self.total * self.recipe.batch_size // (2 * len(self.test_set))
        return max(1, min(round(self.total / self.steps_per_epoch), affordable))

    def score(self) -> dict[str, float]:
        """Accuracy on the test images in percent; `scored` keeps the individual results."""
        self.scored = score(
            self.model,
            self.test_set,
            shape=self.model.shape,
            channels=self.model.channels,
            device=self.device,
            precision=self.precision,
            batch=self.part,
            workers=self.runtime.workers,
            world=self.world,
            note=self.bad_test.note,
        )
        return {"accuracy": 100 * float(self.scored.correct.mean())}

    def format_scores(self, scores: dict[str, float]) -> str:
        return f"{scores['accuracy']:.1f} % test accuracy"

    def finish(self) -> FineTuned:
        """Write the scores of the last weights on every test image, and export the classifier."""
        if self.scored is None:
            self.score()
        assert self.scored is not None  # set by score()
        correct, confidence = self.scored
        self.model.eval()
        if self.world.is_main:
            tensors = {"correct": torch.from_numpy(correct), "confidence": torch.from_numpy(confidence)}
            replace_file(self.out / "test.safetensors", save(tensors))
            about = self.about | {
                "task": "finetune",
                "step": self.step,
                "recipe_hash": recipe_hash(self.recipe),
                "bits": self.images.bits,
            }
            folder = self.out / "export" / "classifier"
            export(self.model, folder, about, classes=self.classes)
            best, last = max(h["accuracy"] for h in self.history), self.history[-1]["accuracy"]
            note = ""
            if best > last:
                note = f" (best of {len(self.history)}, chosen on the test images: {best:.1f} %)"
            self.screen.say(
                f"{last:.1f} % accuracy after {how_many(self.step, 'step')}{note}, {clock(self.seconds)}"
            )
            self.screen.say(f'Load the classifier: timm.create_model("local-dir:{folder}", pretrained=True)')
        return FineTuned(self.model, correct, confidence, self.history, self.seconds)


def _hash(labels: Int[np.ndarray, " n"] | None) -> str:
    assert labels is not None  # see check_labels
    return hashlib.sha256(np.ascontiguousarray(labels).tobytes()).hexdigest()
