"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import ClassVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

ShowProgress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""`with progress(what, total) as tick: tick(done)`, as `Screen.progress`."""


@contextmanager
def no_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar that is not shown."""
    yield lambda done: None


class Screen:
    """Prints on rank 0 only. A context manager around the training loop."""

    LINES = 30
    "minimum number of progress lines per run without a terminal"

    SECONDS = 60.0
    "longest time between two progress lines"

    QUIET = 5.0
    "seconds without output after which `progress` starts to print"

    last: ClassVar[float] = time.monotonic()
    "when the last line was printed by any screen; initially the start of the process"

    def __init__(self, is_main: bool, stderr: bool = False):
        self.lines_printed = -1
        self.console = Console(
            quiet=not is_main, stderr=stderr, soft_wrap=True, highlight=False, markup=False
        )  # names may have brackets
        self.bar: Progress | None = None

    def say(self, text: str) -> None:
        Screen.last = time.monotonic()
        self.console.print(text)

    def start(self, total: int, done: int) -> None:
        """Show the bar on a terminal. Elsewhere, `step` prints progress if the first `report` takes long."""
        self.total, self.already, self.began, self.wait = total, done, time.monotonic(), 2 * self.QUIET
        self._show_bar(total, done)

    def _show_bar(self, total: int, done: int) -> None:
        if self.console.is_terminal:
            columns = (
                BarColumn(24),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
            )
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

    def report(
        self, done: int, total: int, line: dict[str, float], left: float, labels: Mapping[str, str]
    ) -> None:
        """Print one log line; `left` is the expected remaining time in seconds, `labels` as in `describe`."""
        text = describe(line, labels)
        if self.bar:
            self.bar.update(self.task, description=text)
        elif (
            done == total
            or done * self.LINES // total > self.lines_printed
            or time.monotonic() - Screen.last > self.SECONDS
        ):
            self.lines_printed = done * self.LINES // total
            self.say(f"step {done:>6,}/{total:,}  {text}  {clock(left)} left")

    def stop(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar for anything but training; the body calls `tick` with the amount done.

        Without a terminal a thread prints a line from time to time, also while the body is busy and does not
        call `tick`, but nothing before `QUIET` seconds without output have passed.
        """
        began, done, ended = time.monotonic(), 0, threading.Event()
        inside = self.bar  # the training bar, which continues afterwards

        def tick(so_far: int) -> None:
            nonlocal done
            done = so_far
            if inside:
                inside.update(self.task, description=f"{what}: {done:,} of {total:,}")
                return
            if self.bar:
                self.bar.update(self.task, completed=done)

        def print_lines() -> None:
            wait = max(0.5, Screen.last + self.QUIET - began)
            while not ended.wait(wait):
                took = time.monotonic() - began
                wait = min(30.0, 10 + took / 20)
                self.say(
                    (f"{what}: {done:,} of {total:,}, " if total > 1 else f"{what}: ")
                    + (f"{clock(took * (total - done) / done)} left" if done else f"{clock(took)} so far")
                )

        printer = threading.Thread(target=print_lines, daemon=True)

        if not inside:
            self._show_bar(total, 0)
        if self.bar:
            self.bar.update(self.task, description=what)
        else:
            printer.start()
        try:
            yield tick
        finally:
            ended.set()
            if not inside:
                self.stop()

    def __enter__(self) -> "Screen":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        sys.stdout.flush()

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)


def describe(line: dict[str, float], labels: Mapping[str, str]) -> str:
    """A metrics line as one short line of text; `labels` maps the keys to show to short names."""
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
