"""What `rcmae evaluate` is told. Without torch, so that --help is quick."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError

KS = (10, 20, 100, 200)
"Neighbours that vote, as DINO reports them (its tables use 20)."

Which = Literal["teacher", "student", "both"]
Pool = Literal["mean", "cls"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What every task is told."""

    data: str = "embedded:digits"
    "labelled images: a folder with train/ and val/, a folder of classes, or another source that `rcmae list` shows"
    val: str | None = None
    "the part to score on, where it is not in data"
    which: Which = "teacher"
    "network of a run or an official checkpoint; both evaluates both"
    labels: float = 100.0
    "percent of the training labels that are used; the same images for every backbone"
    seed: int = 0
    "of the split, the order and the new weights"
    heads: int | None = None
    "attention heads, for weights that come without a configuration"
    device: str = "auto"
    "auto, cpu, cuda, cuda:1 or mps"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    "of the backbone's matrix products"
    workers: int | None = None
    "loader processes; default: by the data and the cores"
    out: Path | None = None
    "where results go; default: RUN/evaluate, or runs/evaluate/NAME"
    cache: Path | None = None
    "where features and label splits are kept; default: ~/.cache/rcmae"


@dataclass(frozen=True, kw_only=True)
class KNN:
    """k-nearest neighbours."""

    k: tuple[int, ...] = KS
    "neighbours that vote; the model that is kept is of 20, or of the first one given"
    pool: Pool = "mean"
    "what is compared: the mean over the patches or the class token"
    temperature: float = 0.07
    "of the votes"


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer."""

    protocol: Literal["rates", "mae"] = "rates"
    "rates: SGD at 13 learning rates at once, chosen on held-out training images; mae: LARS behind BatchNorm, as in MAE and RC-MAE"
    pool: Pool | None = None
    "what it reads; default: mean for rates, cls for mae"
    batch: int | None = None
    "images a step; default: 1,024 for rates, 16,384 for mae"
    fit_steps: int | None = None
    "steps of rates; default: 100 passes, but not below 500 nor above DINOv2's 12,500"
    fit_epochs: int = 90
    "passes of mae (50 for ViT-L there)"
    fit_lr: float = 0.1
    "learning rate of mae for a batch of 256"
    augment: bool = False
    "mae: new crops and flips in every pass, as published, instead of features that are computed once"


@dataclass(frozen=True, kw_only=True)
class Attentive:
    """Attention over all tokens, then a linear layer."""

    kind: Literal["efficient", "latent"] = "efficient"
    "efficient: several queries, no key projection (Efficient Probing); latent: one query in a full attention layer with an MLP"
    queries: int = 12
    "queries, or heads of the one query; lowered to what divides the width"
    fit_steps: int | None = None
    "steps; default: 40 passes, but not below 500 nor above 50,000"
    batch: int = 1024
    "images a step"


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """End-to-end fine-tuning."""

    recipe: str | None = None
    "a fine-tuning recipe (`rcmae list`) or TOML file; default: the one that suits the data"
    settings: tuple[str, ...] = ()
    "settings of the recipe that are replaced: --settings epochs=20 batch_size=256"
    accumulate: int = 1
    "micro-batches an optimizer step and device"
    compile: bool = False
    "compile the blocks"
    checkpointing: bool = False
    "recompute activations in the backward pass: less memory, about a third more time"
    bad_share: float = 0.01
    "end when more than this share of the images (and more than ten files) is unreadable"


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """Shifted, corrupted and attacked images."""

    probe: Literal["linear", "knn", "attentive"] = "linear"
    "what is fitted on a backbone that has no head; a classifier is taken as it is"
    corruptions: bool = True
    "corrupt the test images on the fly: C-style, not ImageNet-C"
    corrupted_images: int | None = 5000
    "test images that are corrupted, each 75 times"
    attacks: bool = True
    "attack the test images by FGSM and PGD"
    eps: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    "sizes of the attacks in 1/255"
    pgd_steps: int = 20
    "gradient steps of PGD"
    restarts: int = 1
    "random starts of PGD"
    attacked_images: int | None = 1000
    "test images that are attacked"
    imagenet_c: Path | None = None
    "the published set: a folder with CORRUPTION/SEVERITY/WNID"
    imagenet_a: Path | None = None
    "a folder with 200 wnid folders"
    imagenet_r: Path | None = None
    "a folder with 200 wnid folders"
    imagenet_sketch: Path | None = None
    "a folder with 1,000 wnid folders"
    real: Path | None = None
    "ImageNet's validation images, to be scored by their reassessed labels (ReaL)"


@dataclass(frozen=True, kw_only=True)
class Worth:
    """Whether pre-training paid."""

    percents: tuple[float, ...] = (1.0, 10.0, 100.0)
    "shares of the labels to fine-tune on"
    seeds: int = 3
    "runs of each; backbones are compared within a seed"
    against: tuple[str, ...] = ()
    "other backbones, as timm:vit_small_patch16_224"


def check_task(task: Any) -> None:
    """Numbers of a task are above 0, all that are not in one ConfigError."""
    values = [(f.name, x) for f in fields(task) for v in [getattr(task, f.name)] for x in (v if isinstance(v, tuple) else [v])]
    wrong = [f"{k} must be above 0, not {x:g}" for k, x in values if type(x) in (int, float) and not x > 0 and k != "bad_share"]
    if isinstance(task, Linear) and task.protocol == "mae" and task.batch == 1:
        wrong.append("batch must be 2 or more: the protocol of mae standardises within a batch")
    if wrong:
        raise ConfigError("; ".join(wrong))


def check_evaluation(how: Evaluation) -> None:
    """Likewise what every task is told."""
    rules = [
        (0 < how.labels <= 100, f"labels is a percentage above 0 and up to 100, not {how.labels:g}"),
        (0 <= how.seed < 2**63, f"seed must be 0 or more and below 2**63, not {how.seed}"),
        (how.heads is None or how.heads >= 1, f"heads must be 1 or more, not {how.heads}"),
        (how.workers is None or how.workers >= 0, f"workers must be 0 or more, not {how.workers}"),
    ]
    if wrong := [message for fine, message in rules if not fine]:
        raise ConfigError("; ".join(wrong))
