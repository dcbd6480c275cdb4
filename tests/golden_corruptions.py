"""The stored pixels of every corruption: `make golden` writes tests/golden/corruptions.json,
tests/test_corruptions.py compares."""

import hashlib
import json
import platform
import sys

import numpy as np
import PIL
import scipy
from PIL import features

from rcmae.tasks.robustness.corruptions import CORRUPTIONS, corrupt
from tests.conftest import GOLDEN

FILE = GOLDEN / "corruptions.json"
SIDES = {"32 px": (32, 32), "64 px": (64, 68), "128 px": (120, 128)}
"One image for each table of constants."


def picture(shape: tuple[int, int]) -> np.ndarray:
    """Ramps, stripes and a bright square, computed from integers: they depend on no decoder and no
    generator."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    image = np.stack([255 * x // shape[1], 255 * y // shape[0], 90 + 100 * ((x + 2 * y) // 8 % 2)], 2)
    image[shape[0] // 4 : shape[0] // 2, shape[1] // 4 : shape[1] // 2] = (240, 220, 30)
    return image.astype(np.uint8)


def versions() -> dict[str, str]:
    """Everything that may change the rounding of a pixel, or more for JPEG."""
    simd = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    return {
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "pillow": PIL.__version__,
        "libjpeg": str(features.version("libjpeg_turbo")),
        "system": f"{platform.system()} {platform.machine()}",
        "simd": " ".join(simd),
    }


def thumbnail(image: np.ndarray) -> str:
    """Means of 4 x 4 parts: a byte per channel, as hex digits."""
    h, w = image.shape[:2]
    means = image.reshape(4, h // 4, 4, w // 4, 3).mean((1, 3))
    return np.rint(means).astype(np.uint8).tobytes().hex()


def outputs() -> dict[str, list[str]]:
    """By "size corruption/severity", the SHA-256 of the pixels, for seed 0 and image 7, and a thumbnail."""
    results = {}
    for size, shape in SIDES.items():
        image = picture(shape)
        for name in CORRUPTIONS:
            for severity in range(1, 6):
                changed = corrupt(image, name, severity, seed=0, index=7)
                results[f"{size} {name}/{severity}"] = [
                    hashlib.sha256(changed.tobytes()).hexdigest(),
                    thumbnail(changed),
                ]
    return results


if __name__ == "__main__":
    old = json.loads(FILE.read_text()) if FILE.exists() else {"outputs": {}}
    new = outputs()
    for key, (digest, _) in new.items():
        if old["outputs"].get(key, [None])[0] != digest:
            print(f"{key}: other pixels")
    if "--write" in sys.argv:
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in new.items())
        FILE.write_text(f'{{"versions": {json.dumps(versions())},\n "outputs": {{\n{lines}\n}}}}\n')
