"""A million files: the processor time to open a set, without and with its cached index, and the memory that
it takes in a loader process.

    python -m benchmarks.index --out results/index.json      # 1.3 GB and 1.3 million files on the disk

The tar file has 1.3 million members of one byte, named as in ImageNet; the folder has as many empty files.
`--count 20000` is a quick try. Memory: what a forked process that has read a thousand images has to itself,
less what it has with a set of a thousand images.
"""

import argparse
import gc
import json
import os
import re
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import markdown
from rcmae.data import index
from rcmae.data.base import OpenOptions, Source
from rcmae.data.sources import kind_of
from rcmae.engine.run import describe_machine

CLASSES = 1000

READ = 1000
"Images read by a process whose memory is measured."


def names(count: int) -> list[str]:
    """Names as in ImageNet, sorted."""
    return sorted(f"n{i % CLASSES:08d}/n{i % CLASSES:08d}_{i // CLASSES}.JPEG" for i in range(count))


def tar_file(path: Path, count: int) -> str:
    """A tar file of tiny members."""
    path, block, end = path.with_suffix(".tar"), b"x" + bytes(511), bytes(1024)
    with path.open("wb") as file:
        for name in names(count):
            info = tarfile.TarInfo(name)
            info.size = 1
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + block)
        file.write(end)
    return str(path)


def folder(path: Path, count: int) -> str:
    """A folder of empty files."""
    for name in names(count):
        parent, _, file = name.partition("/")
        if file.endswith("_0.JPEG"):
            (path / parent).mkdir(parents=True)
        os.mknod(f"{path}/{name}")
    return str(path)


def opened(spec: str) -> tuple[Source, float]:
    """A source, and the seconds of processor time to open it."""
    start = time.process_time()
    kind = kind_of(spec)
    assert kind is not None
    source = kind.open(spec, OpenOptions())
    return source, time.process_time() - start


def private_memory(source: Source) -> int:
    """Bytes that a forked process has to itself after reading some images."""
    receive, send = os.pipe()
    if not (child := os.fork()):
        step = max(1, len(source) // READ)
        for i in range(0, len(source), step):
            source.read(i), source.where(i)
        gc.collect()
        kilobytes = re.findall(r"Private_\w+:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text())
        os.write(send, str(1024 * sum(map(int, kilobytes))).encode())
        os._exit(0)
    os.close(send)
    with open(receive) as file:  # noqa: PTH123 - a descriptor
        memory = int(file.read())
    os.waitpid(child, 0)
    return memory


def measure(kind: str, make: Callable[[Path, int], str], count: int, parent: Path) -> dict[str, Any]:
    """The numbers of a kind of set."""
    few, _ = opened(make(parent / f"few {kind}", READ))
    base = private_memory(few)
    spec = make(parent / kind, count)
    time.sleep(index.SETTLED + 0.5)
    source, first = opened(spec)
    fingerprint = source.fingerprint()
    del source
    again, second = opened(spec)
    assert again.fingerprint() == fingerprint and len(again) == count
    return {
        "kind": kind,
        "images": count,
        "seconds": first,
        "seconds_with_index": second,
        "index_bytes": max(file.stat().st_size for file in (parent / "cache").rglob("*.safetensors")),
        "worker_bytes": max(0, private_memory(again) - base),
    }


def table(results: dict[str, Any]) -> str:
    """Start and memory by kind of set."""
    rows = [
        [
            row["kind"],
            f"{row['images']:,}",
            f"{row['seconds']:.0f} s",
            f"{row['seconds_with_index']:.1f} s",
            f"{row['index_bytes'] / 1e6:.0f} MB",
            f"{row['worker_bytes'] / 1e6:.1f} MB",
        ]
        for row in results["rows"]
    ]
    machine = results["machine"]
    head = ["", "images", "opening", "with its index", "index", "memory per loader process"]
    return markdown.table(
        head,
        rows,
        f"Processor time. {machine['cpu']}, load {results['load']:.1f} on {machine['cores']} cores.",
    )


def main() -> int:
    """Make the sets, measure them, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1_300_000)
    parser.add_argument("--folder", type=Path, help="where to make them [default: a temporary folder]")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    index.SMALLEST = min(index.SMALLEST, options.count)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as parent:
        os.environ["XDG_CACHE_HOME"] = f"{parent}/cache"
        for kind, make in (("tar file", tar_file), ("folder", folder)):
            rows.append(measure(kind, make, options.count, Path(parent)))
            print(json.dumps(rows[-1]), flush=True)
    machine = describe_machine(torch.device("cpu"), "8 bits")
    results = {"machine": machine, "load": os.getloadavg()[1], "rows": rows}
    print(table(results))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
