"""`rcmae embed`: the features of every image of a set, in one file for pandas, NumPy or a vector database."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from .. import __version__
from ..config import check
from ..data.dataset import Bad
from ..data.index import cache_folder
from ..data.pixels import measure_bits
from ..data.sources import Source, Subset, open_source
from ..engine import distributed
from ..engine.console import Screen
from ..engine.distributed import World
from ..engine.run import translate_errors
from ..errors import ConfigError, StorageError, optional, refuse
from ..interop.load import load
from ..methods import METHODS
from ..methods.base import Method
from ..models.backbone import Backbone, pooled
from .evaluate import networks
from .evaluation.base import Pool, ReadingOptions
from .features import extract, identity
from .score import Centers

KINDS = (".parquet", ".npz")
"Endings of the file."


class Embedded(NamedTuple):
    """The features of the n readable images of a set."""

    features: Float[np.ndarray, "n d"]
    rows: Int[np.ndarray, " n"]
    "the index of each image in its source"
    unreadable: list[Bad]


def embed(
    backbone: str,
    data: str,
    out: Path,
    *,
    which: Literal["teacher", "student"] = "teacher",
    pool: Pool | None = None,
    size: int | None = None,
    height: int | None = None,
    heads: int | None = None,
    batch_size: int = 256,
    device: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
    reading: ReadingOptions = ReadingOptions(),
    cache: Path | None = None,
    screen: Screen | None = None,
) -> dict[str, Any]:
    """Write the features of all images of a source to `out`, a .parquet or .npz file, which is replaced if it
    exists. Returns what was written.

    A file has for each readable image: `features` float32 [n, d], `name` (that of the file), and with labels
    `label` (an integer, -1 or null where unknown) and `class` (.npz: `classes`, the names by label). Its
    metadata, JSON under the key "rcmae", is the returned dict without `out` and `seconds`.

    - `backbone` is what `rcmae.load` takes, `which` its network if it has two.
    - `pool` is the feature of an image: "mean" (over the patches), "cls", or "cls+mean"; default: that of the
      method that trained the backbone, mean if it is not known.
    - `size` is the side of the images in pixels (the width, if `height` is given); default: the network's.
      For another size the position embedding is resampled; for weights without a configuration, it is the
      size that they are for, and `heads` their attention heads.

    Images are read as by `rcmae evaluate`: the center, resized. Features are kept in `cache` (default:
    ~/.cache/rcmae), so an interrupted command continues. Works under `torchrun`. Raises the errors of
    `rcmae.errors`.
    """
    if out.suffix not in KINDS:
        raise ConfigError(f"--out {out}: give a name that ends in {' or '.join(KINDS)}")
    if out.is_dir() or not out.parent.is_dir():
        problem = "is a folder" if out.is_dir() else f"cannot be written: there is no folder {out.parent}"
        raise ConfigError(f"--out {out} {problem}")
    if out.suffix == ".parquet":
        optional("pyarrow", "parquet")
    numbers = {"size": size, "height": height, "heads": heads, "batch_size": batch_size}
    refuse(
        [
            *(f"{name} must be 1 or more, not {n}" for name, n in numbers.items() if n is not None and n < 1),
            *(["height needs size, which is then the width"] if height and not size else []),
            *([f"workers must be 0 or more, not {workers}"] if workers and workers < 0 else []),
        ]
    )
    check(reading)
    started, target = time.monotonic(), distributed.pick_device(device)
    with (
        distributed.process_group(target) as world,
        translate_errors(target, world, "try a smaller --batch-size or --device cpu"),
    ):
        screen = screen or Screen(world.is_main)
        shape = None if size is None else (height or size, size)
        network = load(backbone, which, heads or None, size=shape)
        if shape and network.shape != shape:
            network = network.resized(shape)
        chosen: Pool = pool or METHODS.get(network.method, Method).pool
        check_pool(chosen, network, backbone)
        source = opened(data, network, reading, screen, world)
        embedded = embed_source(
            network,
            source,
            chosen,
            device=str(target),
            precision=precision,
            batch_size=batch_size,
            workers=workers,
            cache=cache,
            screen=screen,
            world=world,
        )
        about = {
            "rcmae": __version__,
            "backbone": backbone,
            "network": networks(backbone, which)[0],
            "method": network.method or None,
            "weights": identity(network),
            "pool": chosen,
            "size": list(network.shape),
            "data": data,
            "data_fingerprint": source.fingerprint(),
            "images": len(embedded.rows),
            "dimensions": embedded.features.shape[1],
            "classes": list(source.classes) if source.labels is not None else [],
            "unreadable": [{"where": where, "reason": reason} for _, where, reason in embedded.unreadable],
        }
        if world.is_main:
            with screen.progress(f"writing {out}", 1):
                _write(out, embedded, source, about)
    return about | {"out": str(out), "seconds": time.monotonic() - started}


def check_pool(pool: str, network: Backbone, name: str) -> None:
    """Raises ConfigError if the pool needs a class token that the network lacks."""
    if "cls" in pool and not network.vit.has_class_token:
        raise ConfigError(f"--pool {pool}: {name} has no class token; give --pool mean")


def opened(data: str, network: Backbone, reading: ReadingOptions, screen: Screen, world: World) -> Source:
    """The source of images for a network; what is read and left out of it is printed."""
    with screen.progress(f"listing the images of {data}", 100) as tick:
        source = open_source(
            data,
            network.channels,
            network.shape[1],
            tick=lambda done: tick(round(100 * done)),
            value_range="dtype",
            max_pixels=reading.max_pixels,
        )
    if reading.range == "data":
        measure_bits([source], network.channels, network.bits, screen.progress, world)
    screen.say(source.summary())
    for note in source.notes:
        screen.say(f"note: {note}")
    return source


def embed_source(
    network: Backbone,
    source: Source,
    pool: str,
    *,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 256,
    workers: int | None = None,
    cache: Path | None = None,
    screen: Screen,
    world: World = World(),
) -> Embedded:
    """The features of all readable images of a source, from the cache as far as possible; unreadable ones are
    printed, by name and reason. Raises DataError if none can be read, and CheckpointError if features are not
    finite."""
    target = distributed.pick_device(device)
    labels = np.full(len(source), -1) if source.labels is None else source.labels
    with screen.progress(f"features of {source.name}", len(source)) as tick:
        extracted = extract(
            network,
            Subset(source, np.arange(len(source)), labels),
            cache=(cache or cache_folder()) / "features",
            tokens=False,
            device=target,
            precision=distributed.pick_precision(precision, target),
            world=world,
            workers=workers,
            batch=batch_size,
            tick=tick,
        )
    # Not from the extraction, which reads no image if all features are in the cache.
    centers = Centers(source, network.shape, network.channels)
    unreadable = [bad for i in np.flatnonzero(~extracted.readable) for bad in centers[int(i)]["bad"]]
    report_unreadable(unreadable, screen.say)
    readable = extracted.select(extracted.readable)
    return Embedded(pooled(readable, pool).float().numpy(), np.flatnonzero(extracted.readable), unreadable)


def report_unreadable(unreadable: Sequence[Bad], say: Callable[[str], None], named: int = 20) -> None:
    """Print the names of unreadable images, with the reasons; beyond so many only their number."""
    for _, where, reason in unreadable[:named]:
        say(f"note: {where} cannot be read ({reason}): left out")
    if len(unreadable) > named:
        say(f"note: {len(unreadable) - named:,} more images cannot be read: left out")


def _write(out: Path, embedded: Embedded, source: Source, about: dict[str, Any]) -> None:
    """Replace the file atomically. Raises StorageError."""
    temporary = out.with_name(f".tmp_{os.getpid()}_{out.name}")
    names = [source.where(int(i)) for i in embedded.rows]
    labels = None if source.labels is None else source.labels[embedded.rows]
    try:
        with temporary.open("wb") as file:
            if out.suffix == ".npz":
                columns: dict[str, Any] = {"features": embedded.features, "name": np.array(names)}
                if labels is not None:
                    columns |= {"label": labels, "classes": np.array(about["classes"])}
                np.savez(file, **columns, rcmae=np.array(json.dumps(about)))
            else:
                _write_parquet(file, embedded.features, names, labels, about)
        temporary.replace(out)
    except OSError as e:
        raise StorageError(
            f"cannot write {out}: {e.strerror or e}; free some space or choose another --out"
        ) from e
    finally:
        temporary.unlink(missing_ok=True)


def _write_parquet(
    file: Any,
    features: Float[np.ndarray, "n d"],
    names: list[str],
    labels: Int[np.ndarray, " n"] | None,
    about: dict[str, Any],
) -> None:
    arrow, parquet = (optional(name, "parquet") for name in ("pyarrow", "pyarrow.parquet"))
    values = arrow.array(np.ascontiguousarray(features).reshape(-1))
    columns = {
        "name": arrow.array(names),
        "features": arrow.FixedSizeListArray.from_arrays(values, features.shape[1]),
    }
    if labels is not None:
        classes = dict(enumerate(about["classes"]))
        columns["label"] = arrow.array([int(i) if i >= 0 else None for i in labels], arrow.int64())
        columns["class"] = arrow.array([classes.get(int(i)) for i in labels], arrow.string())
    table = arrow.table(columns).replace_schema_metadata({"rcmae": json.dumps(about)})
    parquet.write_table(table, file)
