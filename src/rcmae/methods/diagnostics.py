"""What a method declares about itself for the report, the monitor, the alarms, `compare cost` and `compare
race`, which do not know methods by name."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

Numbers = Mapping[str, Any]
"A record of metrics.jsonl, or means over several."

Sentence = tuple[str, str]
"(good | note | bad, text): an item at the top of the report."


class Curve(NamedTuple):
    """A metric over the steps."""

    key: str | Callable[[Numbers], float | None]
    """key in the log lines ("gradient.cosine" is "cosine" in "gradient"), or a function of a line; lines
    without the value are skipped"""
    label: str = ""
    color: str = "ink"
    "student, teacher, both (for the difference of the two), ink, good, gold or baseline"
    style: str = "-"
    'matplotlib\'s line style; "o": points only, "band": a broad pale line that another one should follow'
    smooth: bool = False
    "draw a running mean in front of pale points"


class Figure(NamedTuple):
    """A figure of the report, omitted if it has no points."""

    id: str
    ylabel: str
    curves: tuple[Curve, ...]
    caption: str
    "how to read the figure, and which of the method's flags to change"
    levels: tuple[tuple[str, float | str], ...] = ()
    "dashed lines: a label, and a number or a key of `Method.references`"
    log: bool = False
    symlog: float | None = None
    "a symmetric logarithmic y axis, linear up to this value"
    span: float = 0.0
    "minimum span of the y axis"
    markers: bool = False
    right: tuple[str, str, float] | None = None
    "a second y axis: its label, and the key and the factor of the same quantity in its unit"
    changing: bool = False
    "omit the figure if the value is constant"


class BlockFigure(NamedTuple):
    """A figure over the blocks of the network."""

    id: str
    ylabel: str
    key: str | Callable[[Numbers], dict[str, float] | None]
    "key or function of the lines that hold a value for every block"
    caption: str
    times: int = 1
    "1: the last such line; 3: the first, the middle and the last one"
    levels: tuple[tuple[str, float | str], ...] = ()
    log: bool = False


class Panel(NamedTuple):
    """A section of the report with its own heading."""

    id: str
    title: str
    text: str
    rows: tuple[tuple[str, str, Callable[[float | None], str]], ...] = ()
    """rows of a table: name, key in the log lines, and format function; columns: start, middle and end, if
    the value changes. Without values, the panel is omitted"""
    figures: tuple[Figure | BlockFigure, ...] = ()
    more: tuple[Figure | BlockFigure, ...] = ()
    "less important figures, collapsed"
    more_title: str = ""


class Variant(NamedTuple):
    """A method with some settings replaced, compared beside the method itself."""

    name: str
    settings: dict[str, Any]
    note: str
    "why it is included, in a sentence"
    cost_of: str = ""
    "the method whose cost is charged, if that one learns the same for less"


class Diagnostics:
    """The declarations of a method; the defaults fit one that declares only `losses`."""

    losses: ClassVar[dict[str, str]] = {"loss": "loss"}
    "every key that `forward` returns, and its name in the progress line"
    collapse_advice: ClassVar[str] = "lower --base-lr or lengthen --warmup"
    "what helps against collapse"
    variants: ClassVar[tuple[Variant, ...]] = ()
    "additional rows of `compare cost`"
    controls: ClassVar[tuple[Variant, ...]] = ()
    "additional arms of `compare race`, before the method"

    @classmethod
    def figures(cls) -> tuple[Figure, ...]:
        """Learning curves; the first one is the loss, and its `ylabel` the name of the loss."""
        return (Figure("figure-loss", "loss", (Curve("loss", "", "student"),), "The loss by step."),)

    @classmethod
    def panels(cls) -> tuple[Panel, ...]:
        """Further sections of the report."""
        return ()

    @classmethod
    def judge(cls, means: Numbers, reference: Numbers) -> list[Sentence]:
        """Sentences on whether the loss is normal, from the `means` of the last log lines and from
        `Method.references`, which is empty if it was not computed."""
        return [("note", f"The {cls.figures()[0].ylabel} is {means['loss']:.4f}.")]

    @classmethod
    def weak_teacher(cls, means: Numbers) -> str:
        """Why the teacher has little effect in a run, in a sentence, from the `means` of the last log lines;
        otherwise empty. With a sentence, the report folds the panel "teacher"."""
        return ""

    @classmethod
    def derived(cls, means: Numbers) -> dict[str, float]:
        """Further values for a log line, from the `means` of the losses since the previous line."""
        return {}
