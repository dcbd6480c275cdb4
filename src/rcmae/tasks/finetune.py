"""End-to-end fine-tuning: a backbone with a head learns labels, all of its weights move.

The protocol is MAE's (He et al. 2022, appendix A.2): mean of the patches, layer decay, RandAugment, mixup, cutmix, erasing, drop path.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import save
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from ..config import Workplace, how_many, load_settings, parse_settings, recipe_hash, shipped_recipes
from ..data.dataset import Images
from ..data.loader import batches_of
from ..data.sources import Source
from ..data.supervised import Mixing, SupervisedView, path_seed
from ..engine.checkpoint import replace_file
from ..engine.console import clock
from ..engine.run import RunContext, run_context
from ..engine.schedules import Progress, warmup_cosine
from ..errors import ConfigError, DataError
from ..interop.timm_export import architecture_of, export
from ..models.backbone import Backbone
from ..models.classifier import Classifier, classifier
from .features import identity
from .layer_decay import layer_decay_groups
from .score import Scored, score
from .supervised import ADVICE, Supervised, fitted_batch


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """All that changes the result of fine-tuning a backbone on given images."""

    seed: int = 0
    "every crop, mixture, dropped path and the head's initial weights are functions of it"
    epochs: float | None = None
    "length of the run in passes over the training images"
    steps: int | None = None
    "length of the run in optimizer steps"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    "share of the image's area that a random crop covers (lowest, highest); 1 1 takes the whole image"
    flip: bool = True
    "flip left and right at random"
    randaugment: str = "rand-m9-mstd0.5-inc1"
    "RandAugment as timm writes it; empty for none"
    erasing: float = 0.25
    "share of the images in which a box is replaced by noise"
    mixup: float = 0.8
    "alpha of mixup; 0 for none"
    cutmix: float = 1.0
    "alpha of cutmix; 0 for none"
    mix_prob: float = 1.0
    "share of the groups that are mixed"
    switch_prob: float = 0.5
    "share of the mixtures that are cutmix, where both are on"
    mix_group: int = 128
    "consecutive images that share one draw of mixup or cutmix; even, a divisor of the micro-batch"
    smoothing: float = 0.1
    "share of a target that is spread over all classes"
    drop_path: float = 0.1
    "share of the last block's paths that are dropped; it grows linearly over the blocks, from 0"
    layer_decay: float = 0.65
    "factor of the learning rate from a block to the one before it"
    batch_size: int = 1024
    "images an optimizer step, over all devices and micro-batches"
    base_lr: float = 5e-4
    "learning rate of the head for a batch of 256; the linear rule gives base_lr * batch_size / 256"
    min_lr: float = 1e-6
    "learning rate of the head at the end of the cosine"
    warmup_epochs: float = 5.0
    "passes over the training images in which the learning rate rises linearly"
    weight_decay: float = 0.05
    "decoupled weight decay, on matrices only (not on positions and tokens)"
    betas: tuple[float, float] = (0.9, 0.999)
    "AdamW's decay rates"
    clip: float | None = None
    "largest norm of the gradient; default: no clipping"

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return self.base_lr * self.batch_size / 256

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def total_steps(self, images: int) -> int:
        """Optimizer steps on so many training images."""
        return self.steps or max(1, round((self.epochs or 0) * (images // self.batch_size)))


def load_finetune(name: str) -> FineTune:
    """Settings by the name of a shipped recipe or by the path of a TOML file. Raises ConfigError in one line."""
    return load_settings(name, shipped_recipes("finetune"), lambda text, source: check_finetune(parse_settings(FineTune, text, source)))


def check_finetune(s: FineTune) -> FineTune:
    """Refuse impossible values, all problems in one message. Returns the settings."""
    lo, hi = s.crop_scale
    longest = s.epochs or s.steps or math.inf  # in epochs: a step is one at most, so some are refused before images are counted
    rules = [
        ((s.epochs is None) != (s.steps is None), "give one of epochs and steps"),
        (s.epochs is None or s.epochs > 0, f"epochs must be above 0, not {s.epochs}"),
        (s.steps is None or s.steps > 0, f"steps must be above 0, not {s.steps}"),
        (0 <= s.seed < 2**63, f"seed must be 0 or more and below 2**63, not {s.seed}"),
        (0 < lo <= hi <= 1, f"crop_scale must satisfy 0 < low <= high <= 1, not {lo} {hi}"),
        (s.mixup >= 0 and s.cutmix >= 0, f"mixup and cutmix must be 0 or more, not {s.mixup} and {s.cutmix}"),
        (not s.mixes or (s.mix_group > 0 and s.mix_group % 2 == 0), f"mix_group must be even and above 0, not {s.mix_group}"),
        (0 <= s.drop_path < 1, f"drop_path must lie in 0 to below 1, not {s.drop_path}"),
        (0 <= s.smoothing < 1, f"smoothing must lie in 0 to below 1, not {s.smoothing}"),
        (0 < s.layer_decay <= 1, f"layer_decay must be above 0 and at most 1, not {s.layer_decay}"),
        (s.batch_size > 0, f"batch_size must be above 0, not {s.batch_size}"),
        (s.base_lr > 0, f"base_lr must be above 0, not {s.base_lr}"),
        (s.min_lr >= 0, f"min_lr must be 0 or more, not {s.min_lr}"),
        (s.warmup_epochs >= 0, f"warmup_epochs must be 0 or more, not {s.warmup_epochs}"),
        (
            longest <= 0 or s.warmup_epochs < longest,
            f"warmup_epochs {s.warmup_epochs:g} is not below the length of the run, "
            + (f"{s.epochs:.2f} epochs" if s.epochs else f"{s.steps} steps"),
        ),
        (s.weight_decay >= 0, f"weight_decay must be 0 or more, not {s.weight_decay}"),
        (all(0 <= b < 1 for b in s.betas), f"betas must lie in 0 to below 1, not {s.betas}"),
        (s.clip is None or s.clip > 0, f"clip must be above 0, not {s.clip}"),
        (_is_randaugment(s.randaugment), f"randaugment must be written like rand-m9-mstd0.5-inc1, not {s.randaugment!r}"),
    ]
    rules += [
        (0 <= getattr(s, k) <= 1, f"{k} is a share, from 0 to 1, not {getattr(s, k)}") for k in ("erasing", "mix_prob", "switch_prob")
    ]
    values = [(f.name, x) for f in fields(s) for x in np.ravel(getattr(s, f.name)) if isinstance(x, float)]
    rules += [(math.isfinite(v), f"{k} must be a finite number, not {v}") for k, v in values]
    if problems := [message for fine, message in rules if not fine]:
        raise ConfigError("; ".join(problems))
    return s


def _is_randaugment(text: str) -> bool:
    try:
        return not text or rand_augment_transform(text) is not None
    except (AssertionError, ValueError, KeyError):
        return False


# --- training ---------------------------------------------------------------------------------------------------------


class FineTuned(NamedTuple):
    """What fine-tuning leaves: the classifier of the last step, what it makes of the test images, and accuracy over the run."""

    model: Classifier
    right: Bool[np.ndarray, " m"]
    confidence: Float[np.ndarray, " m"]
    step: int
    history: list[dict[str, float]]
    "step, epoch and accuracy (percent of the test images) each time these were scored; the last one is the result"
    seconds: float
    "of all training, however often it was resumed"


def finetune(
    backbone: Backbone,
    train: Source,
    test: Source,
    classes: list[str],
    settings: FineTune,
    machine: Workplace,
    about: dict[str, Any] | None = None,
) -> FineTuned:
    """Train a classifier of `classes` in `machine.out`; a run that is already there goes on, and a finished one is scored again.

    Both sources are labelled throughout, with numbers of `classes`. `about` goes into machine.json and into the exported config.json.
    Raises the errors of `rcmae.errors`, Preempted when a signal asked it to stop and the state is saved.
    """
    check_finetune(settings)
    if len(classes) < 2:
        raise DataError(f"{train.name} has {how_many(len(classes), 'class')}; two or more are needed")
    for source in (train, test):
        check_labels(source, len(classes))
    if settings.randaugment and backbone.vit.in_chans != 3:
        raise ConfigError(f"RandAugment is for images of 3 channels, not {backbone.vit.in_chans}; give --settings 'randaugment='")
    with run_context(machine, machine.out, ADVICE) as context:
        with contextlib.closing(FineTuning(backbone, train, test, classes, settings, context, about or {})) as run:
            return run.train()


def check_labels(source: Source, classes: int) -> None:
    """Every image has the number of a class. Raises DataError that names the first one without."""
    if not len(source):
        raise DataError(f"{source.name} has no images with labels")
    if source.labels is None:
        raise DataError(f"{source.name} has no labels; give class folders, a list with labels, or shards with .cls files")
    if (odd := np.flatnonzero((source.labels < 0) | (source.labels >= classes))).size:
        raise DataError(f"{source.where(int(odd[0]))} has no label among the {classes} classes ({how_many(odd.size, 'such image')})")


def fitted(settings: FineTune, images: int, parts: int = 1) -> FineTune:
    """The settings with a batch of at most so many images, see `fitted_batch`; where it is lowered, its parts have whole groups."""
    batch = fitted_batch(settings.batch_size, images, parts, least=1 + settings.mixes)  # a mixture is of two
    if batch == settings.batch_size:
        return settings
    return replace(settings, batch_size=batch, mix_group=math.gcd(settings.mix_group, batch // parts))


class FineTuning(Supervised):
    """One run: everything that is built before the first step, and what is learned and scored."""

    what, rate_name = "fine-tuning", "base_lr"

    def __init__(
        self, backbone: Backbone, train: Source, test: Source, classes: list[str], settings: FineTune, context: RunContext,
        about: dict[str, Any],
    ):  # fmt: skip
        s = fitted(settings, len(train), context.world.size * context.machine.accumulate)
        if s.batch_size < settings.batch_size:
            context.screen.say(
                f"note: {how_many(len(train), 'training image')}: batches of {s.batch_size} instead of {settings.batch_size}"
            )
        super().__init__(s, context, train, about)
        self.test_set, self.classes = test, classes
        if s.mixes and self.part % s.mix_group:
            raise ConfigError(
                f"mix_group {s.mix_group} does not divide a micro-batch of {self.part}; lower --accumulate, or give "
                f"--settings mix_group={math.gcd(s.mix_group, self.part)}"
            )
        self.warmup = s.warmup_epochs * self.steps_per_epoch / self.total
        if self.warmup >= 1:
            epochs = self.total / self.steps_per_epoch
            raise ConfigError(f"warmup_epochs {s.warmup_epochs:g} is not below the length of the run, {epochs:.2f} epochs")
        vit = classifier(backbone, len(classes), drop_path=s.drop_path, seed=s.seed)
        self.statistics = tuple(tuple(getattr(backbone, k).flatten().tolist()) for k in ("mean", "std"))
        model = Classifier(vit, *self.statistics).to(self.device).train()
        vit.set_grad_checkpointing(self.machine.checkpointing)
        if self.machine.compile:
            for block in vit.blocks:
                block.compile()
        groups = layer_decay_groups(vit, s.weight_decay, s.layer_decay)
        self.mixing = Mixing(
            len(classes),
            seed=s.seed,
            **{k: getattr(s, k) for k in ("mixup", "cutmix", "mix_prob", "switch_prob", "smoothing", "mix_group")},
        )
        self.bad_test = self.bad_files(len(test), "bad_test_files.jsonl")
        self.scored: Scored | None = None
        data = {
            "train": train.fingerprint(), "train_labels": _hash(train.labels), "test": test.fingerprint(),
            "test_labels": _hash(test.labels), "classes": classes,
        }  # fmt: skip
        optimizer = torch.optim.AdamW(groups, lr=s.peak_lr, betas=s.betas, fused=True)
        images = f"{how_many(len(train), 'image')} of {how_many(len(classes), 'class')}, {len(test):,} to test on"
        facts = {"train_images": len(train), "test_images": len(test), "classes": len(classes)}
        self.learn(model, optimizer, data, identity(backbone), load_finetune, images, **facts)

    def loader(self, start: int, stop: int) -> Iterator[dict[str, Tensor]]:
        """Micro-batches of the steps from `start` to before `stop`, on the device: "image" and "label"."""
        s, vit = self.recipe, self.model.vit
        view = SupervisedView(
            vit.patch_embed.img_size, *self.statistics, scale=s.crop_scale, flip=s.flip, randaugment=s.randaugment, erasing=s.erasing
        )
        dataset = Images(self.images, view, s.seed, vit.in_chans, labelled=True)
        return batches_of(dataset, self.sampler(start, stop), self.images, self.machine.workers, self.device, self.bad.note)

    def rate(self, t: Progress) -> float:
        return warmup_cosine(self.recipe.peak_lr, self.recipe.min_lr, self.warmup, t)

    def losses(self, batch: dict[str, Tensor], step: int, part: int) -> dict[str, Tensor]:
        """Cross-entropy with the mixed targets, of the `part`-th micro-batch of the step."""
        pixels = batch["image"]
        images, targets = self.mixing(pixels if pixels.is_floating_point() else pixels.float() / 255, batch["label"], step, part)
        torch.manual_seed(path_seed(self.recipe.seed, step, part))
        return {"loss": F.cross_entropy(self.net(images), targets)}

    def scorings(self) -> int:
        """How often the test images are scored: once an epoch, but on no more images than half of those that are trained on."""
        affordable = self.total * self.recipe.batch_size // (2 * len(self.test_set))
        return max(1, min(round(self.total / self.steps_per_epoch), affordable))

    def score(self) -> dict[str, float]:
        """Accuracy on the test images in percent; which were right is kept."""
        vit = self.model.vit
        self.scored = score(
            self.model, self.test_set, shape=vit.patch_embed.img_size, channels=vit.in_chans, device=self.device, precision=self.precision,
            batch=self.part, workers=self.machine.workers, world=self.world, note=self.bad_test.note,
        )  # fmt: skip
        return {"accuracy": 100 * float(self.scored.right.mean())}

    def format_scores(self, scores: dict[str, float]) -> str:
        return f"{scores['accuracy']:.1f} % of the test images are right"

    def finish(self) -> FineTuned:
        """Keep what the last weights make of every test image, and export them."""
        if self.scored is None:
            self.score()
        right, confidence = self.scored
        self.model.eval()
        if self.world.first:
            kept = {"right": torch.from_numpy(right), "confidence": torch.from_numpy(confidence)}
            replace_file(self.out / "test.safetensors", save(kept))
            about = self.about | {"task": "finetune", "step": self.step, "recipe_hash": recipe_hash(self.recipe)}
            folder = self.out / "export" / "classifier"
            export(self.model, folder, about, architecture_of(self.model.vit), self.classes)
            best, last = max(h["accuracy"] for h in self.history), self.history[-1]["accuracy"]
            chosen = f" (best of {len(self.history)}, chosen on the test images: {best:.1f} %)" if best > last else ""
            self.screen.say(f"{last:.1f} % right after {how_many(self.step, 'step')}{chosen}, {clock(self.seconds)}")
            self.screen.say(f'Load the classifier: timm.create_model("local-dir:{folder}", pretrained=True)')
        return FineTuned(self.model, right, confidence, self.step, self.history, self.seconds)


def _hash(labels: Int[np.ndarray, " n"]) -> str:
    return hashlib.sha256(np.ascontiguousarray(labels).tobytes()).hexdigest()
