"""A sequence of masks that are decoded on access."""

from collections.abc import Callable, Sequence
from typing import Any


class Masks(Sequence[Any]):
    """The masks of an image, decoded on each access: all of them at full size may not fit into memory."""

    def __init__(self, items: Sequence[Any], decode: Callable[[Any], Any]):
        """`decode` returns the mask of an item."""
        self.items, self.decode = items, decode

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, k: int) -> Any:  # type: ignore[override]  # slices are not supported
        return self.decode(self.items[k])
