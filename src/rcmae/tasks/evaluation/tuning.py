"""End-to-end fine-tuning, as a task."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from ...errors import ConfigError
from .base import Task

if TYPE_CHECKING:
    from ..subject import Found, Subject


@dataclass(frozen=True, kw_only=True)
class Tuning(Task):
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

    def reads(self, subject: "Subject") -> None:
        return None

    def run(self, subject: "Subject") -> "Found":
        """The run lies beside the results; the last step is the result."""
        from ...config import Workplace, replaced
        from ...data.sources import recipe_for
        from ...models.backbone import Pixels
        from ..finetune import check_finetune, finetune, load_finetune
        from ..robustness.metrics import ece
        from ..subject import Found, place, stem

        how = subject.how
        if isinstance(subject.backbone, Pixels):
            raise ConfigError("pixels have no weights to fine-tune; give a backbone, or scratch:BACKBONE for new weights")
        name = self.recipe or recipe_for(how.data)
        recipe = load_finetune(name)
        if any(text.partition("=")[0].strip() in ("steps", "epochs") for text in self.settings):
            recipe = replace(recipe, steps=None, epochs=None)
        recipe = replaced(recipe, self.settings, name)
        if recipe.seed:
            raise ConfigError(f"{name} and its settings say seed {recipe.seed}; leave it out there, --seed gives it")
        recipe = check_finetune(replace(recipe, seed=how.seed))
        out = place(subject.name, how) / stem(self.name, subject.which, how)
        machine = Workplace(
            out=out, device=how.device, precision=how.precision, workers=how.workers, accumulate=self.accumulate, compile=self.compile,
            checkpointing=self.checkpointing, bad_share=self.bad_share,
        )  # fmt: skip
        about = {"backbone": subject.name, "network": subject.which, "test": subject.set.test.fingerprint()[:16]}
        tuned = finetune(subject.backbone, subject.part("train"), subject.set.test, subject.set.classes, recipe, machine, about)
        best = max(line["accuracy"] for line in tuned.history)
        metrics = {"top1": 100 * float(tuned.right.mean()), "ECE": ece(tuned.confidence, tuned.right)}
        if subject.world.first and best > metrics["top1"]:
            metrics |= {"best epoch, chosen on the test images": best}
        settings = asdict(self) | asdict(recipe) | {"recipe": name, "run": str(out)}
        return Found(metrics, tuned.right, tuned.model, settings, seconds=tuned.seconds)
