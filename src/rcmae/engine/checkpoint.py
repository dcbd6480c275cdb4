"""Checkpoints that survive a kill at any moment: tensors in safetensors, the rest in JSON, no pickle.

A checkpoint is a folder `step_00001234` whose `manifest.json`, written last, holds the SHA-256 of every other
file. It is written under a temporary name, flushed to disk and then renamed, so a folder with the final name
is always complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..errors import CheckpointError, StorageError

MANIFEST = "manifest.json"
ASIDE = ".old_"
"Prefix of a checkpoint that is being replaced."


def save_checkpoint(
    folder: Path, method: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Write `folder/step_N` for N = state["step"], then delete all but the newest `keep`.

    Raises CheckpointError without writing anything if a weight is not finite; StorageError if writing fails.
    """
    weights = {k: v.detach().cpu().contiguous() for k, v in method.state_dict().items()}
    nonfinite = [k for k, v in weights.items() if v.is_floating_point() and not v.isfinite().all()]
    if nonfinite:
        raise CheckpointError(f"{nonfinite[0]} is not finite at step {state['step']}; nothing was saved")
    files = {
        "model.safetensors": save(weights),
        "optimizer.safetensors": save(optimizer_state(method, optimizer)),
        "state.json": json.dumps(state, indent=1).encode(),
    }
    path = folder / f"step_{state['step']:08d}"
    write_folder(path, files)
    for old in checkpoints(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> None:
    """Write files and their manifest as the folder `path`, all or nothing. Raises StorageError."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    # The temporary name is fixed so that the next save, or `recover`, removes what a killed process left.
    temporary = path.parent / f".tmp_{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, content in [*files.items(), (MANIFEST, json.dumps(hashes, indent=1).encode())]:
            _write(temporary / name, content)
        _sync(temporary)
        aside = path.parent / f"{ASIDE}{path.name}"
        if path.exists():  # the same step again: `recover` can restore the old one until the new one is there
            shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed here
            path.rename(aside)
        temporary.rename(path)
        _sync(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(
            f"cannot write {path}: {e.strerror}; the previous checkpoint is kept; free some space or choose "
            "another --out"
        ) from e


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints by step, newest first, without verifying them."""
    return sorted(folder.glob("step_" + "[0-9]" * 8), key=lambda p: p.name, reverse=True)


def recover(folder: Path) -> None:
    """Clean up after a process that was killed while saving. Call it with the run locked, before `newest`."""
    for aside in folder.glob(f"{ASIDE}step_*"):
        path = folder / aside.name.removeprefix(ASIDE)
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(path)
    for temporary in folder.glob(".tmp_step_*"):
        shutil.rmtree(temporary, ignore_errors=True)


def newest(folder: Path, warn: Callable[[str], object] = print) -> Path | None:
    """The newest checkpoint whose files match their hashes; None if there are no checkpoints.

    Calls `warn` for each damaged one. Raises CheckpointError if all are damaged: a run must not silently
    restart from scratch.
    """
    paths = checkpoints(folder)
    for path in paths:
        problem = verify(path)
        if problem is None:
            return path
        warn(f"checkpoint {path.name} is damaged ({problem}); trying an older one")
    if paths:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged; delete the folder to start again from step 0"
        )
    return None


def verify(path: Path) -> str | None:
    """The problem with a checkpoint folder, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return "no readable manifest"
    if not isinstance(manifest, dict) or not manifest.keys() >= {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    }:
        return "its manifest is incomplete"
    for name, expected in manifest.items():
        try:
            with (path / name).open("rb") as f:
                actual = hashlib.file_digest(f, "sha256").hexdigest()
        except OSError:
            return f"{name} is missing"
        if actual != expected:
            return f"{name} does not match its hash"
    return None


def load_checkpoint(path: Path, method: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a verified checkpoint into method and optimizer and return its state. Raises CheckpointError if
    it belongs to another model."""
    weights, expected = load_file(path / "model.safetensors"), method.state_dict()
    mismatched = sorted(expected.keys() ^ weights.keys()) or sorted(
        k for k in expected if expected[k].shape != weights[k].shape
    )
    if mismatched:
        raise CheckpointError(
            f"{path} belongs to another model: {mismatched[0]} does not match ({len(mismatched)} such)"
        )
    method.load_state_dict(weights)
    saved = load_file(path / "optimizer.safetensors")
    kinds = ("step", "exp_avg", "exp_avg_sq")
    # Parameters that are frozen at first have no state yet.
    trained = [(name, p) for name, p in _named(method, optimizer) if f"{name}/step" in saved]
    if sorted(saved) != sorted(f"{name}/{key}" for name, _ in trained for key in kinds):
        raise CheckpointError(f"the optimizer state in {path} belongs to another model")
    for name, p in trained:
        state = {key: saved[f"{name}/{key}"] for key in kinds}
        optimizer.state[p] = {k: v.to(p.device).clone() for k, v in state.items()}
    return json.loads((path / "state.json").read_bytes())


def optimizer_state(method: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by parameter name: "NAME/step", "NAME/exp_avg", "NAME/exp_avg_sq"."""
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, p in _named(method, optimizer)
        for key, value in optimizer.state.get(p, {}).items()
    }


def _named(method: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [(name, p) for name, p in method.named_parameters() if id(p) in optimized]


def replace_file(path: Path, content: str | bytes) -> None:
    """Replace a small file atomically. Raises StorageError."""
    # The process id keeps apart several processes that write the same file.
    temporary = path.with_name(f".tmp_{os.getpid()}_{path.name}")
    try:
        _write(temporary, content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as e:
        raise StorageError(
            f"cannot write {path}: {e.strerror}; free some space or choose another --out"
        ) from e
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
