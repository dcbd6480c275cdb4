"""SIGINT, SIGTERM, SIGUSR1 and SIGHUP: each is acknowledged on stderr at once and ends the command within
seconds.

By default a signal raises `Interrupted` in the main thread at once. `held()` defers it to the end of the
block, to protect work that must not be interrupted; `interruptible()`, inside of `held()`, raises it at once
again. A second signal ends the process immediately, and so does a watchdog, `GRACE` seconds after the first
signal, unless it is held.
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
from typing import NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

GRACE = 4.0
"""Seconds after a signal at which a process is ended that has not ended by itself, for example during a long
library call. Time within `held()` does not count."""

SAME = 0.5
"Seconds within which a second signal is a duplicate, sent to both a process and its group."


class Interrupted(BaseException):
    """A signal requests the end of the command. Not an Exception, so that no error handler catches it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """As a shell reports it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


_received: int | None = None
"The number of the first signal."
_announcing = threading.Lock()
"Acquired, and never released, by the thread that acknowledges the signal on stderr."
_first = 0.0
"Time of the first signal."
_code: int | None = None
"Exit code used by a second signal and the watchdog instead of the signal's."
_raises = True
"Whether a signal raises Interrupted in the main thread at once."
_holds = False
"Whether the main thread is within `held()`, during which the watchdog waits."
_lost = False
"Whether Python dropped the exception, as it does in a destructor and in the callback of a weak reference."
_repeated = 0
"Signals sent by the watchdog thread to raise a lost exception again, and not yet handled."


def received() -> str | None:
    """The name of the first signal received, if any."""
    return None if _received is None else signal.Signals(_received).name


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handle signals within this block. Nested in another one, or outside the main thread, it does
    nothing."""
    global _received, _announcing, _code, _raises, _holds, _lost, _repeated
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is _handle
    ):
        yield
        return
    _received, _announcing, _code = None, threading.Lock(), None
    _raises, _holds, _lost, _repeated = True, False, False, 0
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
            if not (number == signal.SIGHUP and before[number] is signal.SIG_IGN):  # nohup ignores SIGHUP
                signal.signal(number, _handle)
        yield
    finally:
        os.write(send, b"\0")
        watcher.join()
        for number in NUMBERS:
            signal.signal(number, before[number] or signal.SIG_DFL)
        signal.set_wakeup_fd(fd)
        sys.unraisablehook = unraisable
        os.close(receive)
        os.close(send)
        _received = None


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Defer signals to the end of this block."""
    with _mode(raises=False, holds=True):
        yield
    raise_if_received()


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Like `held()`, but the watchdog does not wait. For C++ code that calls Python, where an exception would
    abort the process."""
    with _mode(raises=False, holds=_holds):
        yield
    raise_if_received()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within `held()`: raise a signal at once, also one received earlier. The body must be safe to
    interrupt."""
    with _mode(raises=True, holds=_holds):
        raise_if_received()
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


def raise_if_received() -> None:
    """Raises Interrupted if a signal was received and is not held."""
    global _lost
    if _received is not None and _raises:
        _lost = False
        raise Interrupted(_received)


def end_with(code: int) -> None:
    """Set the exit code for a process that a second signal or the watchdog ends, once everything is saved."""
    global _code
    _code = code


def end_at_once(code: int) -> NoReturn:
    """End this process and its children immediately."""
    # Another thread could wait forever for a stream that the main thread is writing to.
    if threading.current_thread() is threading.main_thread():
        # torch's handler raises when a loader process has died.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _end(number: int) -> NoReturn:
    end_at_once(128 + number if _code is None else _code)


def ignore() -> None:
    """Ignore these signals: for a child process that its parent ends, and for a process that is finishing."""
    signal.set_wakeup_fd(-1)
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def _forked() -> None:
    """Keep a forked child from writing to its parent's pipe."""
    if signal.getsignal(signal.SIGINT) is _handle:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forked)


def _unraisable(
    otherwise: Callable[["sys.UnraisableHookArgs"], object], lost: "sys.UnraisableHookArgs"
) -> None:
    global _lost
    if lost.exc_type is Interrupted:
        _lost = True
    else:
        otherwise(lost)


def _handle(number: int, frame: object) -> None:
    global _received, _first, _repeated
    if _repeated:
        _repeated -= 1
        if _lost:
            raise_if_received()
    elif _received is None:
        _received, _first = number, time.monotonic()
        _announce(number)
        raise_if_received()
    elif time.monotonic() - _first > SAME:
        _end(number)


def _announce(number: int) -> None:
    if _announcing.acquire(blocking=False):
        with contextlib.suppress(OSError):
            name = signal.Signals(number).name
            os.write(2, f"rcmae: {name} received: stopping; a second one ends this at once\n".encode())


def _watch(receive: int) -> None:
    """The watchdog, in its own thread since the main one may be inside a long call: acknowledge the signal,
    then end the process after GRACE seconds."""
    global _repeated
    number, received_at, held_seconds, now, tick = 0, 0.0, 0.0, 0.0, 0.1
    resent = 0  # bytes still to come from signals that this thread sent
    while True:
        before, ready = now, select.select([receive], [], [], tick if number else None)[0]
        now = time.monotonic()
        for byte in os.read(receive, 64) if ready else b"":
            if byte == 0:
                return
            if resent and byte == number:
                resent -= 1
            elif byte in NUMBERS and not number:
                number, received_at, before = byte, now, now
                _announce(number)
            elif byte in NUMBERS and now - received_at > SAME:
                time.sleep(tick)  # the handler ends the process, unless the main thread is inside a long call
                _end(byte)
        if _lost and _raises and not resent:
            resent, _repeated = 1, 1
            main_thread = threading.main_thread().ident
            assert main_thread is not None  # it has started
            signal.pthread_kill(main_thread, number)
        if _holds:
            held_seconds += now - before
        elif number and now - received_at - held_seconds > GRACE:
            _end(number)
