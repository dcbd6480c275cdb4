"""What an evaluation task is, and what every one is told. This folder imports torch where a task runs only: --help is quick."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from ...errors import ConfigError

if TYPE_CHECKING:
    from ..context import EvaluationContext, TaskResult

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


def check_evaluation(options: Evaluation) -> None:
    """Refuse impossible values, all problems in one ConfigError."""
    rules = [
        (0 < options.labels <= 100, f"labels is a percentage above 0 and up to 100, not {options.labels:g}"),
        (0 <= options.seed < 2**63, f"seed must be 0 or more and below 2**63, not {options.seed}"),
        (options.heads is None or options.heads >= 1, f"heads must be 1 or more, not {options.heads}"),
        (options.workers is None or options.workers >= 0, f"workers must be 0 or more, not {options.workers}"),
    ]
    if wrong := [message for fine, message in rules if not fine]:
        raise ConfigError("; ".join(wrong))


@dataclass(frozen=True, kw_only=True)
class Task:
    """Something a backbone is asked on a labelled set. A task is a frozen dataclass in a file of its own and a line in `TASKS`.

    Its fields, with their help below them, are the options of `rcmae evaluate NAME`; its docstring is that command's help. What needs torch
    is imported where it runs.
    """

    name: ClassVar[str]
    "of the command and of the files of results"
    takes: ClassVar[str] = (
        "A run directory, an exported folder, a .safetensors, an official .pth, timm:NAME; scratch:ANY OF THESE has new weights."
    )
    "what can be evaluated, for --help"
    takes_classifiers: ClassVar[bool] = False
    "whether a classifier that comes with its head is taken as it is"
    all_ranks: ClassVar[bool] = False
    "whether all ranks run it; else they share the making of its `required_features`, and the first one runs it"
    resumes: ClassVar[bool] = False
    "whether its results lie in a run that the same command goes on with: one place, whatever the settings; else each question has its own"

    def problems(self) -> list[str]:
        """What is impossible about its settings, a phrase each. By default numbers must be above 0."""
        return [f"{name} must be above 0, not {x:g}" for name, x in self.numbers() if not x > 0]

    def check_settings(self, backbone: str, options: Evaluation) -> None:
        """Refuse, by ConfigError and before anything is loaded, what is impossible whatever the images are."""
        if wrong := self.problems():
            raise ConfigError("; ".join(wrong))
        check_evaluation(options)

    def numbers(self) -> list[tuple[str, float]]:
        """The numbers among its settings, by name."""
        values = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return [(k, x) for k, v in values for x in (v if isinstance(v, tuple) else [v]) if type(x) in (int, float)]

    def check(self, context: "EvaluationContext") -> None:
        """Refuse, by ConfigError or DataError and before any work, what cannot be asked of this backbone on these images."""

    def required_features(self, context: "EvaluationContext") -> Literal["pooled", "tokens"] | None:
        """The features that `run` will ask for first; None where it takes images."""
        return "pooled"

    def run(self, context: "EvaluationContext") -> "TaskResult":
        """Fit on the training part, score on the test part. Raises the errors of `rcmae.errors`."""
        raise NotImplementedError

    def variant(self) -> str:
        """What its choices add to the name of its files: "-mae", "-cls", "-latent"."""
        if self.resumes:
            return ""
        values = [(getattr(self, f.name), getattr(type(self)(), f.name)) for f in fields(self)]
        return "".join(f"-{value}" for value, usual in values if isinstance(value, str) and value != usual)
