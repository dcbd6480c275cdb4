"""What one sees of a run: a live bar on a terminal, plain lines elsewhere."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import ClassVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

LOSS = {"loss": "loss"}
"What is shown of a log line where nothing else is asked for."


class Screen:
    """Prints for rank 0 and is silent on the others; a context around the loop."""

    LINES = 30
    "lines of progress a run, at least, where there is no terminal to hold a bar"

    SECONDS = 60.0
    "and the longest time between two of them, if there is anything to tell"

    QUIET = 5.0
    "seconds after the last line from which on `progress` tells what is being done"

    last: ClassVar[float] = time.monotonic()
    "when any screen said its last line; at first, when the process began"

    def __init__(self, first: bool):
        self.told = -1
        self.console = Console(quiet=not first, soft_wrap=True, highlight=False)
        self.bar: Progress | None = None

    def say(self, text: str) -> None:
        Screen.last = time.monotonic()
        self.console.print(text, markup=False)

    def start(self, total: int, done: int) -> None:
        """Show the bar, on a terminal; elsewhere `step` says how far it is before the first `report`, if that comes late."""
        self.total, self.already, self.began, self.wait = total, done, time.monotonic(), 2 * self.QUIET
        self._show_bar(total, done)

    def _show_bar(self, total: int, done: int) -> None:
        if self.console.is_terminal:
            columns = (
                BarColumn(24), TextColumn("{task.completed:,.0f}/{task.total:,.0f}"), TimeElapsedColumn(), TextColumn("left"),
                TimeRemainingColumn(), TextColumn("{task.description}"),
            )  # fmt: skip
            self.bar = Progress(*columns, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task("", total=total, completed=done)

    def step(self, done: int) -> None:
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=done)
        elif now - Screen.last > self.wait:
            self.wait = self.SECONDS
            left = (now - self.began) / (done - self.already) * (self.total - done)
            self.say(f"step {done:>6,}/{self.total:,}  {clock(left)} left")

    def report(self, done: int, total: int, line: dict[str, float], left: float, labels: Mapping[str, str] = LOSS) -> None:
        """The numbers of one log step; `left` is the expected time to the end in seconds, `labels` as in `describe`."""
        text = describe(line, labels)
        if self.bar:
            self.bar.update(self.task, description=text)
        elif done == total or done * self.LINES // total > self.told or time.monotonic() - Screen.last > self.SECONDS:
            self.told = done * self.LINES // total
            self.say(f"step {done:>6,}/{total:,}  {text}  {clock(left)} left")

    def stop(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar for something that is no training; the body tells it how much is done. Without a terminal, a line now and then.

        Nothing is said of what ends within `QUIET` seconds after the last line, which may be one of another part that ended as soon. A line
        also comes while the body is busy with a long part and tells nothing.
        """
        began, done, ended = time.monotonic(), 0, threading.Event()
        inside = self.bar  # of training, which goes on afterwards

        def tick(so_far: int) -> None:
            nonlocal done
            done = so_far
            if inside:
                inside.update(self.task, description=f"{what}: {done:,} of {total:,}")
                return
            if self.bar:
                self.bar.update(self.task, completed=done)

        def lines() -> None:
            wait = max(0.5, Screen.last + self.QUIET - began)
            while not ended.wait(wait):
                took = time.monotonic() - began
                wait = min(30.0, 10 + took / 20)
                self.say(
                    f"{what}: {done:,} of {total:,}, "
                    + (f"{clock(took * (total - done) / done)} left" if done else f"{clock(took)} so far")
                )

        teller = threading.Thread(target=lines, daemon=True)

        if not inside:
            self._show_bar(total, 0)
        if self.bar:
            self.bar.update(self.task, description=what)
        else:
            teller.start()
        try:
            yield tick
        finally:
            ended.set()
            if not inside:
                self.stop()

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        sys.stdout.flush()

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)


def describe(line: dict[str, float], labels: Mapping[str, str] = LOSS) -> str:
    """A metrics line in one short line of text; `labels` are the keys to show and their short names."""
    parts = [f"{short} {line[name]:.4f}" for name, short in labels.items() if line.get(name) is not None]
    parts.append(f"{line['images_per_s']:,.0f} img/s")
    parts.append(f"data wait {line['data_wait']:.0%}")
    parts.append(f"{line['memory_gib']:.1f} GiB")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
