"""SIGINT, SIGTERM, SIGUSR1 and SIGHUP: each is answered on the screen at once and ends the command within seconds.

Outside of any block below, a signal raises `Interrupted` where the program stands. Within `held()` it waits for the end of the block, so
that what belongs together is done together; within `interruptible()`, inside of `held()`, it is raised at once again. A second signal
ends the process without another word, and so does a watchdog, `GRACE` seconds after the first one, where nothing is held.
"""

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

GRACE = 4.0
"Seconds from a signal to the end of a process that does not end by itself, as in a long call of a library. Held time does not count."


class Interrupted(BaseException):
    """A signal asks the command to end. Not an Exception: nobody who handles errors should handle this."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """As a shell reports it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


_asked: int | None = None
_depth = 0
"Blocks of `held()` less blocks of `interruptible()` that the main thread stands in."


def asked() -> str | None:
    """The name of the signal that asked this process to end, if one did."""
    return None if _asked is None else signal.Signals(_asked).name


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Answer signals within this block, which must be the outermost one; inside another, or outside the main thread, it does nothing."""
    global _asked, _depth
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is _handle:
        yield
        return
    _asked, _depth = None, 0
    receive, send = os.pipe()
    os.set_blocking(send, False)
    before = {n: signal.getsignal(n) for n in NUMBERS}
    fd = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(receive,), daemon=True)
    watcher.start()
    try:
        for number in NUMBERS:
            if not (number == signal.SIGHUP and before[number] is signal.SIG_IGN):  # ignored under nohup
                signal.signal(number, _handle)
        yield
    finally:
        for number in NUMBERS:
            signal.signal(number, before[number])
        signal.set_wakeup_fd(fd)
        os.write(send, b"\0")
        watcher.join()
        os.close(receive), os.close(send)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A signal waits for the end of this block and is raised there."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
    raise_if_asked()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within `held()`: a signal is raised at once, also one that came before. What is done here must be safe to leave in the middle."""
    global _depth
    _depth -= 1
    try:
        raise_if_asked()
        yield
    finally:
        _depth += 1


def raise_if_asked() -> None:
    """Raises Interrupted where a signal came and nothing holds it."""
    if _asked is not None and _depth <= 0:
        raise Interrupted(_asked)


def end_at_once(code: int) -> None:
    """End this process and its children without waiting for anything that they do."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def ignore() -> None:
    """For a child process that its parent ends: deaf to these signals."""
    signal.set_wakeup_fd(-1)
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def _handle(number: int, frame: object) -> None:
    global _asked
    if _asked is not None:
        end_at_once(128 + number)
    _asked = number
    raise_if_asked()


def _watch(receive: int) -> None:
    """In a thread of its own, since the main one may be inside of a long call: say that a signal came, then count to GRACE."""
    number, seconds, tick = 0, 0.0, 0.1
    while True:
        if select.select([receive], [], [], tick if number else None)[0]:
            for byte in os.read(receive, 64):
                if byte == 0:
                    return
                if not number and byte in NUMBERS:
                    number = byte
                    text = f"rcmae: {signal.Signals(number).name} received: stopping; a second one ends this at once\n"
                    with contextlib.suppress(OSError):
                        os.write(2, text.encode())
                elif number and byte in NUMBERS:
                    time.sleep(tick)  # the handler ends the process, unless the main thread is inside of a long call
                    end_at_once(128 + byte)
        elif number and _depth <= 0 and (seconds := seconds + tick) > GRACE:
            end_at_once(128 + number)
