"""Random masks. They are drawn from a generator outside of the model, so that student and teacher can share
them."""

import numpy as np


def visible_count(patches: int, mask_ratio: float) -> int:
    """The number of visible patches, rounded down as in the reference code, with at least one visible and one
    masked patch."""
    return min(max(int(patches * (1 - mask_ratio)), 1), patches - 1)


def random_order(patches: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation of the patches, int64 [n]: the first `visible_count` are visible, the others masked."""
    return rng.permutation(patches)


def block_mask(grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
    """A mask, bool [gh, gw], of exactly `count` patches in blocks with aspect ratios of 0.3 to 3.3 (BEiT's
    rule).

    A block has at least as many patches as a square of a third of the shorter side (iBOT's rule: 16 of
    14 x 14), or as many as are missing. Blocks may overlap; the last one is cut off at `count`.
    """
    mask, smallest = np.zeros(grid, dtype=bool), max(1, min(grid) // 3) ** 2
    while (missing := count - int(mask.sum())) > 0:
        area = rng.uniform(min(smallest, missing), missing) if missing > 1 else 1.0
        ratio = np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
        height, width = (
            min(max(1, round(side)), limit)
            for side, limit in zip(((area * ratio) ** 0.5, (area / ratio) ** 0.5), grid, strict=True)
        )
        top, left = rng.integers(grid[0] - height + 1), rng.integers(grid[1] - width + 1)
        block = np.zeros(grid, dtype=bool)
        block[top : top + height, left : left + width] = True
        added = np.flatnonzero(block & ~mask)[:missing]
        mask.flat[added] = True
    return mask
