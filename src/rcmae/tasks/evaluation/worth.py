"""What `rcmae evaluate worth-it` is told beside the settings of fine-tuning."""

from dataclasses import dataclass

from ...errors import ConfigError
from .base import Evaluation
from .finetune import Finetune


@dataclass(frozen=True, kw_only=True)
class Worth:
    """Whether pre-training paid."""

    percents: tuple[float, ...] = (1.0, 10.0, 100.0)
    "shares of the labels to fine-tune on"
    seeds: int = 3
    "runs of each; backbones are compared within a seed"
    against: tuple[str, ...] = ()
    "other backbones, as timm:vit_small_patch16_224"

    def check_settings(self, backbone: str, tuning: Finetune, options: Evaluation) -> None:
        """Refuse impossible values, of fine-tuning too, before anything is loaded. Raises ConfigError."""
        if self.seeds < 2:
            raise ConfigError(f"seeds must be 2 or more for an interval, not {self.seeds}")
        if wrong := [p for p in self.percents if not 0 < p <= 100]:
            raise ConfigError(f"percents are shares of the labels, above 0 and up to 100, not {wrong[0]:g}")
        for name in (backbone, *self.against):
            tuning.check_settings(name, options)
