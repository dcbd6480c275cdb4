"""Masks that are made one at a time."""

from collections.abc import Callable, Sequence
from typing import Any


class Masks(Sequence):
    """The masks of an image, each made anew when it is asked for: all of them at full size may be more than memory holds."""

    def __init__(self, items: Sequence[Any], make: Callable[[Any], Any]):
        """`make` gives the mask of an item."""
        self.items, self.make = items, make

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, k: int) -> Any:
        return self.make(self.items[k])
