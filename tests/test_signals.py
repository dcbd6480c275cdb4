"""Signals to a busy process, where they are raised, held, or dropped by Python."""

import signal
import subprocess
import sys
import time

import pytest

from tests.mutations import catches

BEGIN = """
import os, signal, sys, time, weakref
if os.environ.get("RCMAE_MUTATION"):
    import tests.conftest
from rcmae.engine import signals
def ready():
    print("ready", flush=True)
def main():
    with signals.handled():
        work()
"""

END = """
try:
    main()
except signals.Interrupted as e:
    sys.exit(e.exit_code)
"""

WORK = {
    "plain": """
def work():
    ready()
    time.sleep(30)
""",
    "held": """
def work():
    with signals.held():
        ready()
        time.sleep(1)
        print("done", flush=True)
    time.sleep(30)
""",
    "interruptible": """
def work():
    with signals.held(), signals.interruptible():
        ready()
        time.sleep(30)
""",
    "destructor": """
class Slow:
    def __del__(self):
        ready()
        time.sleep(0.5)
def work():
    Slow()
    time.sleep(30)
""",
    "weak reference": """
class Thing:
    pass
def slow(reference):
    ready()
    time.sleep(0.5)
def work():
    thing = Thing()
    reference = weakref.ref(thing, slow)
    del thing
    time.sleep(30)
""",
    "deaf": """
def work():
    while True:
        try:
            ready()
            time.sleep(30)
        except BaseException:
            time.sleep(30)
""",
    "another destructor": """
class Faulty:
    def __del__(self):
        raise ValueError("printed as usual")
def work():
    Faulty()
    ready()
    time.sleep(30)
""",
}


def started(work: str) -> subprocess.Popen:
    """A process that has reached `ready()`."""
    script = BEGIN + work + END
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@catches(
    "an exception that Python dropped is not raised again",
    "rcmae.engine.signals:_unraisable",
    lambda old: lambda otherwise, lost: None,
)
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("plain", 0, 1),
        ("held", 0.7, 2),
        ("interruptible", 0, 1),
        ("destructor", 0, 2),
        ("weak reference", 0, 2),
        ("deaf", 3.8, 6),
        ("another destructor", 0, 1),
    ],
)
def test_a_signal_ends_any_work(name, least, most):
    """Within seconds, with the signal's own exit code, and without a traceback where Python dropped the first
    exception."""
    with started(WORK[name]) as process:
        time.sleep(0.1)
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        took = time.monotonic() - sent
    assert process.returncode == 128 + signal.SIGTERM
    assert least < took < most + 1, "with tolerance for a loaded machine"
    assert out == ("done\n" if name == "held" else "")
    lines = err.splitlines()
    assert lines.count("rcmae: SIGTERM received: stopping; a second one ends this at once") == 1
    assert ("ValueError: printed as usual" in lines) == (name == "another destructor")
    assert name == "another destructor" or len(lines) == 1, err


def test_a_second_signal_ends_it_at_once():
    with started(WORK["deaf"]) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.8)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT and time.monotonic() - sent < 2
