"""Pictures that a run leaves for its report: some test images and the worst, what is there beside what was found."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data.decode import BadImage
from ...engine.checkpoint import replace_file
from ...report.detections import grid
from .average_precision import misses, objects_of
from .coco import CocoSet

FIRST, WORST = 6, 6
"Test images that are shown: the first of the set, and those with most errors in their masks."


def write_examples(folder: Path, data: CocoSet, results: Sequence[dict[str, Any]], channels: int) -> None:
    """`examples.webp` and `worst.webp`, each if there is an image for it."""
    truth, places = data.truth, {data.image_id(i): i for i in range(len(data))}
    worst = [places[m.image_id] for m in misses(truth, results, "segm")[:WORST]]
    for name, chosen in (("examples", range(min(FIRST, len(data)))), ("worst", worst)):
        rows = []
        for i in chosen:
            key = data.image_id(i)
            image = {"id": key, **dict(zip(("height", "width"), data.size(i), strict=True))}
            try:
                pixels = data.pixels(i, channels)
            except BadImage:
                continue
            own = [[e for e in entries if e["image_id"] == key] for entries in (truth["annotations"], results)]
            rows.append((pixels, *(objects_of(entries, image, data.category_ids) for entries in own)))
        if rows:
            file = io.BytesIO()
            grid(*zip(*rows, strict=True), data.classes).save(file, "WEBP", quality=85)
            folder.mkdir(exist_ok=True)
            replace_file(folder / f"{name}.webp", file.getvalue())
