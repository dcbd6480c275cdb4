"""Images/s of one core that loaders read, decode, crop to 224 px and flip: `python -m benchmarks.loader
--photographs FOLDER [--rounds 7] [--sets PNG,4000] [--out FILE]`.

The photographs are resized to each size in `SETS`, with the noise of a sensor, so that the files have as many
bytes as those of cameras; without a folder, they are noise with the spectrum of photographs. Every loader
makes the crop of MAE's pre-training: 0.2 to 1 of the area, bicubic with antialiasing, flipped at random. Ours
also draws the mask. torchvision's and lightly-train's also normalize, since their training loops expect it;
timm's and ours return 8 bits, which are normalized on the device. lightly-train reads no tar shards.

Processor time of one process, in rounds in which all loaders take turns, so that other processes disturb all
of them alike; files are in the page cache. Loaders whose package is not installed are left out, and rows of
`--cache device` without a GPU.
"""

import argparse
import importlib.util
import io
import json
import os
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, features

from benchmarks import markdown
from rcmae.config import Images as ImagesConfig
from rcmae.config import Recipe
from rcmae.data.cache import DeviceCache, RamCache
from rcmae.data.dataset import Images, collate
from rcmae.data.pack import pack
from rcmae.data.sources import open_source
from rcmae.engine.run import describe_machine
from rcmae.methods.mae import CropAndMask

SIDE, SCALE = 224, (0.2, 1.0)

IMAGES = ImagesConfig(size=SIDE, crop_scale=SCALE)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DEMAND = 3000
"Images/s of a GPU that a loader feeds."

NOISE = 3.0
"Standard deviation of the noise that is added to the photographs, of 255."


class Set(NamedTuple):
    """A kind of images: width and height, how many, their format, and where they lie: in files, in a tar
    shard, in a shard of `rcmae pack`, or for rcmae in one of its caches and for the others in files."""

    width: int
    height: int
    images: int
    form: str = "JPEG"
    place: Literal["files", "shard", "packed", "ram", "device"] = "files"

    @property
    def options(self) -> dict[str, Any]:
        """Of the encoder."""
        return {"JPEG": {"quality": 92}, "PNG": {}}[self.form]


SETS = {
    "JPEG 500 x 375": Set(500, 375, 120),
    "JPEG 1920 x 1440": Set(1920, 1440, 24),
    "JPEG 4000 x 3000": Set(4000, 3000, 8),
    "PNG 500 x 375": Set(500, 375, 60, "PNG"),
    "PNG 1920 x 1440": Set(1920, 1440, 12, "PNG"),
    "tar shard of JPEG 500 x 375": Set(500, 375, 120, place="shard"),
    "JPEG 1920 x 1440, packed": Set(1920, 1440, 100, place="packed"),
    "JPEG 500 x 375, --cache ram": Set(500, 375, 120, place="ram"),
    "JPEG 1920 x 1440, --cache ram": Set(1920, 1440, 24, place="ram"),
    "JPEG 500 x 375, --cache device": Set(500, 375, 120, place="device"),
    "JPEG 1920 x 1440, --cache device": Set(1920, 1440, 24, place="device"),
}

Loader = Callable[[Path], Callable[[int], Iterator[Any]]]
"The path of a set to a function that yields the samples of an epoch."


# --- the loaders --------------------------------------------------------------------------------------------


def rcmae(path: Path) -> Callable[[int], Iterator[Any]]:
    """Samples of pre-training with MAE."""
    data = Images(open_source(str(path)), CropAndMask(IMAGES, (SIDE // 16) ** 2), seed=0)
    return lambda epoch: (data[epoch, i] for i in range(len(data)))


def rcmae_cached(path: Path) -> Callable[[int], Iterator[Any]]:
    """The same with --cache ram, which is filled before the measurement."""
    source = open_source(str(path))
    opened = RamCache(source, Recipe(images=IMAGES), workers=0).images.opened
    data = Images(source, CropAndMask(IMAGES, (SIDE // 16) ** 2), seed=0, opened=opened)
    return lambda epoch: (data[epoch, i] for i in range(len(data)))


def rcmae_on_gpu(path: Path) -> Callable[[int], Iterator[Any]]:
    """The same with --cache device, until the GPU has cut out all crops of an epoch."""
    source = open_source(str(path))
    cache = DeviceCache(source, Recipe(images=IMAGES), workers=0, device=torch.device("cuda"))
    data = Images(source, CropAndMask(IMAGES, (SIDE // 16) ** 2), seed=0, opened=cache.opened)

    def epoch(number: int) -> Iterator[torch.Tensor]:
        yield from cache.cut(collate([data[number, i] for i in range(len(data))])["image"])
        torch.cuda.synchronize()

    return epoch


def encoded(path: Path) -> Iterator[bytes]:
    """The bytes of all images of a set."""
    if path.suffix != ".tar":
        yield from (file.read_bytes() for file in sorted(path.iterdir()))
        return
    with tarfile.open(path) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            yield content.read()


def torchvision_v1(path: Path) -> Callable[[int], Iterator[Any]]:
    """Pillow and torchvision.transforms, as in the training scripts of MAE."""
    from torchvision import transforms as v1

    transform = v1.Compose(
        [
            v1.RandomResizedCrop(SIDE, SCALE, interpolation=v1.InterpolationMode.BICUBIC),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
        ]
    )
    return lambda epoch: (transform(Image.open(io.BytesIO(raw)).convert("RGB")) for raw in encoded(path))


def torchvision_v2(path: Path) -> Callable[[int], Iterator[Any]]:
    """torchvision.io and torchvision.transforms.v2 on 8-bit tensors."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, SCALE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    def read(raw: bytes) -> torch.Tensor:
        return decode_image(torch.frombuffer(bytearray(raw), dtype=torch.uint8), ImageReadMode.RGB)

    return lambda epoch: (transform(read(raw)) for raw in encoded(path))


def timm(path: Path) -> Callable[[int], Iterator[Any]]:
    """The transforms of timm.data.create_loader, without color jitter; with its prefetcher they return 8
    bits."""
    from timm.data import create_transform

    options: dict[str, Any] = {"scale": SCALE, "color_jitter": None, "interpolation": "bicubic"}
    transform = create_transform(SIDE, is_training=True, use_prefetcher=True, **options)
    return lambda epoch: (transform(Image.open(io.BytesIO(raw)).convert("RGB")) for raw in encoded(path))


def lightly_train(path: Path) -> Callable[[int], Iterator[Any]]:
    """lightly-train's data set and crop, which averages over areas instead of bicubic resizing."""
    from albumentations import Compose, HorizontalFlip, Normalize
    from albumentations.pytorch import ToTensorV2
    from lightly_train._data.image_dataset import ImageDataset
    from lightly_train._transforms.random_resized_crop import get_random_resized_crop
    from lightly_train._transforms.transform import RandomResizedCropArgs

    area = RandomResizedCropArgs(min_scale=SCALE[0], max_scale=SCALE[1], min_ratio=3 / 4, max_ratio=4 / 3)
    crop = get_random_resized_crop((SIDE, SIDE), area)
    transform = Compose([crop, HorizontalFlip(), Normalize(MEAN, STD), ToTensorV2()])
    names = sorted(file.name for file in path.iterdir())
    data = ImageDataset(path, names, lambda inputs: [transform(**inputs)], num_channels=3)
    return lambda epoch: (data[i]["views"][0] for i in range(len(data)))


LOADERS: dict[str, tuple[str, Loader]] = {
    "rcmae": ("rcmae", rcmae),
    "torchvision v1": ("torchvision", torchvision_v1),
    "torchvision v2": ("torchvision", torchvision_v2),
    "timm": ("timm", timm),
    "lightly-train": ("lightly_train", lightly_train),
}
"Name: the package, and its loader."

CACHED: dict[str, Loader] = {"ram": rcmae_cached, "device": rcmae_on_gpu}

REFERENCE = "torchvision v1"


# --- the images ---------------------------------------------------------------------------------------------


def photographs(folder: Path | None) -> list[Image.Image]:
    """The pictures to make sets of: large ones of a folder, or synthetic ones."""
    if folder is None:
        return [synthetic(seed) for seed in range(12)]
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    pictures = [Image.open(file).convert("RGB") for file in files]
    if not pictures:
        raise SystemExit(f"{folder} holds no JPEG or PNG")
    return pictures


def synthetic(seed: int) -> Image.Image:
    """Noise whose amplitude falls with the frequency, as in photographs, with edges, 2000 x 1500."""
    draws = np.random.default_rng(seed)
    h, w = 1500, 2000
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(draws.normal(size=(3, h, w))) / frequency
    smooth = np.fft.irfft2(spectrum, (h, w))
    levels = 128 + 45 * smooth / smooth.std((1, 2), keepdims=True)
    edges = np.where(smooth[:1] > np.roll(smooth[:1], 300, 2), 30, -30)  # contours of objects
    return Image.fromarray((levels + edges).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def make(path: Path, pictures: list[Image.Image], kind: Set) -> Path:
    """Write a set; returns the folder or shard."""
    path.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for i in range(kind.images):
        picture = pictures[i % len(pictures)]
        largest = min(picture.width / kind.width, picture.height / kind.height)
        width, height = (largest * draws.uniform(0.7, 1) * side for side in kind[:2])
        left, top = draws.uniform(0, picture.width - width), draws.uniform(0, picture.height - height)
        box = (left, top, left + width, top + height)
        clean = np.asarray(picture.resize(kind[:2], Image.Resampling.LANCZOS, box), np.float32)
        noisy = clean + draws.normal(0, NOISE, (*clean.shape[:2], 1)) + draws.normal(0, 1, clean.shape)
        pixels = noisy.clip(0, 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(path / f"{i:03d}.{kind.form.lower()}", kind.form, **kind.options)
    if kind.place == "packed":
        pack(str(path), path.with_suffix(".packed"), workers=0)
        return path.with_suffix(".packed") / "images-000000.tar"
    if kind.place != "shard":
        return path
    shard = path.with_suffix(".tar")
    with tarfile.open(shard, "w") as tar:
        for file in sorted(path.iterdir()):
            tar.add(file, file.name)
    return shard


# --- the measurement ----------------------------------------------------------------------------------------


def rates(path: Path, count: int, loaders: dict[str, Loader], rounds: int) -> dict[str, list[float]]:
    """Images per second of processor time of each loader in each round, after one to warm up."""
    epochs = {name: loader(path) for name, loader in loaders.items()}
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(rounds + 1):
        order = list(epochs)
        random.Random(number).shuffle(order)
        for name in order:
            start = time.process_time()
            read = sum(1 for _ in epochs[name](number))
            seconds = time.process_time() - start
            assert read == count, f"{name} read {read} of {count} images"
            if number:
                speeds[name].append(count / seconds)
    return speeds


def row(kind: str, name: str, speeds: dict[str, list[float]]) -> dict[str, Any]:
    """The numbers of a loader on a set; the ratio is that to `REFERENCE` in the same round."""
    values = speeds[name]
    ratios = [a / b for a, b in zip(values, speeds[REFERENCE], strict=True)]
    return {
        "set": kind,
        "loader": name,
        "images_per_second": statistics.median(values),
        "range": [min(values), max(values)],
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "cores": DEMAND / statistics.median(values),
    }


def table(results: dict[str, Any]) -> str:
    """Images/s of a core by set and loader."""
    machine, about = results["machine"], results["about"]
    names = [name for name in LOADERS if name in about["versions"]]
    rows = []
    for kind, facts in results["sets"].items():
        cells = {row["loader"]: row for row in results["rows"] if row["set"] == kind}
        rates = [
            "{:,.{d}f} ({:.2f}x)".format(
                cells[n]["images_per_second"], cells[n]["ratio"], d=int(cells[n]["images_per_second"] < 100)
            )
            if n in cells
            else ""
            for n in names
        ]
        rows.append([kind, f"{facts['kilobytes']:,.0f}", *rates, f"{cells['rcmae']['cores']:,.0f}"])
    versions = ", ".join(f"{name} {number}" for name, number in about["libraries"].items())
    spread = max((row["ratio_range"][1] - row["ratio_range"][0]) / row["ratio"] for row in results["rows"])
    cpu = f"{machine['cpu']}{' with AVX2' * about['avx2']}"
    return markdown.table(
        ["images/s of one core", "kB each", *names, f"cores for {about['demand']:,} images/s"],
        rows,
        f"Processor time, medians of {about['rounds']} rounds; in brackets the ratio to {REFERENCE} in the "
        f"same round, which varied by up to {spread:.0%}. The last column is for rcmae. {cpu}, "
        f"load {about['load']:.1f} on {machine['cores']} cores; {about['pictures']}; {versions}.",
    )


def main() -> int:
    """Make the sets, measure all loaders on them, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sets", default="", help="parts of names, separated by commas")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaders = {
        name: loader for name, (package, loader) in LOADERS.items() if importlib.util.find_spec(package)
    }
    chosen = {k: v for k, v in SETS.items() if any(part.strip() in k for part in options.sets.split(","))}
    if not torch.cuda.is_available():
        chosen = {k: v for k, v in chosen.items() if v.place != "device"}
    pictures = photographs(options.photographs)
    sets, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, facts) in enumerate(chosen.items()):
            path = make(Path(folder) / str(number), pictures, facts)
            size = sum(len(raw) for raw in encoded(path)) / facts.images / 1000
            sets[kind] = {"images": facts.images, "kilobytes": size}
            ours = CACHED.get(facts.place, rcmae)
            able = loaders | {"rcmae": ours}
            if path.suffix == ".tar":
                able.pop("lightly-train", None)
            measured = rates(path, facts.images, able, options.rounds)
            for name in able:
                rows.append(speeds := row(kind, name, measured))
                speed = f"{speeds['images_per_second']:8.1f} images/s {speeds['ratio']:5.2f}x"
                print(f"{kind:30} {name:16} {speed}", flush=True)
    if options.out:
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        libraries = {
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
            "timm": version("timm"),
            "Pillow": version("pillow"),
            "libjpeg-turbo": features.version("libjpeg_turbo"),
        }
        about = {
            "rounds": options.rounds,
            "demand": DEMAND,
            "pictures": f"{len(pictures)} {'photographs' if options.photographs else 'synthetic pictures'}",
            "libraries": libraries,
            "versions": {name: version(package) for name, (package, _) in LOADERS.items() if name in loaders},
            "avx2": " avx2" in flags,
            "avx512": " avx512f" in flags,
            "load": os.getloadavg()[1],
        }
        machine = describe_machine(torch.device("cpu"), "8 bits")
        results = {"machine": machine, "about": about, "sets": sets, "rows": rows}
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
