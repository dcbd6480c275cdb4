"""Whether the objects of a set are annotated on the images as stored or on the upright ones (turned by EXIF).

Annotation tools disagree on this, and files do not record it. Where EXIF exchanges height and width, the
annotated size tells. All other images (turned by 180 degrees, mirrored, or square) follow the majority of
these.
"""

import warnings
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image

from ...config import how_many
from ...data.decode import FORMATS

ORIENTATION, TURNED = 0x0112, 5
"The EXIF tag, and its lowest value that exchanges height and width; 1 is upright."

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


def read_header(path: Path) -> Header | None:
    """The header of an image file; None if it cannot be read without decoding the image."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as file:
            # Not file.getexif(), which decodes a PNG to its end.
            orientation = Image.Image.getexif(file).get(ORIENTATION, 1)
            return Header(file.height, file.width, orientation if orientation in range(1, 9) else 1)
    except Exception:  # decoders raise all kinds of errors on damaged files
        return None


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
