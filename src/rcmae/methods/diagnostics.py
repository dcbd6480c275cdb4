"""What a method declares for those who look at its runs: report, monitor, alarms, cost and race ask it; none knows one by name."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

Numbers = Mapping[str, Any]
"A line of metrics.jsonl, or means over several."

Sentence = tuple[str, str]
"(good | note | bad, text): an item at the top of the report."


class Curve(NamedTuple):
    """A number over the steps."""

    key: str | Callable[[Numbers], float | None]
    'of the log lines ("gradient.cosine": inside of "gradient"), or a function of a line; lines that do not hold it are left out'
    label: str = ""
    color: str = "ink"
    "student, teacher, both (what lies between them), ink, good, gold or floor"
    style: str = "-"
    'as of matplotlib; "o" for points alone, "band" for a broad pale line that others should follow'
    smooth: bool = False
    "draw a running mean, the points themselves pale behind it"


class Figure(NamedTuple):
    """A figure of the report. Without a single point it is left out."""

    id: str
    ylabel: str
    curves: tuple[Curve, ...]
    caption: str
    "how to read it, and which flag to change; flags that the method has"
    levels: tuple[tuple[str, float | str], ...] = ()
    "dashed lines: name, and a number or a key of `Method.references`"
    log: bool = False
    symlog: float | None = None
    "both signs on a logarithmic axis that is straight up to this value"
    span: float = 0.0
    "the least that the y axis spans"
    markers: bool = False
    right: tuple[str, str, float] | None = None
    "a second axis: its name, and a key and a factor that give the same quantity in its units"
    changing: bool = False
    "left out where it stays what it was"


class BlockFigure(NamedTuple):
    """A figure over the blocks of the network."""

    id: str
    ylabel: str
    key: str | Callable[[Numbers], dict[str, float] | None]
    "of lines that hold a number for every block"
    caption: str
    times: int = 1
    "1: the last such line; 3: the first, the middle and the last one"
    levels: tuple[tuple[str, float | str], ...] = ()
    log: bool = False


class Panel(NamedTuple):
    """A part of the report with a heading of its own."""

    id: str
    title: str
    text: str
    rows: tuple[tuple[str, str, Callable[[float | None], str]], ...] = ()
    "table: name, key of the log lines, and how the number is written; at the start, halfway and now, if it changes. Without: no panel"
    figures: tuple[Figure | BlockFigure, ...] = ()
    more: tuple[Figure | BlockFigure, ...] = ()
    "less important ones, folded away"
    more_title: str = ""


class Variant(NamedTuple):
    """A method with some settings replaced that is worth a row of its own beside it."""

    name: str
    settings: dict[str, Any]
    note: str
    "why it stands there, in a sentence"
    pays: str = ""
    "the method whose cost it has, where its own is not needed to learn the same"


class Diagnostics:
    """What may be asked of a method, with answers that fit one that declares nothing but `losses`."""

    losses: ClassVar[dict[str, str]] = {"loss": "loss"}
    "every value that `forward` returns, and its name on the line of progress"
    collapse_advice: ClassVar[str] = "lower --base-lr or lengthen --warmup"
    "what helps against collapse"
    variants: ClassVar[tuple[Variant, ...]] = ()
    "rows of their own in `compare cost`"
    controls: ClassVar[tuple[Variant, ...]] = ()
    "arms of their own in `compare race`, before the method's own"

    @classmethod
    def figures(cls) -> tuple[Figure, ...]:
        """Figures of learning; the first one is the loss, and its `ylabel` the name of the loss."""
        return (Figure("figure-loss", "loss", (Curve("loss", "", "student"),), "The loss, by step."),)

    @classmethod
    def panels(cls) -> tuple[Panel, ...]:
        """More parts of the report."""
        return ()

    @classmethod
    def judge(cls, means: Numbers, reference: Numbers) -> list[Sentence]:
        """Is the loss normal? `means` are those of the last log lines, `reference` what `references` gave, empty where it was not asked."""
        return [("note", f"The {cls.figures()[0].ylabel} is {means['loss']:.4f}.")]

    @classmethod
    def derived(cls, means: Numbers) -> dict[str, float]:
        """More for a log line, from the means of what `forward` returned since the one before."""
        return {}
