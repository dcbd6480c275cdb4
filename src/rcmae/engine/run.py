"""The run directory: who owns it, what it says of itself, and the context that every run is carried out in."""

import ctypes
import fcntl
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import __version__
from ..config import Workplace, check, flat, to_toml
from ..errors import ConfigError, DataError, OutOfMemoryError, Preempted, ProcessError, StorageError, first_line
from . import distributed, signals
from .checkpoint import checkpoints, replace_file
from .console import Screen
from .distributed import World


class RunContext(NamedTuple):
    """Where a run happens."""

    out: Path
    machine: Workplace
    device: torch.device
    world: World
    screen: Screen


@contextmanager
def run_context(machine: Workplace, out: Path | None, advice: str) -> Iterator[RunContext]:
    """Everything that a run is carried out in: its device and threads, the other ranks, its directory `out`, locked, and the screen.

    Signals are answered within it, failures come out as errors of `rcmae.errors`, lacks of memory with `advice`, and torch's own
    generators are left as they were. Raises ConfigError without `out`, and Preempted for Interrupted where there is a checkpoint.
    """
    check(machine)
    if out is None:
        raise ConfigError("a run needs a directory: give --out")
    device = distributed.pick_device(machine.device)
    if machine.threads:
        torch.set_num_threads(machine.threads)
    if device.type == "cpu":
        keep_freed_memory()
    with signals.answered(), distributed.joined(device) as world, plain_failures(device, world, advice):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            with own_run(out) if world.first else nullcontext(), Screen(world.first) as screen:
                try:
                    yield RunContext(out, machine, device, world, screen)
                except signals.Interrupted as e:
                    if not (kept := checkpoints(out / "checkpoints")):
                        raise
                    raise preempted(str(e), int(kept[0].name.removeprefix("step_"))) from e


def preempted(signal: str, step: int) -> Preempted:
    """The error of a run that a signal ended and that can be resumed."""
    signals.end_with(Preempted.exit_code)
    return Preempted(f"stopped by {signal}; saved at step {step}, run the same command again")


@contextmanager
def owned(run: Path) -> Iterator[None]:
    """Make the run directory and hold it alone; the system frees it when the process ends, however it ends.

    Raises ConfigError when another process works there, StorageError when it cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("a+")
    except OSError as e:
        raise StorageError(f"cannot write the run directory {run}: {e.strerror}; choose another with --out") from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            lock.seek(0)
            raise ConfigError(f"{run} is in use by process {lock.read().strip() or '?'}; choose another --out") from e
        try:
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), str(os.getpid()).encode())
        except OSError as e:
            raise StorageError(f"cannot write the run directory {run}: {e.strerror}; choose another with --out") from e
        try:
            yield
        finally:  # said aloud: a loader process that is still ending holds a copy of the handle
            fcntl.flock(lock, fcntl.LOCK_UN)


@contextmanager
def own_run(run: Path) -> Iterator[None]:
    """`owned`; and what is refused before the first checkpoint, by ConfigError or DataError, leaves the directory as it was, or absent.

    Only the names of unreadable images stay.
    """
    made = [path for path in (run, *run.parents) if not path.exists()]
    there = set(run.iterdir()) if run.is_dir() else set()
    replaced = {path: path.read_bytes() for path in there if path.name in ("recipe.toml", "metrics.jsonl")}
    with owned(run):
        try:
            yield
        except (ConfigError, DataError):
            if not checkpoints(run / "checkpoints"):
                for path in set(run.iterdir()) - there - set(run.glob("bad_*.jsonl")):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                for path, content in replaced.items():
                    replace_file(path, content)
                with suppress(OSError):  # not empty: the names stay
                    for path in made:
                        path.rmdir()
            raise


def record_recipe(run: Path, recipe: Any, load: Callable[[str], Any]) -> None:
    """Write recipe.toml at a fresh start; else compare with the one that is there, see `check_same_recipe`.

    A run without any checkpoint has not begun: what an attempt that ended before its first one left is of no meaning, and is replaced.
    """
    path = run / "recipe.toml"
    if not checkpoints(run / "checkpoints"):
        replace_file(path, to_toml(recipe))
        for path in run.glob("bad_*.jsonl"):
            path.unlink()
        return
    check_same_recipe(run, recipe, load)


def check_same_recipe(run: Path, recipe: Any, load: Callable[[str], Any]) -> None:
    """Raises ConfigError naming what differs from the recipe that a run was begun with, if it has begun. `load` reads the file back.

    Where the data lies may change: whether it is the same is told by its fingerprint in the checkpoint.
    """
    path = run / "recipe.toml"
    if not checkpoints(run / "checkpoints") or not path.exists():  # lost: written again once the checkpoint has told that it is its own
        return
    old, new = flat(load(str(path))), flat(recipe)
    differ = [f"{k} {old.get(k)} (now {new.get(k)})" for k in {**old, **new} if k != "data" and old.get(k) != new.get(k)]
    if differ:
        raise ConfigError(f"{run} was begun with {', '.join(differ)}; use another --out, or the same recipe to go on")


def describe_machine(device: torch.device, precision: str) -> dict[str, Any]:
    """What a reader needs to know to compare numbers: versions, hardware, commit. No names of people or machines."""
    cpu = next((x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), platform.processor())
    return {
        "rcmae": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "numpy": version("numpy"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": precision,
        "commit": _commit(),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _commit() -> str | None:
    """The commit of this package's own checkout, with + when it has changes; None outside one."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here)]
        top = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=5)
        if top.returncode:
            return None
        head = subprocess.run([*git, "describe", "--always", "--dirty=+"], capture_output=True, text=True, timeout=5)
        return head.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a small JSON file in one go. Raises StorageError."""
    replace_file(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if it cannot be read or is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def describe_environment(machine: Workplace, device: torch.device, precision: str, world: World) -> dict[str, Any]:
    """What must not change if a resumed run is to be equal to the bit."""
    return {
        "torch": torch.__version__, "device": device.type, "precision": precision, "ranks": world.size,
        "accumulate": machine.accumulate, "threads": torch.get_num_threads(), "compile": machine.compile,
    }  # fmt: skip


def changed_environment(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each that did change."""
    return [f"note: {k} was {v}, is {now[k]}: the run goes on, but not to the same bit" for k, v in then.items() if v != now[k]]


ADVICE = "try --accumulate 2, --checkpointing or a smaller --batch-size"
"What to do about a lack of memory."

CONNECTION = ("Connection", "connection", "gloo", "NCCL")
"Words by which a plain RuntimeError tells that another rank is gone."


@contextmanager
def plain_failures(device: torch.device, world: World, advice: str = ADVICE) -> Iterator[None]:
    """Within it, lost processes and a lack of memory are ProcessError and OutOfMemoryError, in one line that ends with the advice."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise OutOfMemoryError(f"{device} ran out of memory at {memory_gib(device):.1f} GiB; {advice}") from e
    except RuntimeError as e:
        text = str(e)
        if "DataLoader worker" in text:
            raise ProcessError(f"a loader process was lost ({first_line(e)}); run the same command again") from e
        if isinstance(e, torch.distributed.DistError) or (world.size > 1 and any(word in text for word in CONNECTION)):
            raise ProcessError(f"another process of the run was lost ({first_line(e)}); run the same command again") from e
        if "can't allocate memory" in text:  # what torch says of the host's
            raise OutOfMemoryError(f"the host ran out of memory; {advice}, or fewer --workers") from e
        raise


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the device's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def keep_freed_memory() -> None:
    """Tell glibc to keep the big blocks that a step frees for the next one: on a CPU, page faults cost up to a tenth."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
                libc.mallopt(parameter, 2**30)
