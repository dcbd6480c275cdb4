"""Masks are data: drawn outside the model from a generator, so that student and teacher can be given the same one."""

import numpy as np


def visible_count(patches: int, mask_ratio: float) -> int:
    """How many of `patches` stay visible: rounded down as in the reference code, but at least one is seen and one hidden."""
    return min(max(int(patches * (1 - mask_ratio)), 1), patches - 1)


def random_order(patches: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation of the patches, int64 [n]: the first `visible_count` are seen, the rest are hidden."""
    return rng.permutation(patches)


def block_mask(grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
    """Exactly `count` masked patches, bool [gh, gw], laid in blocks whose sides are in a ratio of 0.3 to 3.3 (BEiT's rule).

    A block has at least the patches of a square of a third of the shorter side (iBOT's rule: 16 of 14 x 14), or what is missing. Blocks may
    lie over each other; of the last one, as much is taken as is wanted.
    """
    mask, least = np.zeros(grid, dtype=bool), max(1, min(grid) // 3) ** 2
    while (missing := count - int(mask.sum())) > 0:
        area = rng.uniform(min(least, missing), missing) if missing > 1 else 1.0
        ratio = np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
        height, width = (
            min(max(1, round(side)), whole) for side, whole in zip(((area * ratio) ** 0.5, (area / ratio) ** 0.5), grid, strict=True)
        )
        top, left = rng.integers(grid[0] - height + 1), rng.integers(grid[1] - width + 1)
        block = np.zeros(grid, dtype=bool)
        block[top : top + height, left : left + width] = True
        new = np.flatnonzero(block & ~mask)[:missing]
        mask.flat[new] = True
    return mask
