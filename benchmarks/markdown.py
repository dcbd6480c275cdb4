"""Markdown tables of results."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *notes: str, left: Collection[int] = (0,)
) -> str:
    """A table with the columns `left` left-aligned and the others right-aligned, and paragraphs below it."""
    align = ["---" if column in left else "---:" for column in range(len(head))]
    lines = ["| " + " | ".join(row) + " |" for row in (head, align, *rows)]
    return "\n\n".join(["\n".join(lines), *notes])


def bullets(texts: Iterable[str]) -> str:
    """A list with one item per text."""
    return "\n".join(f"- {text}" for text in texts)


def signed(interval: Sequence[float] | None) -> str:
    """A difference (`rcmae.tasks.interval`) and its interval; empty without one."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*interval) if interval else ""


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def device_name(machine: Mapping[str, Any]) -> str:
    """The model of the CPU, or the name of the accelerator."""
    return str(machine["cpu"] if machine["device"] == "cpu" else machine["device"])
