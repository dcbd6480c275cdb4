"""Processes whose imports are made already: most of what a short test with several processes would cost."""

import multiprocessing as mp
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = mp.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.distributed_case"])


def start(log: Path, function: Callable[..., Any], *args: Any, **environment: str) -> mp.Process:
    """A process of its own that calls `function`. What it says goes to `log`; it ends with 1 when something is raised."""
    log.write_text("")
    process = SERVER.Process(target=_call, args=(log, function, args, environment), daemon=True)  # none outlives the tests
    process.start()
    return process


def ranks(log: Path, function: Callable[..., Any], *args: Any) -> tuple[list[int], str]:
    """The exit codes of two processes that are one world, described to them as torchrun would, and what they said; both end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [log.with_suffix(f".{rank}") for rank in range(2)]
    processes = [start(logs[rank], function, *args, RANK=str(rank), LOCAL_RANK=str(rank), **world) for rank in range(2)]
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    said = "".join(part.read_text() for part in logs)
    assert None not in codes, f"ranks that did not end: {codes}\n{said[-5000:]}"
    return codes, said


def _call(log: Path, function: Callable[..., Any], args: tuple, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    try:
        sys.exit(function(*args))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
