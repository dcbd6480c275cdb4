"""Masks are data: drawn outside the model from a generator, so that student and teacher can be given the same one."""

import numpy as np


def visible_count(patches: int, mask_ratio: float) -> int:
    """How many of `patches` stay visible: rounded down as in the reference code, but at least one is seen and one hidden."""
    return min(max(int(patches * (1 - mask_ratio)), 1), patches - 1)


def random_order(patches: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation of the patches, int64 [n]: the first `visible_count` are seen, the rest are hidden."""
    return rng.permutation(patches)
