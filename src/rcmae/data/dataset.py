"""Samples from a source, and the handling of unreadable images."""

import ctypes
import fcntl
import functools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ..config import how_many
from ..engine import signals
from ..errors import DataError, RcmaeError, StorageError
from .base import Source
from .decode import BadImage
from .pixels import moments, open_image, read_image
from .sampler import Key
from .views import rng

ATTEMPTS = 20
"Number of substitutes tried for an unreadable image."

STATISTICS_SIDE = 256
"""Images are measured at no less than this many pixels along a side, near the size of training crops, since
decoding large JPEGs to all their pixels takes minutes."""

T = TypeVar("T")

Bad = tuple[int, str, str]
"An unreadable image: (index, name, reason)."


class Images(Dataset):
    """Sample (epoch, index) is `view(image, generator)`, a pure function of (seed, epoch, index).

    An unreadable image is replaced by another one, a pure function of (seed, index), and listed in the sample
    as "bad". With `labeled`, "label" is that of the image actually used.
    """

    def __init__(
        self,
        source: Source,
        view: Callable[[Any, np.random.Generator], dict[str, Any]],
        seed: int,
        channels: int = 3,
        labeled: bool = False,
        opened: Callable[[int], Any] | None = None,
    ):
        """`opened` gives image i in the form that `view` takes, by default an `Image` of the source."""
        self.source, self.view, self.seed, self.labeled = source, view, seed, labeled
        self.opened = opened or functools.partial(open_image, source, channels=channels)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key

        def sample_of(i: int) -> dict[str, Any]:
            return self.view(self.opened(i), rng(self.seed, epoch, index))

        sample, used, bad = self.readable(index, sample_of)
        if self.labeled:
            assert self.source.labels is not None
            sample["label"] = int(self.source.labels[used])
        return sample | {"bad": bad}

    def readable(self, index: int, read: Callable[[int], T]) -> tuple[T, int, list[Bad]]:
        """`read` of the image or, while that raises BadImage, of a substitute, the index of the one used, and
        the unreadable ones.

        Raises DataError if no substitute can be read either.
        """
        bad: list[Bad] = []
        for i in self._candidates(index):
            try:
                return read(i), i, bad
            except BadImage as e:
                bad.append((i, self.source.where(i), str(e)))
        raise DataError(
            f"{bad[0][1]} cannot be read ({bad[0][2]}), nor can {ATTEMPTS} others; run `rcmae check`"
        )

    def _candidates(self, index: int) -> Iterator[int]:
        """The image, then its substitutes."""
        yield index
        others = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 2, 0, index]))
        yield from map(int, others.integers(len(self.source), size=ATTEMPTS))


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of tensors, with the list of all unreadable images as "bad"."""
    bad = [b for sample in samples for b in sample.pop("bad")]
    return default_collate(samples) | {"bad": bad}


class BadFiles:
    """Records every unreadable image once per run, over all ranks and resumes, and ends the run if there are
    too many."""

    def __init__(
        self,
        run: Path,
        images: int,
        fraction: float = 0.01,
        strict: bool = False,
        name: str = "bad_files.jsonl",
        say: Callable[[str], None] = lambda text: None,
    ):
        """`say` prints a note on the first of them in the run, on the rank that meets it."""
        self.path, self.say = run / name, say
        self.limit, self.images, self.strict = max(10, fraction * images), images, strict
        self.known: set[int] = set()

    def note(self, bad: list[Bad]) -> None:
        """Record the unreadable images of a batch. Raises DataError above the limit, or at any if strict,
        even if it is already recorded."""
        for index, where, reason in bad:
            if index not in self.known and self._record(index, where, reason):
                self.say(f"note: {where} cannot be read ({reason}); {self.path.name} lists all such images")
            if self.strict:
                raise DataError(
                    f"{where} cannot be read ({reason}); fix or remove it, or continue without --strict"
                )
            if len(self.known) > self.limit:
                raise DataError(
                    f"{len(self.known)} of {self.images} images cannot be read, for example {where} "
                    f"({reason}); all are listed in {self.path}; raise --max-corrupt-fraction to continue"
                )

    def total(self) -> int:
        """The number of unreadable images so far, over all ranks and resumes."""
        return len(self._recorded()) if self.path.is_file() else 0

    def _recorded(self) -> set[int]:
        lines = self.path.read_bytes().splitlines(keepends=True)
        # A kill may have cut the last line.
        return {json.loads(line)["index"] for line in lines if line.endswith(b"\n")}

    def _record(self, index: int, where: str, reason: str) -> bool:
        """Append a line, unless another rank, or the run before it resumed, has written it; returns whether
        it is the first one. Raises StorageError."""
        try:
            with self.path.open("ab") as f:
                fcntl.flock(f, fcntl.LOCK_EX)
                f.truncate(self.path.read_bytes().rfind(b"\n") + 1)
                self.known |= self._recorded()
                first = not self.known
                if index not in self.known:
                    f.write(json.dumps({"index": index, "where": where, "reason": reason}).encode() + b"\n")
        except OSError as e:
            raise StorageError(f"cannot write {self.path}: {e.strerror}; free some space") from e
        self.known.add(index)
        return first


def measure_statistics(
    source: Source, channels: int, samples: int = 1000, tick: Callable[[int], None] = lambda done: None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over a fixed random subset, for pixels in 0 to 1.

    `tick` is called with the number of images done, of min(samples, len(source)). Raises DataError if none
    can be read.
    """
    chosen = np.random.Generator(np.random.Philox(key=0)).permutation(len(source))[:samples]
    sums, squares, count = np.zeros(channels), np.zeros(channels), 0
    for done, i in enumerate(chosen):
        tick(done)
        try:
            mean, square = moments(read_image(source, int(i), channels, least=STATISTICS_SIDE))
        except BadImage:
            continue
        # Every image has the same weight, whatever its size.
        sums, squares, count = sums + mean, squares + square, count + 1
    if not count:
        raise DataError(
            f"none of {how_many(len(chosen), 'sampled image')} of {source.name} can be read; run "
            "`rcmae check`"
        )
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-8))
    return tuple(mean.tolist()), tuple(std.tolist())


def plain_errors(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches. RcmaeErrors from its processes, whose message is a traceback, are reduced to
    their one line."""
    try:
        yield from loader
    except RcmaeError as e:
        text = str(e).strip().splitlines()[-1].removeprefix(f"{type(e).__module__}.{type(e).__name__}: ")
        # The traceback would keep the loader and its processes alive, and the interpreter would wait for them
        # forever at exit.
        raise type(e)(text) from e.with_traceback(None)


def in_processes(workers: int) -> dict[str, Any]:
    """Options of a DataLoader with this number of processes. On Linux they are forked, so that caches and
    indices are shared and not copied; from Python 3.14 on this is not the default."""
    forked = {"multiprocessing_context": "fork"} if workers and sys.platform == "linux" else {}
    return {"num_workers": workers, "worker_init_fn": quiet_worker} | forked


def quiet_worker(worker: int) -> None:
    """Set up a loader process: one thread, ignores the signals that stop the run, ends with its parent."""
    torch.set_num_threads(1)
    signals.ignore()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
