"""Reading weights from files, whatever surrounds them: containers, prefixes, optimizers, averaged copies."""

import argparse
import logging
import pickle
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..engine.checkpoint import newest
from ..errors import CheckpointError, first_line
from .names import State, from_transformers

log = logging.getLogger("rcmae")

KINDS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".pth.tar")
"Endings of files with weights."

FIRST = "patch_embed.proj.weight"
"The parameter by which a Vision Transformer with timm's names is found; what precedes it is its prefix."

AVERAGED = {"teacher", "ema", "momentum", "target"}
"Words in the prefix of an exponential moving average of another network."


@dataclass(frozen=True)
class Weights:
    """The networks of a file, in float32 and without their prefixes."""

    student: State
    teacher: State | None
    "an exponential moving average of the student, if the file has both"
    prefixes: tuple[str, ...]
    "of student and teacher in the file; each is empty or ends with a dot"
    names: tuple[str, ...]
    "all tensors of the file"
    epoch: Any
    "as the file says, or None"

    def select(self, which: str) -> State:
        """The student or the teacher; without a teacher, it is always the student."""
        return self.student if which == "student" or self.teacher is None else self.teacher

    def describe(self, which: str, used: Collection[str]) -> list[str]:
        """Phrases on which network is taken, if there are two or it is an average, and on what is left out;
        `used` are the names of the parameters that are taken."""
        chosen, *others = self.prefixes if which == "student" else self.prefixes[::-1]
        phrases = [f"took {_label(chosen)}"] if others or _is_average(chosen) else []
        if others:
            role = "teacher" if which == "student" else "student"
            phrases.append(f"--which {role} takes {_label(others[0])}")
        skipped = set()
        for name in self.names:
            owner = _owner(name, self.prefixes)
            if owner is None or (owner == chosen and name[len(chosen) :] not in used):
                skipped.add(max((_departure(name, prefix) for prefix in self.prefixes), key=len))
        return phrases + ([f"left out {', '.join(sorted(skipped))}"] if skipped else [])


_in_use: WeakValueDictionary[tuple[Path, int, int], Weights] = WeakValueDictionary()
"What has been read and is still in use, by path, time of change and size of the file."


def read_weights(path: Path) -> Weights:
    """Read the Vision Transformers in a file: one, or a network and its exponential moving average. While the
    result is in use, the file is not read again. Names of transformers' ViT and ViTMAE become timm's.

    No code is executed from a pickle: only tensors, plain containers and argparse.Namespace are allowed.
    Raises CheckpointError when the file is missing, is another kind of file, or contains other objects,
    other networks or weights that are not finite.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if re.search(r"-\d{5}-of-\d{5}\.", path.name):
        raise CheckpointError(f"{path} is one of several files of the same weights; save them as one file")
    stat = path.stat()
    key = path.absolute(), stat.st_mtime_ns, stat.st_size
    if (weights := _in_use.get(key)) is None:
        _in_use[key] = weights = _read(path)
    return weights


def _read(path: Path) -> Weights:
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    tensors = {name: value for name, value in _flat(content) if isinstance(value, Tensor)}
    tensors = from_transformers(tensors)
    present_prefixes = [name.removesuffix(FIRST) for name in tensors if f".{name}".endswith(f".{FIRST}")]
    if not present_prefixes:
        present = ", ".join([*tensors][:4]) or ", ".join(map(str, [*content][:4])) or "nothing"
        raise CheckpointError(
            f"{path} has no Vision Transformer with the names of timm or transformers ({FIRST}, ...); it has "
            f"{present}"
        )
    states: dict[str, State] = {prefix: {} for prefix in present_prefixes}
    for name, value in tensors.items():
        if (owner := _owner(name, present_prefixes)) is not None:
            states[owner][name[len(owner) :]] = value.float() if value.is_floating_point() else value
    distinct: dict[str, State] = {}  # the official code of RC-MAE writes both networks twice
    for prefix, state in states.items():
        same_kind = [s for p, s in distinct.items() if _is_average(p) == _is_average(prefix)]
        if not any(_are_equal(state, other) for other in same_kind):
            check_finite(state, f"{path}: {prefix}")
            distinct[prefix] = state
    prefixes = tuple(sorted(distinct, key=_is_average))
    if len(prefixes) > 1 and [_is_average(prefix) for prefix in prefixes] != [False, True]:
        raise CheckpointError(
            f"{path} has {len(prefixes)} networks ({', '.join(map(_label, prefixes))}) that are not a pair "
            "of a network and its average; save the one to load as a file of its own"
        )
    return Weights(
        student=distinct[prefixes[0]],
        teacher=distinct[prefixes[1]] if len(prefixes) > 1 else None,
        prefixes=prefixes,
        names=tuple(name for name in tensors if _owner(name, present_prefixes) in (None, *prefixes)),
        epoch=content.get("epoch"),
    )


def weights_of_run(run: Path) -> tuple[Path, State]:
    """All weights of the newest intact checkpoint of a run, or of a folder of `rcmae import`, by their names
    in the method (student.*, teacher.model.*), and their file. Raises CheckpointError."""
    file = run / "weights.safetensors"
    if file.exists():  # its teacher is not wrapped
        return file, {
            re.sub(r"^teacher\.", "teacher.model.", k): v for k, v in _read_safetensors(file).items()
        }
    checkpoint = newest(run / "checkpoints", lambda text: log.warning("note: %s: %s", run, text))
    if checkpoint is None:
        raise CheckpointError(f"{run} has no checkpoint yet; `rcmae pretrain --out {run}` writes one")
    return checkpoint / "model.safetensors", _read_safetensors(checkpoint / "model.safetensors")


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError, which begins with `where`, for the first weight that is NaN or infinite."""
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(f"{where}{name} is not finite, so the checkpoint is unusable")


def mismatches(state: State, expected: State) -> str:
    """The first differences in names, shapes and kinds of numbers; empty if there are none."""
    problems = [f"lacks {k}" for k in expected.keys() - state.keys()]
    problems += [f"has unknown {k}" for k in state.keys() - expected.keys()]
    for k in expected.keys() & state.keys():
        if state[k].shape != expected[k].shape:
            problems.append(f"{k} is {tuple(state[k].shape)}, not {tuple(expected[k].shape)}")
        elif state[k].is_floating_point() != expected[k].is_floating_point():
            problems.append(f"{k} is {state[k].dtype}, not {expected[k].dtype}")
    return "; ".join(sorted(problems)[:4])


def _read_safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} is not a complete .safetensors file: {first_line(e)}") from e


def _read_pickle(path: Path) -> dict[Any, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the pickle protocol of files that are rejected anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise CheckpointError(
            f"{path} contains Python objects other than weights and was not read, for safety; save its "
            "state_dict() alone"
        ) from e
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError) as e:
        raise CheckpointError(f"{path} is not a PyTorch checkpoint: {first_line(e)}") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} instead of named weights")
    return content


def _flat(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested dicts, by names that are joined with dots."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _label(prefix: str) -> str:
    return prefix.rstrip(".") or "the one without a prefix"


def _is_average(prefix: str) -> bool:
    return not AVERAGED.isdisjoint(re.split(r"[._]", prefix))


def _owner(name: str, prefixes: Collection[str]) -> str | None:
    """The longest prefix of a name."""
    return max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)


def _are_equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def _departure(name: str, prefix: str) -> str:
    """The part of a name up to where it differs from a prefix: "model.head" of "model.head.weight" for
    "model.encoder."; all parts of the decoder of an MAE as one."""
    parts = name.split(".")
    count = next(i for i in range(1, len(parts) + 1) if not prefix.startswith(".".join(parts[:i]) + "."))
    return re.sub(r"decoder_\w+", "decoder_*", ".".join(parts[:count]))
