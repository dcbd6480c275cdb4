"""Options of `rcmae evaluate worth-it`, in addition to those of fine-tuning."""

from dataclasses import dataclass

from ...errors import ConfigError
from .base import EvaluationOptions
from .finetune import FineTune


@dataclass(frozen=True, kw_only=True)
class Worth:
    """Whether pre-training paid off."""

    percents: tuple[float, ...] = (1.0, 10.0, 100.0)
    "percentages of the labels to fine-tune on"
    seeds: int = 3
    "runs of each backbone and percentage; backbones are compared within a seed"
    against: tuple[str, ...] = ()
    "other backbones, for example timm:vit_small_patch16_224"

    def check_settings(self, backbone: str, tuning: FineTune, options: EvaluationOptions) -> None:
        """Raise ConfigError for invalid values, including those of fine-tuning, before anything is loaded."""
        if self.seeds < 2:
            raise ConfigError(f"seeds must be 2 or more for an interval, not {self.seeds}")
        if wrong := [p for p in self.percents if not 0 < p <= 100]:
            raise ConfigError(
                f"percents are percentages of the labels, above 0 and up to 100, not {wrong[0]:g}"
            )
        for name in (backbone, *self.against):
            tuning.check_settings(name, options.with_data(backbone))
