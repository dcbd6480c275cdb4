"""Whether the objects of a set are annotated on the images as stored or on the upright ones (turned by EXIF).

Annotation tools disagree on this, and files do not record it. Where EXIF exchanges height and width, the
annotated size tells. All other images (turned by 180 degrees, mirrored, or square) follow the majority of
these.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from ...config import how_many
from ...data import decode
from ...engine.distributed import World

TURNED = 5
"The lowest EXIF orientation that exchanges height and width; 1 is upright."

Fit = Literal["plain", "upright", "stored", "either", "exchanged", "other"]
"""How an image fits the annotated size: plain without an EXIF orientation, upright or as stored, either way
(its size does not tell), only with height and width exchanged although EXIF does not say so, or not."""


class Header(NamedTuple):
    """The stored height and width of an image file, and its EXIF orientation (1 to 8)."""

    height: int
    width: int
    orientation: int

    def fit(self, size: tuple[int, int]) -> Fit:
        """How the image fits the annotated (height, width)."""
        stored, exchanged = (self.height, self.width), (self.width, self.height)
        upright = exchanged if self.orientation >= TURNED else stored
        if size not in (stored, upright):
            return "exchanged" if size == exchanged else "other"
        if self.orientation == 1:
            return "plain"
        return "either" if stored == upright else "upright" if size == upright else "stored"


def read_headers(
    paths: Sequence[Path], tick: Callable[[int], None], world: World = World()
) -> list[Header | None]:
    """The headers of image files; None for those that cannot be read. Each rank reads a part of them; `tick`
    is called with the number of files that all ranks have read."""
    part: list[Header | None] = []
    for path in paths[world.rank :: world.size]:
        try:
            with path.open("rb") as file:
                part.append(Header(*decode.read_header(file)))
        except (OSError, decode.BadImage):
            part.append(None)
        tick(len(part) * world.size)
    headers: list[Header | None] = [None] * len(paths)
    for rank, of_rank in enumerate(world.broadcast(world.gather(part))):
        headers[rank :: world.size] = of_rank
    return headers


def decide(fits: Counter[Fit], default: bool | None = None) -> tuple[bool | None, list[str]]:
    """Whether the images of a set are annotated upright, and a sentence on it; (None, []) without any EXIF
    orientation.

    If no size tells, it is `default`, that of the training, or else upright, as browsers show images.
    """
    upright, stored, either = fits["upright"], fits["stored"], fits["either"]
    if not (turned := upright + stored + either):
        return None, []
    choice = upright >= stored if upright + stored else default is not False
    how = "upright" if choice else "as stored"
    text = f"EXIF turns or mirrors {how_many(turned, 'image')}; "
    if upright and stored:
        text += f"by height and width, {upright:,} are annotated and read upright and {stored:,} as stored"
        text += f"; the {either:,} others are read {how}" if either else ""
    elif upright or stored:
        text += f"they are read {how}, as the height and width of {upright or stored:,} of them are annotated"
    else:
        text += f"no height and width tells how they are annotated, so they are read {how}"
        text += (
            "; if masks lie beside objects, remove the EXIF tag" if default is None else ", as in training"
        )
    return choice, [text]
