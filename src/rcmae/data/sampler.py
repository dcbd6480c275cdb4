"""The images of each optimizer step, as a pure function of the step."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from ..config import how_many
from ..errors import ConfigError, DataError

Key = tuple[int, int]


def order(n: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    """The permutation of the n images for an epoch."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 1, 0, epoch])).permutation(n)


def check_parts(batch_size: int, world: int, micro: int) -> None:
    """Raises ConfigError, with the valid values of --accumulate, if the batch does not divide evenly."""
    if batch_size % (world * micro):
        valid = [str(m) for m in range(1, batch_size // world + 1) if batch_size % (world * m) == 0]
        advice = (
            f"--accumulate may be {', '.join(valid)}" if valid else f"no --accumulate fits {world} processes"
        )
        raise ConfigError(
            f"a batch of {batch_size} does not divide into {world} processes x accumulate {micro}; {advice}"
        )


class BatchSampler:
    """A batch sampler for DataLoader: one list of keys (epoch, index) per micro-batch of the steps `start` to
    `stop` - 1.

    Rank r of `world` takes the r-th part of the images of a step and divides it into `micro` lists, so a step
    has the same images for every `world` and `micro`. The last incomplete batch of an epoch is dropped.
    Raises ConfigError if the batch does not divide evenly, DataError if there are fewer images than a batch.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        micro: int = 1,
        start: int = 0,
        stop: int = 0,
        seed: int = 0,
    ):
        if n < batch_size:
            raise DataError(
                f"there is no batch of {batch_size} in {how_many(n, 'image')}; lower --batch-size or add "
                "images"
            )
        check_parts(batch_size, world, micro)
        self.n, self.batch_size, self.rank, self.world, self.micro = n, batch_size, rank, world, micro
        self.start, self.stop, self.seed = start, stop, seed
        self.cached: tuple[int, np.ndarray] | None = None

    def keys(self, step: int) -> list[Key]:
        """The images of one optimizer step, over all ranks and micro-batches."""
        epoch, part = divmod(step, self.n // self.batch_size)
        if self.cached is None or self.cached[0] != epoch:
            self.cached = epoch, order(self.n, self.seed, epoch)
        chosen = self.cached[1][part * self.batch_size : (part + 1) * self.batch_size]
        return [(epoch, int(i)) for i in chosen]

    def __iter__(self) -> Iterator[list[Key]]:
        size = self.batch_size // (self.world * self.micro)
        for step in range(self.start, self.stop):
            keys = self.keys(step)
            for i in range(self.rank * self.micro, (self.rank + 1) * self.micro):
                yield keys[i * size : (i + 1) * size]

    def __len__(self) -> int:
        return (self.stop - self.start) * self.micro
