"""`rcmae pack`: a set of images as tar shards in the WebDataset layout, reduced once for many epochs.

Shard k of a part holds images k * n to (k + 1) * n - 1 of its source, so shards are independent of each other
and of the number of processes. `UNFINISHED` records the plan and each finished shard; at the end `MANIFEST`
takes its place.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..config import how_many, readable_size
from ..engine.checkpoint import replace_file
from ..engine.console import Screen, clock
from ..errors import ConfigError, DataError, StorageError
from . import decode
from .base import EXTENSIONS, Source
from .dataset import in_processes, plain_errors
from .decode import BadImage, Picture
from .layout import combined, part_of
from .loader import TRIED, sample, try_some, usable_cores
from .pixels import read_raw
from .shards import MANIFEST, UNFINISHED
from .sources import open_source, parts_of
from .views import shrink

QUALITY = 92
"Quality of JPEGs, whose colors keep their resolution."

LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000", "HEIF", "JXL")
"Formats whose reduced images become JPEG; those of all others become PNG."

JPEG_LIMIT = 65_000
"Longest side of a JPEG in pixels."

SHARD_BYTES, SHARD_IMAGES, SHARDS = 2**29, 5_000, 64
"""Most bytes (by the estimate) and images of a shard, and the number of shards of a set that is large enough
for 100 images in each."""

MARGIN = 1.05
"Space needed, as a multiple of the estimate."


class Shard(NamedTuple):
    """The images `start` to `stop` - 1 of a part."""

    name: str
    part: int
    start: int
    stop: int


class Result(NamedTuple):
    """A finished pack."""

    images: int
    shards: int
    size: int
    "bytes"
    unreadable: list[dict[str, str]]
    "where, and the reason"


class Encoder(Dataset):
    """Item (part, index) is the extension and the bytes of an image for a shard, or BadImage."""

    def __init__(self, sources: list[Source], size: int | None, channels: int):
        """`size` is the shorter side in pixels to which larger images are reduced, None to keep all bytes."""
        self.sources, self.size, self.channels = sources, size, channels

    def __getitem__(self, key: tuple[int, int]) -> tuple[str, bytes] | BadImage:
        try:
            return self._encoded(self.sources[key[0]], key[1])
        except BadImage as e:
            return e

    def _encoded(self, source: Source, index: int) -> tuple[str, bytes]:
        raw = read_raw(source, index)
        image = (
            raw if isinstance(raw, np.ndarray) else decode.open_image(raw, self.channels, source.pixel_limit)
        )
        side = min(image.shape[:2]) if self.size is None else self.size
        if isinstance(raw, np.ndarray):
            return _file(shrink(raw, side), lossy=False)
        if (
            min(image.shape[:2]) <= side
            or decode.sixteen_bits(raw, self.channels, source.pixel_limit) is not None
        ):
            if isinstance(image, Picture):
                image.pixels(least=1)  # raises BadImage if it is damaged
            return _extension(source.where(index), image, raw), raw
        assert isinstance(image, Picture)
        return _file(shrink(image, side), lossy=image.image.format in LOSSY)


def _file(pixels: np.ndarray, lossy: bool) -> tuple[str, bytes]:
    """Extension and bytes of an image file; colors that are gray are stored as gray."""
    if pixels.shape[2] == 1 or (pixels[..., :1] == pixels).all():
        pixels = pixels[..., 0]
    file, lossy = io.BytesIO(), lossy and max(pixels.shape) <= JPEG_LIMIT
    if lossy:
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY, subsampling=0)
    else:
        Image.fromarray(pixels).save(file, "PNG")
    return ".jpg" if lossy else ".png", file.getvalue()


def _extension(name: str, image: Any, raw: bytes) -> str:
    """The extension in a file's name, or the one of its format."""
    extension = os.path.splitext(name)[1].lower()  # noqa: PTH122 - the name of a member of a tar file
    if extension in EXTENSIONS:
        return extension
    if raw[:4] in decode.TIFF:
        return ".tif"
    kind = getattr(getattr(image, "image", None), "format", None) or "dcm"
    return {"MPO": ".jpg", "JPEG2000": ".jp2"}.get(kind, f".{kind.lower()}")


# --- the plan -----------------------------------------------------------------------------------------------


def _open_parts(data: str, channels: int, max_pixels: float, screen: Screen) -> dict[str, Source]:
    """The images to train on, and those of the part for testing, by the names of their shards."""
    parts = parts_of(data)
    specs = {"train" if parts else "images": data}
    if parts:
        specs[part_of(re.split("[:/]", parts[1].rstrip("/"))[-1]) or "val"] = parts[1]
    sources = {}
    for name, spec in specs.items():
        with screen.progress(f"indexing {spec}, %", 100) as tick:
            # Images whose range depends on the set are copied, so the range need not be known.
            source = open_source(
                spec,
                channels,
                tick=lambda done: tick(round(100 * done)),
                value_range="dtype",
                max_pixels=max_pixels,
            )
        screen.say(source.summary())
        for note in source.notes:
            screen.say(f"note: {note}")
        sources[name] = source
    classes = sorted({label for source in sources.values() for label in source.classes})
    several = combined({label.encode() for label in classes})
    for label in classes:
        if label != label.strip() or label.encode() in several:
            raise DataError(
                f"{data}: in a shard, the class name {label!r} would be read as another one or as several "
                "labels; rename the class"
            )
    return sources


def _plan(sources: dict[str, Source], size: int | None, channels: int) -> dict[str, Any]:
    """What the shards depend on; "images_per_shard" is added by the estimate."""
    labels = hashlib.sha256()
    for source in sources.values():
        labels.update(b"" if source.labels is None else source.labels.tobytes())
        labels.update("\0".join(source.classes).encode())
    return {
        "size": size or "original",
        "quality": QUALITY,
        "channels": channels,
        "max_pixels": next(iter(sources.values())).pixel_limit,
        "parts": {name: len(source) for name, source in sources.items()},
        "data": [source.fingerprint() for source in sources.values()],
        "labels": labels.hexdigest(),
    }


def _shards(plan: dict[str, Any]) -> list[Shard]:
    per_shard = plan["images_per_shard"]
    return [
        Shard(f"{name}-{number:06d}.tar", part, start, min(start + per_shard, count))
        for part, (name, count) in enumerate(plan["parts"].items())
        for number, start in enumerate(range(0, count, per_shard))
    ]


def _try(encoder: Encoder, screen: Screen) -> tuple[float, float]:
    """The mean bytes in a shard, and seconds of one process, of an image."""
    keys = [(part, i) for part, source in enumerate(encoder.sources) for i in sample(len(source))]
    np.random.Generator(np.random.Philox(key=0)).shuffle(keys)

    def size(key: tuple[int, int]) -> int:
        result = encoder[key]
        if isinstance(result, BadImage):
            return 0
        # Blocks of 512 bytes: the header, the content, and two for the label.
        labeled = encoder.sources[key[0]].labels is not None
        return 512 * (1 + -(-len(result[1]) // 512) + 2 * labeled)

    return try_some(keys[:TRIED], size, screen)


# --- packing ------------------------------------------------------------------------------------------------


def pack(
    data: str,
    out: Path,
    size: int | None = 256,
    channels: int = 3,
    workers: int | None = None,
    screen: Screen | None = None,
    max_pixels: float = Source.pixel_limit,
) -> Result:
    """Write the images of `data` as tar shards into the folder `out`: their shorter side is reduced to `size`
    pixels, or their bytes are kept with None. Images of more than `max_pixels` are left out. Continues what
    an earlier call began.

    Raises ConfigError for settings that are not valid and for a folder with other content, DataError for
    `data`, StorageError if the shards do not fit on the disk.
    """
    screen = screen or Screen(False)
    _check(data, out, size, channels, workers)
    sources = _open_parts(data, channels, max_pixels, screen)
    encoder = Encoder(list(sources.values()), size, channels)
    plan = _plan(sources, size, channels)
    with _journal(out) as journal:
        began, finished = _read(out, journal)
        _check_same(out, began, plan)
        finished = _verified(out, finished, screen)
        count = sum(plan["parts"].values())
        left = count - sum(entry["images"] + len(entry["unreadable"]) for entry in finished.values())
        if left:
            processes = usable_cores() if workers is None else workers
            per_shard = _estimate(out, encoder, count, left, processes, screen)
            plan["images_per_shard"] = began.get("images_per_shard", per_shard)
            if not os.fstat(journal.fileno()).st_size:
                _append(journal, plan, *finished.values())
            todo = [shard for shard in _shards(plan) if shard.name not in finished]
            for path in out.glob(".*.tar"):  # what a killed process left
                path.unlink()
            with screen.progress("packing", left) as tick:
                results, done = _results(encoder, todo, processes), 0
                for shard in todo:
                    entry = _write(out, shard, encoder, results, lambda i, done=done: tick(done + i))
                    finished[shard.name] = entry
                    _append(journal, entry)
                    done += shard.stop - shard.start
        else:
            plan = began
            screen.say(f"{out} is complete: {how_many(len(finished), 'shard')} verified")
        entries = [finished[name] for name in sorted(finished)]
        unreadable = [bad for entry in entries for bad in entry["unreadable"]]
        if len(unreadable) == count:
            raise DataError(f"none of {how_many(count, 'image')} of {data} can be read; run `rcmae check`")
        replace_file(out / MANIFEST, json.dumps(plan | {"shards": entries}, indent=1) + "\n")
        (out / UNFINISHED).unlink()
    size_of_all = sum(entry["bytes"] for entry in entries)
    return Result(count - len(unreadable), len(entries), size_of_all, unreadable)


def _estimate(out: Path, encoder: Encoder, count: int, left: int, processes: int, screen: Screen) -> int:
    """Say how much space and time the images that are left take; returns the images of a shard for all
    `count`. Raises StorageError if the space is not free."""
    mean, seconds = _try(encoder, screen)
    need, free = int(MARGIN * mean * left), shutil.disk_usage(out).free
    screen.say(
        f"packing {how_many(left, 'image')} into {out}: about {readable_size(need)} "
        f"({readable_size(free)} free), {clock(seconds * left / max(processes, 1))} with "
        f"{how_many(max(processes, 1), 'process')}"
    )
    if need > free:
        raise StorageError(
            f"{out} needs about {readable_size(need)}, and {readable_size(free)} are free; name a folder on "
            "another disk, or give a smaller --size"
        )
    fitting = int(SHARD_BYTES // max(mean, 1))
    return max(1, min(fitting, SHARD_IMAGES, max(100, -(-count // SHARDS))))


def _results(encoder: Encoder, shards: list[Shard], processes: int) -> Iterator[tuple[str, bytes] | BadImage]:
    """The items of all images of the shards, in their order."""
    batches = (
        [(shard.part, i) for i in range(start, min(start + 8, shard.stop))]
        for shard in shards
        for start in range(shard.start, shard.stop, 8)
    )
    loader = DataLoader(
        encoder,
        batch_sampler=batches,
        collate_fn=list,
        prefetch_factor=4 if processes else None,
        **in_processes(processes),
    )
    for batch in plain_errors(loader):
        yield from batch


def _write(
    out: Path, shard: Shard, encoder: Encoder, results: Iterator[tuple[str, bytes] | BadImage], tick: Any
) -> dict[str, Any]:
    """Write a shard, complete or not at all; returns its entry in the manifest."""
    source = encoder.sources[shard.part]
    path, temporary = out / shard.name, out / f".{shard.name}"
    images, unreadable = 0, []
    with _storing(path):
        with temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                indices = range(shard.start, shard.stop)
                for i, result in zip(indices, islice(results, len(indices)), strict=True):
                    if isinstance(result, BadImage):
                        unreadable.append({"where": source.where(i), "reason": str(result)})
                    else:
                        images += 1
                        _add(tar, source, i, *result)
                    tick(i + 1 - shard.start)
            file.flush()
            os.fsync(file.fileno())
        entry = {
            "name": shard.name,
            "images": images,
            "bytes": temporary.stat().st_size,
            "sha256": _sha256(temporary),
            "unreadable": unreadable,
        }
        temporary.replace(path)
    return entry


def _add(tar: tarfile.TarFile, source: Source, index: int, extension: str, content: bytes) -> None:
    """Add a sample: its image, and the name of its class. The name of the sample ends with the original
    one."""
    name = os.path.splitext(source.where(index).removeprefix(source.name))[0]  # noqa: PTH122
    key = f"{index:08d}-{re.sub('[^A-Za-z0-9]+', '_', name).strip('_')[-60:]}"
    files = {key + extension: content}
    if label := _label(source, index):
        files[f"{key}.cls"] = label
    for member, data in files.items():
        info = tarfile.TarInfo(member)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def _label(source: Source, index: int) -> bytes:
    """The name of an image's class; empty without one."""
    label = -1 if source.labels is None else int(source.labels[index])
    return source.classes[label].encode() if label >= 0 else b""


# --- files of the folder ------------------------------------------------------------------------------------


def _check(data: str, out: Path, size: int | None, channels: int, workers: int | None) -> None:
    """Raises ConfigError for settings that are not valid, and for a folder with other content than a
    pack."""
    if size is not None and size < 1:
        raise ConfigError(f"size must be 1 or more, not {size}")
    if workers is not None and workers < 0:
        raise ConfigError(f"workers must be 0 or more, not {workers}")
    if size is not None and channels not in (1, 3):
        raise ConfigError(f"images of {channels} channels cannot be reduced; give --original")
    if Path(data).is_dir() and out.resolve().is_relative_to(Path(data).resolve()):
        raise ConfigError(f"{out} is within {data}; name a folder outside of it")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; name a folder")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if names and not names & {MANIFEST, UNFINISHED}:
        raise ConfigError(f"{out} is not empty and holds no pack; name a new folder")


def _check_same(out: Path, began: dict[str, Any], plan: dict[str, Any]) -> None:
    """Raises ConfigError if the pack in the folder began with another plan."""
    for key, value in plan.items() if began else ():
        if began.get(key) != value:
            settings = f"{key} ({began.get(key)}, now {value})"
            other = "images or labels" if key in ("parts", "data", "labels") else settings
            raise ConfigError(f"{out} holds a pack of other {other}; name another folder")


@contextmanager
def _journal(out: Path) -> Iterator[Any]:
    """The open file `UNFINISHED`, locked. It is removed again if nothing was planned. Raises ConfigError if
    another process has it."""
    created = not out.exists()
    with _storing(out):
        out.mkdir(parents=True, exist_ok=True)
        journal = (out / UNFINISHED).open("a+b")
    with journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise ConfigError(f"{out} is in use by another process; name another folder") from e
        try:
            yield journal
        finally:
            if (path := out / UNFINISHED).exists() and not path.stat().st_size:
                path.unlink()
                if created:
                    with suppress(OSError):  # NFS keeps the open file under another name
                        out.rmdir()


def _read(out: Path, journal: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The plan of an earlier call ({} without one), and the entries of its finished shards by name, of which
    the last one counts. Raises ConfigError if they cannot be read."""
    journal.seek(0)
    content = journal.read()
    journal.truncate(content.rfind(b"\n") + 1)  # a kill may have cut the last line
    try:
        lines = [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
        if not lines and (out / MANIFEST).exists():
            plan = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
            lines = [plan, *plan.pop("shards")]
        plan, *entries = lines or [{}]
        return plan, {entry["name"]: entry for entry in entries}
    except (ValueError, KeyError, TypeError) as e:
        file = UNFINISHED if content else MANIFEST
        raise ConfigError(f"{out / file} is damaged or not that of a pack; name a new folder") from e


def _verified(out: Path, finished: dict[str, dict[str, Any]], screen: Screen) -> dict[str, dict[str, Any]]:
    """The finished shards whose files have their hashes."""
    intact = {}
    with screen.progress("verifying finished shards", max(len(finished), 1)) as tick:
        for number, (name, entry) in enumerate(finished.items(), 1):
            if (out / name).is_file() and _sha256(out / name) == entry["sha256"]:
                intact[name] = entry
            else:
                screen.say(f"note: {out / name} is missing or damaged: it is packed again")
            tick(number)
    return intact


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _append(journal: Any, *lines: dict[str, Any]) -> None:
    with _storing(Path(journal.name)):
        journal.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        journal.flush()
        os.fsync(journal.fileno())


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        advice = "free some space" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "make the folder writable"
        raise StorageError(
            f"cannot write {path}: {e.strerror}; {advice}, then run the same command again"
        ) from e
