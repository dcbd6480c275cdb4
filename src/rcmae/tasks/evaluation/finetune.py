"""End-to-end fine-tuning, as a task."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from ...errors import ConfigError
from .base import Evaluation, Task

if TYPE_CHECKING:
    from ..context import EvaluationContext, TaskResult
    from ..finetune import FineTune


@dataclass(frozen=True, kw_only=True)
class Finetune(Task):
    """Train all of a backbone with a new head; the same command goes on where it stopped."""

    name = "finetune"
    all_ranks = True
    resumes = True

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

    def numbers(self) -> list[tuple[str, float]]:
        return [(name, x) for name, x in super().numbers() if name != "bad_share"]  # which may be 0

    def check_settings(self, backbone: str, options: Evaluation) -> None:
        super().check_settings(backbone, options)
        if backbone == "pixels":
            raise ConfigError("pixels have no weights to fine-tune; give a backbone, or scratch:BACKBONE for new weights")
        self.chosen(options)

    def chosen(self, options: Evaluation) -> tuple[str, "FineTune"]:
        """The recipe's name, and what it is with the settings that replace some of it. Raises ConfigError."""
        from ...config import replaced
        from ...data.sources import recipe_for
        from ..finetune import check_finetune, load_finetune

        name = self.recipe or recipe_for(options.data)
        recipe = load_finetune(name)
        if any(text.partition("=")[0].strip() in ("steps", "epochs") for text in self.settings):
            recipe = replace(recipe, steps=None, epochs=None)
        recipe = replaced(recipe, self.settings, name)
        if recipe.seed:
            raise ConfigError(f"{name} and its settings say seed {recipe.seed}; leave it out there, --seed gives it")
        return name, check_finetune(replace(recipe, seed=options.seed))

    def required_features(self, context: "EvaluationContext") -> None:
        return None

    def run(self, context: "EvaluationContext") -> "TaskResult":
        """The run lies beside the results; the last step is the result."""
        from ...config import Workplace
        from ..context import TaskResult, place, stem
        from ..finetune import finetune
        from ..robustness.metrics import ece

        options = context.options
        name, recipe = self.chosen(options)
        out = place(context.name, options) / stem(self.name, context.which, options)
        machine = Workplace(
            out=out, device=options.device, precision=options.precision, workers=options.workers, accumulate=self.accumulate,
            compile=self.compile, checkpointing=self.checkpointing, bad_share=self.bad_share,
        )  # fmt: skip
        about = {"backbone": context.name, "network": context.which, "test": context.set.test.fingerprint()[:16]}
        tuned = finetune(context.backbone, context.part("train"), context.set.test, context.set.classes, recipe, machine, about)
        best = max(line["accuracy"] for line in tuned.history)
        metrics = {"top1": 100 * float(tuned.right.mean()), "ECE": ece(tuned.confidence, tuned.right)}
        if context.world.first and best > metrics["top1"]:
            metrics |= {"best epoch, chosen on the test images": best}
        settings = asdict(self) | asdict(recipe) | {"recipe": name, "run": str(out)}
        return TaskResult(metrics, tuned.right, tuned.model, settings, seconds=tuned.seconds)
