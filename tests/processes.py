"""Start processes from a server that has imported everything: imports would be most of the time of a short
test."""

import multiprocessing as mp
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = mp.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.conftest", "tests.distributed_case"])


def start(log: Path, function: Callable[..., Any], *args: Any, **environment: str) -> mp.Process:
    """Call `function` in a new process, with its output in `log`. The exit code is 1 if it raises an
    exception."""
    log.write_text("")
    process = SERVER.Process(
        target=_call, args=(log, function, args, environment), daemon=True
    )  # none outlives the tests
    process.start()
    return process


def ranks(log: Path, function: Callable[..., Any], *args: Any) -> tuple[list[int], str]:
    """Call `function` in two processes with the environment of torchrun. Returns their exit codes and their
    output."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [log.with_suffix(f".{rank}") for rank in range(2)]
    processes = [
        start(logs[rank], function, *args, RANK=str(rank), LOCAL_RANK=str(rank), **world) for rank in range(2)
    ]
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    output = "".join(part.read_text() for part in logs)
    assert None not in codes, f"ranks that did not end: {codes}\n{output[-5000:]}"
    return codes, output


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
