"""SIGINT, SIGTERM, SIGUSR1 and SIGHUP: each is answered on the screen at once and ends the command within seconds.

Outside of any block below, a signal raises `Interrupted` where the program stands. Within `held()` it waits for the end of the block, so
that what belongs together is done together; within `interruptible()`, inside of `held()`, it is raised at once again. A second signal
ends the process without another word, and so does a watchdog, `GRACE` seconds after the first one, where nothing is held.
"""

import contextlib
import functools
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

GRACE = 4.0
"Seconds from a signal to the end of a process that does not end by itself, as in a long call of a library. Held time does not count."

SAME = 0.5
"Seconds within which a second signal is the first one again, sent to a process and to its group."


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
"The first signal."
_unsaid = threading.Lock()
"Taken by whoever answers it on the screen."
_first = 0.0
"When it came."
_code: int | None = None
"What the watchdog ends with, if not with the signal's own code."
_raises = True
"Whether a signal is raised where the main thread stands."
_holds = False
"Whether the main thread stands in a block of `held()`, where the watchdog waits."
_lost = False
"Whether Python dropped what was raised, as it does in a destructor and in the callback of a weak reference."
_repeats = False
"Whether the next call of the handler is the watchdog's, which raises again what was lost."


def asked() -> str | None:
    """The name of the signal that asked this process to end, if one did."""
    return None if _asked is None else signal.Signals(_asked).name


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Answer signals within this block, which must be the outermost one; inside another, or outside the main thread, it does nothing."""
    global _asked, _unsaid, _code, _raises, _holds, _lost, _repeats
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is _handle:
        yield
        return
    _asked, _unsaid, _code, _raises, _holds, _lost, _repeats = None, threading.Lock(), None, True, False, False, False
    receive, send = os.pipe()
    os.set_blocking(send, False)
    before = {n: signal.getsignal(n) for n in NUMBERS}
    fd = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(receive,), daemon=True)
    watcher.start()
    unraisable = sys.unraisablehook
    sys.unraisablehook = functools.partial(_unraisable, unraisable)
    try:
        for number in NUMBERS:
            if not (number == signal.SIGHUP and before[number] is signal.SIG_IGN):  # ignored under nohup
                signal.signal(number, _handle)
        yield
    finally:
        for number in NUMBERS:
            signal.signal(number, before[number] or signal.SIG_DFL)
        signal.set_wakeup_fd(fd)
        sys.unraisablehook = unraisable
        os.write(send, b"\0")
        watcher.join()
        os.close(receive), os.close(send)
        _asked = None


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A signal waits for the end of this block and is raised there."""
    with _mode(raises=False, holds=True):
        yield
    raise_if_asked()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within `held()`: a signal is raised at once, also one that came before. What is done here must be safe to leave in the middle."""
    with _mode(raises=True, holds=_holds):
        raise_if_asked()
        yield


@contextlib.contextmanager
def _mode(raises: bool, holds: bool) -> Iterator[None]:
    global _raises, _holds
    before = _raises, _holds
    try:
        _raises, _holds = raises, holds
        yield
    finally:
        _raises, _holds = before


def raise_if_asked() -> None:
    """Raises Interrupted where a signal came and nothing holds it."""
    if _asked is not None and _raises:
        raise Interrupted(_asked)


def end_with(code: int) -> None:
    """All is saved: whatever ends this process from now on, its exit code is `code`."""
    global _code
    _code = code


def end_at_once(code: int) -> None:
    """End this process and its children without waiting for anything that they do."""
    if threading.current_thread() is threading.main_thread():  # another one could wait for ever for what the main one is writing
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises in its handler when a loader process is gone
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


def _forked() -> None:
    """A new child must not write to its parent's pipe."""
    if signal.getsignal(signal.SIGINT) is _handle:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forked)


def _unraisable(otherwise: Callable[["sys.UnraisableHookArgs"], object], lost: "sys.UnraisableHookArgs") -> None:
    global _lost
    if lost.exc_type is Interrupted:
        _lost = True
    else:
        otherwise(lost)


def _handle(number: int, frame: object) -> None:
    global _asked, _first, _repeats
    if _repeats:
        _repeats = False
        raise_if_asked()
    elif _asked is None:
        _asked, _first = number, time.monotonic()
        _answer(number)
        raise_if_asked()
    elif time.monotonic() - _first > SAME:
        end_at_once(128 + number if _code is None else _code)


def _answer(number: int) -> None:
    if _unsaid.acquire(blocking=False):
        with contextlib.suppress(OSError):
            os.write(2, f"rcmae: {signal.Signals(number).name} received: stopping; a second one ends this at once\n".encode())


def _watch(receive: int) -> None:
    """In a thread of its own, since the main one may be inside of a long call: say that a signal came, then count to GRACE."""
    global _lost, _repeats
    number, came, seconds, tick = 0, 0.0, 0.0, 0.1
    own = 0  # bytes to come from signals of this thread
    while True:
        if select.select([receive], [], [], tick if number else None)[0]:
            for byte in os.read(receive, 64):
                if byte == 0:
                    return
                if own and byte == number:
                    own -= 1
                elif byte in NUMBERS and not number:
                    number, came = byte, time.monotonic()
                    _answer(number)
                elif byte in NUMBERS and time.monotonic() - came > SAME:
                    time.sleep(tick)  # the handler ends the process, unless the main thread is inside of a long call
                    end_at_once(128 + byte if _code is None else _code)
        elif _lost:
            _lost, _repeats, own = False, True, own + 1
            signal.pthread_kill(threading.main_thread().ident, number)
        elif number and not _holds and (seconds := seconds + tick) > GRACE:
            end_at_once(128 + number if _code is None else _code)
