"""End-to-end fine-tuning, as a task."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from .base import EvaluationOptions, Task, TaskResult, recorded_settings, run_of_backbone

if TYPE_CHECKING:
    from ..context import EvaluationContext
    from ..finetune import FineTuneRecipe


@dataclass(frozen=True, kw_only=True)
class FineTune(Task):
    """Train all weights of a backbone with a new head; the same command resumes an interrupted run."""

    name = "finetune"
    all_ranks = True
    resumes = True

    recipe: str | None = None
    "a fine-tuning recipe (`rcmae list`) or TOML file; default: by the data and the backbone"
    settings: tuple[str, ...] = ()
    "changes to the recipe: --settings epochs=20 batch_size=256"
    accumulate: int = 1
    "micro-batches per optimizer step and device"
    compile: bool = False
    "compile the transformer blocks with torch.compile"
    checkpointing: bool = False
    "activation checkpointing: less memory, about a third more time"
    max_corrupt_fraction: float = 0.01
    "stop if more than this fraction of the images (and more than ten files) is unreadable"

    def validate(self) -> list[str]:
        # max_corrupt_fraction may be 0.
        return [text for text in super().validate() if not text.startswith("max_corrupt_fraction")]

    def check_settings(self, backbone: str, options: EvaluationOptions) -> None:
        super().check_settings(backbone, options)
        if backbone == "pixels":
            raise ConfigError(
                "pixels have no weights to fine-tune; give a backbone, or scratch:BACKBONE for a randomly "
                "initialized one"
            )
        self.resolve_recipe(backbone, options.with_data(backbone))

    def resolve_recipe(self, backbone: str, options: EvaluationOptions) -> tuple[str, "FineTuneRecipe"]:
        """The recipe's name, and the recipe with `settings` applied. Raises ConfigError."""
        from ...config import check, replaced
        from ..finetune_recipe import load_finetune

        name = self.recipe or suited_recipe(backbone, options.data or "")
        recipe = load_finetune(name)
        if any(text.partition("=")[0].strip() in ("steps", "epochs") for text in self.settings):
            recipe = replace(recipe, steps=None, epochs=None)
        recipe = replaced(recipe, self.settings, name)
        if recipe.seed:
            raise ConfigError(
                f"{name} and its settings set seed {recipe.seed}; leave it out there and give --seed instead"
            )
        return name, check(replace(recipe, seed=options.seed))

    def required_features(self, context: "EvaluationContext") -> None:
        return None

    def run(self, context: "EvaluationContext") -> TaskResult:
        """Train in a run directory beside the result files, and score the weights of the last step."""
        from ...config import BaseRuntimeConfig
        from ...models.backbone import Backbone
        from ..context import results_folder, stem
        from ..finetune import finetune
        from ..robustness.metrics import ece

        options = context.options
        name, recipe = self.resolve_recipe(context.name, options)
        out = results_folder(context.name, options) / stem(self.name, context.which, options)
        names = ("accumulate", "compile", "checkpointing", "max_corrupt_fraction")
        given: dict[str, Any] = {k: getattr(options, k) for k in ("device", "precision", "workers")}
        runtime = BaseRuntimeConfig(out=out, **given | {k: getattr(self, k) for k in names})
        data, train = context.set, context.part("train")
        tested = data.test.fingerprint()[:16]
        about: dict[str, Any] = {"backbone": context.name, "network": context.which, "test": tested}
        about |= {"data": options.data, "val": options.val}
        assert isinstance(context.backbone, Backbone)  # check_settings refuses "pixels"
        tuned = finetune(context.backbone, train, data.test, data.classes, recipe, runtime, about)
        best = max(entry["accuracy"] for entry in tuned.history)
        metrics = {"top1": 100 * float(tuned.correct.mean()), "ECE": ece(tuned.confidence, tuned.correct)}
        if context.world.is_main and best > metrics["top1"]:
            metrics |= {"best epoch, chosen on the test images": best}
        settings = asdict(self) | asdict(recipe) | {"recipe": name, "run": str(out)}
        return TaskResult(metrics, tuned.correct, tuned.model, settings, seconds=tuned.seconds)


def suited_recipe(backbone: str, data: str) -> str:
    """The default recipe for the data: of own images `small`, if the backbone is of a run on small ones."""
    from ...data.sources import recipe_for
    from ..finetune_recipe import SMALL

    name, run = recipe_for(data), run_of_backbone(backbone)
    size = recorded_settings(run).get("images", {}).get("size", SMALL) if run else SMALL
    return "small" if name == "folder" and size < SMALL else name
