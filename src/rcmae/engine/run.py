"""The run directory (locking, recipe and environment records) and the context in which every run executes."""

import ctypes
import fcntl
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import __version__
from ..config import BaseRuntimeConfig, check, flat, to_toml
from ..errors import (
    ConfigError,
    DataError,
    OutOfMemoryError,
    Preempted,
    ProcessError,
    SettingsError,
    StorageError,
    first_line,
)
from . import distributed, signals
from .checkpoint import checkpoints, replace_file
from .console import Screen
from .distributed import World
from .neighbors import waiting


class RunContext(NamedTuple):
    """What a run executes in."""

    out: Path
    runtime: BaseRuntimeConfig
    device: torch.device
    world: World
    screen: Screen


@contextmanager
def run_context(runtime: BaseRuntimeConfig, out: Path | None, advice: str) -> Iterator[RunContext]:
    """Set up the device, threads and ranks, lock the directory `out` and open the screen.

    Within it signals are handled and failures are translated to the errors of `rcmae.errors`; out-of-memory
    errors end with `advice`. Torch's global generators are restored afterwards. Raises ConfigError without
    `out`, and Preempted instead of Interrupted if there is a checkpoint.
    """
    check(runtime)
    if out is None:
        raise ConfigError("a run needs a directory: give --out")
    device = distributed.pick_device(runtime.device)
    if device.type == "cpu":
        keep_freed_memory()
    with (
        signals.handled(),
        distributed.process_group(device) as world,
        translate_errors(device, world, advice),
    ):
        if runtime.threads:
            torch.set_num_threads(runtime.threads)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            with run_directory(out) if world.is_main else nullcontext(), Screen(world.is_main) as screen:
                try:
                    yield RunContext(out, runtime, device, world, screen)
                except signals.Interrupted as e:
                    if not (saved := checkpoints(out / "checkpoints")):
                        raise
                    raise preempted(str(e), int(saved[0].name.removeprefix("step_"))) from e


def preempted(signal: str, step: int) -> Preempted:
    """The error for a run that was stopped by a signal and can be resumed."""
    signals.end_with(Preempted.exit_code)
    return Preempted(f"by {signal}; saved at step {step}, run the same command again")


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Create the run directory and lock it; the operating system releases the lock when the process ends.

    Raises ConfigError if another process holds the lock, StorageError if the directory is not writable.
    """
    with _writing(run):
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("a+")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            lock.seek(0)
            raise ConfigError(
                f"{run} is in use by process {lock.read().strip() or '?'}; choose another --out"
            ) from e
        if os.fstat(lock.fileno()).st_nlink == 0:
            raise ConfigError(f"{run} has just been removed by another process; run the command again")
        with _writing(run):
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), str(os.getpid()).encode())
        try:
            yield
        finally:  # explicitly, since a loader process that is still ending has a copy of the handle
            fcntl.flock(lock, fcntl.LOCK_UN)


def is_running(run: Path) -> bool:
    """Whether a process (which may be this one) holds the lock of a run directory."""
    with suppress(OSError), (run / ".lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def _writing(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise StorageError(
            f"cannot write the run directory {run}: {e.strerror}; choose another with --out"
        ) from e


WRITTEN = (
    "recipe.toml",
    "machine.json",
    "metrics.jsonl",
    "report.html",
    "wandb.id",
    "snapshots",
    "probes",
    "tensorboard",
    "wandb",
)
"What a run may write before its first checkpoint."


@contextmanager
def run_directory(run: Path) -> Iterator[None]:
    """`run_lock`, and cleanup: a new run that fails with ConfigError or DataError removes what it wrote, and
    the directories it created.

    Other files stay, including the record of unreadable images.
    """
    # Path.exists raises if a parent is not accessible.
    created = [path for path in (run, *run.parents) if not os.path.exists(path)]  # noqa: PTH110
    lock_existed = os.path.exists(run / ".lock")  # noqa: PTH110
    with run_lock(run):
        paths = [] if checkpoints(run / "checkpoints") else [run / name for name in WRITTEN]
        before = {path: path.read_bytes() for path in paths if path.is_file()}
        new = [path for path in paths if not path.exists()]
        try:
            yield
        except (ConfigError, DataError):
            if not checkpoints(run / "checkpoints"):
                for path in new:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
                for path, content in before.items():
                    replace_file(path, content)
                if not lock_existed:
                    (run / ".lock").unlink()
                with suppress(OSError):  # not empty
                    for path in created:
                        path.rmdir()
            raise


def record_recipe(
    run: Path, recipe: Any, load: Callable[[str], Any], free: Collection[str] = ("data",)
) -> None:
    """Write recipe.toml for a new run; for a resumed one, compare with it (`check_same_recipe`).

    A run without a checkpoint counts as new: files left by an attempt that ended before its first checkpoint
    are replaced.
    """
    check_same_recipe(run, recipe, load, free)
    if not checkpoints(run / "checkpoints"):
        replace_file(run / "recipe.toml", to_toml(recipe))
        for path in run.glob("bad_*.jsonl"):
            path.unlink()


def check_same_recipe(
    run: Path, recipe: Any, load: Callable[[str], Any], free: Collection[str] = ("data",)
) -> None:
    """Raises ConfigError that lists the differences from the recipe the run was started with, if any.
    `load` reads the file.

    The settings in `free` may differ: the path of the data, since checkpoints record a fingerprint of the
    data itself.
    """
    path = run / "recipe.toml"
    # A lost recipe.toml is written again once the checkpoint has been verified.
    if not checkpoints(run / "checkpoints") or not path.exists():
        return
    old, new = flat(load(str(path))), flat(recipe)
    differ = [
        f"{k} {old.get(k)} (now {new.get(k)})"
        for k in {**old, **new}
        if k not in free and old.get(k) != new.get(k)
    ]
    if differ:
        raise SettingsError(
            f"{run} was started with {', '.join(differ)}; use another --out, or the same recipe to resume"
        )


def describe_machine(device: torch.device, precision: str) -> dict[str, Any]:
    """Versions, hardware and commit, for comparing results. No names of users or hosts."""
    cpu = platform.processor()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
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
        "waiting_threads": waiting(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": precision,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of this package's git checkout, with + if it has changes; None outside a checkout."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here)]
        top = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=5)
        if top.returncode:
            return None
        head = subprocess.run(
            [*git, "describe", "--always", "--dirty=+"], capture_output=True, text=True, timeout=5
        )
        return head.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a small JSON file atomically. Raises StorageError."""
    replace_file(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file cannot be read or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


ADVICE = "try --accumulate 2, --checkpointing or a smaller --batch-size"
"What to do when memory runs out."

CONNECTION = ("Connection", "connection", "gloo", "NCCL")
"Words in a plain RuntimeError that indicate a lost rank."


@contextmanager
def translate_errors(device: torch.device, world: World, advice: str = ADVICE) -> Iterator[None]:
    """Raise one-line ProcessErrors for lost processes, and OutOfMemoryErrors that end with the advice."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise OutOfMemoryError(f"{device} ran out of memory at {memory_gib(device):.1f} GiB; {advice}") from e
    except RuntimeError as e:
        text = str(e)
        if "DataLoader worker" in text:
            raise ProcessError(
                f"a loader process was lost ({first_line(e)}); run the same command again"
            ) from e
        if isinstance(e, torch.distributed.DistError) or (
            world.size > 1 and any(word in text for word in CONNECTION)
        ):
            raise ProcessError(
                f"another process of the run was lost ({first_line(e)}); run the same command again"
            ) from e
        if "can't allocate memory" in text:  # torch's message for host memory
            raise OutOfMemoryError(f"the host ran out of memory; {advice}, or fewer --workers") from e
        raise


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the CUDA allocator, or else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def keep_freed_memory() -> None:
    """Make glibc keep the large blocks that a step frees for the next one; on a CPU, page faults otherwise
    cost up to a tenth of the time."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
                libc.mallopt(parameter, 2**30)
