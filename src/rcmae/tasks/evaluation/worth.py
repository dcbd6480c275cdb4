"""What `rcmae evaluate worth-it` is told beside the settings of fine-tuning."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Worth:
    """Whether pre-training paid."""

    percents: tuple[float, ...] = (1.0, 10.0, 100.0)
    "shares of the labels to fine-tune on"
    seeds: int = 3
    "runs of each; backbones are compared within a seed"
    against: tuple[str, ...] = ()
    "other backbones, as timm:vit_small_patch16_224"
