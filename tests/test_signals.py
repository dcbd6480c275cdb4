"""Signals to a process that is busy with something, from within which they are raised, held or lost."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

BEGIN = """
import signal, sys, time, weakref
from rcmae.engine import signals
def ready():
    print("ready", flush=True)
def main():
    with signals.answered():
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
        raise ValueError("said as always")
def work():
    Faulty()
    ready()
    time.sleep(30)
""",
}


def started(work: str) -> subprocess.Popen:
    """A process that has come to `ready()`."""
    script, environment = BEGIN + work + END, os.environ | {"PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("plain", 0, 1), ("held", 0.7, 2), ("interruptible", 0, 1), ("destructor", 0, 2), ("weak reference", 0, 2), ("deaf", 3.8, 6),
        ("another destructor", 0, 1),
    ],
)  # fmt: skip
def test_a_signal_ends_what_is_under_way(name, least, most):
    """Within seconds, with the signal's own code, and without a traceback where Python dropped the first try."""
    with started(WORK[name]) as process:
        time.sleep(0.1)
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        took = time.monotonic() - sent
    assert process.returncode == 128 + signal.SIGTERM
    assert least < took < most + 1, "a loaded machine starts and ends processes late"
    assert out == ("done\n" if name == "held" else "")
    lines = err.splitlines()
    assert lines.count("rcmae: SIGTERM received: stopping; a second one ends this at once") == 1
    assert ("ValueError: said as always" in lines) == (name == "another destructor")
    assert name == "another destructor" or len(lines) == 1, err


def test_a_second_signal_ends_it_at_once():
    with started(WORK["deaf"]) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.8)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT and time.monotonic() - sent < 2
