"""Samples from a source, and what becomes of images that cannot be read."""

import ctypes
import fcntl
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..config import how_many
from ..engine import signals
from ..errors import DataError, RcmaeError, StorageError
from .base import Source
from .decode import BadImage
from .pixels import moments, read_image
from .sampler import Key
from .views import rng

ATTEMPTS = 20
"Substitutes that are tried for an unreadable image."

Bad = tuple[int, str, str]
"An image that cannot be read: (index, where, reason)."


class Images(Dataset):
    """Sample (epoch, index) is `view(image, generator)`, a pure function of (seed, epoch, index).

    For an unreadable image another one is taken, also a pure function of (seed, index), and the sample says so under "bad".
    With `labelled`, "label" is that of the image which was taken.
    """

    def __init__(
        self, source: Source, view: Callable[[np.ndarray, np.random.Generator], dict[str, Tensor]], seed: int, channels: int = 3,
        labelled: bool = False,
    ):  # fmt: skip
        self.source, self.view, self.seed, self.channels, self.labelled = source, view, seed, channels, labelled

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        image, taken, bad = self.read(index)
        sample: dict[str, Any] = self.view(image, rng(self.seed, epoch, index))
        if self.labelled:
            sample["label"] = int(self.source.labels[taken])
        return sample | {"bad": bad}

    def pixels(self, index: int) -> np.ndarray:
        """Image `index`, uint8 [h, w, channels]. Raises BadImage."""
        return read_image(self.source, index, self.channels)

    def read(self, index: int) -> tuple[np.ndarray, int, list[Bad]]:
        """The image, or its substitute, with the index of what was taken, and each that could not be read.

        Raises DataError when no substitute can be read either.
        """
        bad = []
        others = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 2, 0, index])).integers(len(self.source), size=ATTEMPTS)
        for i in (index, *map(int, others)):
            try:
                return self.pixels(i), i, bad
            except BadImage as e:
                bad.append((i, self.source.where(i), str(e)))
        raise DataError(f"{bad[0][1]} cannot be read ({bad[0][2]}), nor can {ATTEMPTS} others; look with `rcmae check`")


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of tensors, and under "bad" the list of all unreadable images."""
    bad = [b for sample in samples for b in sample.pop("bad")]
    return default_collate(samples) | {"bad": bad}


class BadFiles:
    """Names every unreadable image once in a file of the run, over ranks and resumes, and ends the run when there are too many."""

    def __init__(self, run: Path, images: int, share: float = 0.01, strict: bool = False, name: str = "bad_files.jsonl"):
        self.path = run / name
        self.limit, self.images, self.strict = max(10, share * images), images, strict
        self.known: set[int] = set()

    def note(self, bad: list[Bad]) -> None:
        """Record what a batch found. Raises DataError above the limit, or at the first one if strict, whoever named it before."""
        for index, where, reason in bad:
            if index not in self.known:
                self._record(index, where, reason)
            if self.strict:
                raise DataError(f"{where} cannot be read ({reason}); mend or remove it, or go on without --strict")
            if len(self.known) > self.limit:
                many = f"{len(self.known)} of {self.images} images cannot be read, one is {where} ({reason})"
                raise DataError(f"{many}; all are named in {self.path}; raise --bad-share to go on")

    def _recorded(self) -> set[int]:
        return {json.loads(line)["index"] for line in self.path.read_bytes().splitlines()}

    def _record(self, index: int, where: str, reason: str) -> None:
        """Append a line, unless another rank, or the run before a resume, has written it. Raises StorageError."""
        try:
            with self.path.open("ab") as f:
                fcntl.flock(f, fcntl.LOCK_EX)
                f.truncate(self.path.read_bytes().rfind(b"\n") + 1)  # a kill may have cut the last line
                self.known |= self._recorded()
                if index not in self.known:
                    f.write(json.dumps({"index": index, "where": where, "reason": reason}).encode() + b"\n")
        except OSError as e:
            raise StorageError(f"cannot write {self.path}: {e.strerror}; free some space") from e
        self.known.add(index)


def measure_statistics(
    source: Source, channels: int, samples: int = 1000, tick: Callable[[int], None] = lambda done: None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel over the pixels of a fixed random subset, in units of 0 to 1.

    `tick` is told how many of the min(samples, len(source)) images are done. Raises DataError when none can be read.
    """
    chosen = np.random.Generator(np.random.Philox(key=0)).permutation(len(source))[:samples]
    sums, squares, count = np.zeros(channels), np.zeros(channels), 0
    for done, i in enumerate(chosen):
        tick(done)
        try:
            mean, square = moments(read_image(source, int(i), channels))
        except BadImage:
            continue
        # Every image counts alike, whatever its size.
        sums, squares, count = sums + mean, squares + square, count + 1
    if not count:
        raise DataError(f"none of {how_many(len(chosen), 'sampled image')} of {source.name} can be read; look with `rcmae check`")
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-8))
    return tuple(mean.tolist()), tuple(std.tolist())


def plain_errors(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches; our own errors come back from its processes with a traceback for a text: only their line is kept."""
    try:
        yield from loader
    except RcmaeError as e:
        text = str(e).strip().splitlines()[-1].removeprefix(f"{type(e).__module__}.{type(e).__name__}: ")
        # Frames of the traceback hold the loader, and with it its processes, for which the interpreter would wait for ever at its end.
        raise type(e)(text) from e.with_traceback(None)


def quiet_worker(worker: int) -> None:
    """A loader process: one thread, deaf to the signals that stop the run, gone when its parent is."""
    torch.set_num_threads(1)
    signals.ignore()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
