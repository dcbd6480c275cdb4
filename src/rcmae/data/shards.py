"""Tar shards in the WebDataset layout, indexed once for random access."""

import glob
import hashlib
import json
import os
import posixpath
import re
import tarfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import how_many
from ..errors import DataError
from .base import EXTENSIONS, OpenOptions, Source, Strings, no_labels, numbered, printable, reading
from .files import files_below
from .index import Index, stamp
from .layout import LABEL_NAMES, TESTING, ImageFilter, listed, part_of, select

OPEN_SHARDS = 64
"Open shards per process; systems typically allow 1,024 open files."

MANIFEST, UNFINISHED = "manifest.json", "unfinished.jsonl"
"Files that `rcmae pack` writes beside its shards: about all of them, or as long as some are missing."

LARGEST_LABEL = 2**20
"Bytes that are read of a .cls or .json file."

USUAL = (b"", b"rgb", b"image", b"img")
"What stands between the first dot and the extension of a sample's image, the most usual first."

_LABEL_KEY = re.compile(rb'"(' + "|".join(LABEL_NAMES).encode() + rb')"\s*:', re.IGNORECASE)


class Shards(Source):
    """Images in tar files, with labels in the .cls or .json files of their samples, or in class folders.

    As in WebDataset, files whose names are the same up to the first dot are a sample.
    """

    form, kind = "tar shards (folder or pattern)", "tar"

    def __init__(
        self,
        name: str,
        shards: list[Path],
        names: list[bytes],
        extents: list[tuple[int, int, int]],
        labels: list[bytes],
        notes: tuple[str, ...] = (),
        left_out: Mapping[str, int] | None = None,
        why_unlabeled: str = "",
    ):
        """`extents`: for each image the index of its shard, and its offset and size in bytes."""
        self.name, self.shards = name, [str(s) for s in shards]
        self.names, self.extents = Strings(names), np.array(extents, dtype=np.int64)
        self.labels, self.classes = numbered(labels)
        self.left_out, self.why_unlabeled = left_out or {}, why_unlabeled
        self.notes = (*notes, *no_labels(why_unlabeled))
        self.opened: OrderedDict[int, int] = OrderedDict()

    @classmethod
    def matches(cls, spec: str) -> bool:
        return bool(tars_of(_part(spec)[0], ImageFilter())) or (Path(spec) / UNFINISHED).exists()

    @classmethod
    def open(cls, spec: str, options: OpenOptions) -> "Shards":
        """If the shards, or the folders in them, are parts of a set, those for testing are left out, unless
        the spec ends with the name of a part: "shards:val"."""
        image_filter, (base, part) = ImageFilter(), _part(spec)
        shards = tars_of(base, image_filter)
        for folder in {Path(base), *(shard.parent for shard in shards)}:
            journal = folder / UNFINISHED  # empty while a complete pack is verified
            if journal.exists() and (journal.stat().st_size or not shards):
                raise DataError(f"{folder} is not completely packed; run the same `rcmae pack` again")
        stamps = [stamp(os.fsencode(shard)) for shard in shards]
        index = Index(cls, spec, list(map(str, shards)), image_filter.left_out)
        if source := index.load():
            source.opened = OrderedDict()
            return source
        kinds = _parts(shards)
        by_shard = part in kinds.values() if part else _is_divided(kinds)
        if by_shard:
            if not part:
                testing = Counter(TESTING[kind] for kind in kinds.values() if kind in TESTING)
                image_filter.left_out.update({f"shards of the {kind} part": n for kind, n in testing.items()})
            shards = [s for s, kind in kinds.items() if (kind == part if part else kind not in TESTING)]
        names: list[bytes] = []
        labels: list[bytes] = []
        extents: list[tuple[int, int, int]] = []
        links: list[int] = []
        choices = Counter[tuple[bytes, bytes]]()
        for number, shard in enumerate(shards):
            try:
                samples = _samples(
                    shard,
                    image_filter,
                    choices,
                    lambda done: options.tick((number + done) / len(shards)),  # noqa: B023
                )
            except PermissionError:
                raise
            except (tarfile.TarError, EOFError, OSError) as e:
                raise DataError(
                    f"{shard} is not a complete tar file ({e}); compressed shards must be unpacked to .tar"
                ) from e
            for name, offset, size, label in samples:
                if extents and extents[-1][:2] == (number, offset):
                    links.append(len(names))
                names.append(name)
                extents.append((number, offset, size))
                labels.append(label)
        paths = [name.removeprefix(b"./") for name in names]
        chosen, labels, why, notes = select(paths, links, image_filter, labels, "" if by_shard else part)
        if not chosen:
            raise DataError(
                f"{spec} holds no images in {how_many(len(shards), 'tar file')}: "
                f"{reading(0, image_filter.left_out)}; looked for {' '.join(EXTENSIONS)}"
            )
        names, extents = [names[i] for i in chosen], [extents[i] for i in chosen]
        notes = (*notes, *_choices_note(choices))
        source = cls(spec, shards, names, extents, labels, notes, image_filter.left_out, why)
        index.save(source, stamps)
        return source

    @classmethod
    def parts(cls, spec: str) -> tuple[str, str] | None:
        kinds = _parts(tars_of(_part(spec)[0], ImageFilter()))
        if _part(spec)[1] or not _is_divided(kinds):
            return None
        return f"{spec}:train", f"{spec}:{next(kind for kind in TESTING if kind in kinds.values())}"

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": OrderedDict()}

    def read(self, index: int) -> bytes:
        shard, offset, size = (int(v) for v in self.extents[index])
        if shard not in self.opened:
            if len(self.opened) >= OPEN_SHARDS:
                os.close(self.opened.popitem(last=False)[1])
            self.opened[shard] = os.open(self.shards[shard], os.O_RDONLY)
        self.opened.move_to_end(shard)
        return os.pread(self.opened[shard], size, offset)

    def where(self, index: int) -> str:
        return printable(os.fsencode(self.shards[int(self.extents[index, 0])]) + b"!" + self.names[index])

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.names.data.tobytes())
        digest.update(self.names.ends.tobytes() + self.extents.tobytes())
        return digest.hexdigest()


def _samples(
    shard: Path,
    image_filter: ImageFilter,
    choices: Counter[tuple[bytes, bytes]],
    tick: Callable[[float], None],
) -> list[tuple[bytes, int, int, bytes]]:
    """The image of each sample in a shard, in the order of their data: name, offset, size, and label (empty
    for none). `tick` is called with the fraction read.

    If no image stands beside a file of another kind, names with dots need not be those of samples: then only
    the images beside one with a usual name are left out. `choices` counts pairs of suffixes: of the image of
    a sample that is read, and of another one that is not. Links are resolved. Raises the errors of tarfile
    and OSError.
    """
    images: dict[bytes, list[tuple[tuple[int, int, int, bytes], bytes, int, int]]] = defaultdict(list)
    others: set[bytes] = set()
    labels: dict[bytes, bytes] = {}
    texts: dict[bytes, bytes] = {}
    total = max(shard.stat().st_size, 1)
    with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:

        def add(name: bytes, offset: int, size: int) -> None:
            folder, slash, base = name.rpartition(b"/")
            stem, _, suffix = base.partition(b".")
            key, suffix = folder + slash + stem, suffix.lower()
            if suffix in (b"cls", b"json"):
                others.add(key)
                file.seek(offset)
                content = file.read(min(size, LARGEST_LABEL))
                if suffix == b"cls":
                    labels[key] = content.strip()
                elif label := _json_label(content, image_filter):
                    texts[key] = label
            elif image_filter.takes(name.removeprefix(b"./")):
                images[key].append((_rank(suffix), name, offset, size))
            else:
                others.add(key)

        links = []
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # a million would take a gigabyte
            tick(min(1, member.offset / total))
            name = os.fsencode(member.name)
            if member.isdir() or any(map(image_filter.is_hidden, name.removeprefix(b"./").split(b"/"))):
                continue
            if member.isfile():
                add(name, member.offset_data, member.size)
            elif member.islnk() or member.issym():
                links.append(member)
            else:
                image_filter.left_out["special files"] += 1
        members = {}
        if links:
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as again:
                members = {posixpath.normpath(member.name): member for member in again}
        for member in links:
            if target := _target(members, member):
                add(os.fsencode(member.name), target.offset_data, target.size)
            else:
                image_filter.left_out["broken links"] += 1
    labels = texts | labels
    image_filter.left_out.update("labels without an image" for key in labels if key not in images)
    one_each = not others.isdisjoint(images)
    chosen = []
    for key, candidates in images.items():
        best, *further = sorted(candidates)
        usual, *_, suffix = best[0]
        if further and (one_each or usual < len(USUAL)):
            image_filter.left_out["further images of a sample"] += len(further)
            choices.update((suffix, rank[-1]) for rank, *_ in further)
            candidates = [best]
        chosen += [(name, offset, size, labels.get(key, b"")) for _, name, offset, size in candidates]
    return sorted(chosen, key=lambda sample: sample[1])


def _rank(suffix: bytes) -> tuple[int, int, int, bytes]:
    """The order in which an image of a sample is preferred, by its name from the first dot on, in lower case:
    usual names, few dots, usual formats, and the suffix.

    >>> sorted([b"seg.png", b"depth.exr.png", b"rgb.jpg", b"png", b"jpg"], key=_rank)
    [b'jpg', b'png', b'rgb.jpg', b'seg.png', b'depth.exr.png']
    """
    middle, _, extension = suffix.rpartition(b".")
    name = USUAL.index(middle) if middle in USUAL else len(USUAL)
    return name, suffix.count(b"."), EXTENSIONS.index(f".{extension.decode()}"), suffix


def _choices_note(choices: Counter[tuple[bytes, bytes]]) -> tuple[str, ...]:
    """The note on samples of several images, one of which is read."""
    by_read: dict[bytes, list[bytes]] = defaultdict(list)
    for (suffix, other), _ in choices.most_common():
        by_read[suffix].append(b"." + other)
    texts = [f".{printable(suffix)}, not {listed(others)}" for suffix, others in by_read.items()]
    shown = [*texts[:3], *(["..."] if len(texts) > 3 else [])]
    return (f"of samples with several images, one is read: {'; '.join(shown)}",) if texts else ()


def _target(members: dict[str, tarfile.TarInfo], link: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The file that a link in a tar file leads to, over any number of links; None if there is none."""
    for _ in range(20):
        path = link.linkname
        if link.issym():
            path = posixpath.join(posixpath.dirname(link.name), path)
        target = members.get(posixpath.normpath(path))
        if target is None or target.isfile():
            return target
        link = target
    return None


def _json_label(content: bytes, image_filter: ImageFilter) -> bytes:
    """The label in the JSON file of a sample, empty if it has none; several are separated by "|"."""
    if not _LABEL_KEY.search(content):
        return b""
    try:
        values = json.loads(content)
    except ValueError:
        image_filter.left_out["damaged .json"] += 1
        return b""
    by_name = {key.lower(): value for key, value in values.items()} if isinstance(values, dict) else {}
    label: Any = next((by_name[name] for name in LABEL_NAMES if by_name.get(name) is not None), [])
    return "|".join(map(str, label if isinstance(label, list) else [label])).encode()


def _part(spec: str) -> tuple[str, str]:
    """A spec without the name of a part at its end, and the part: ("shards", "val") for "shards:val"."""
    match = re.fullmatch("(.+):(train|val|test)", spec, re.DOTALL)
    return (match[1], match[2]) if match and not Path(spec).exists() else (spec, "")


def _parts(shards: list[Path]) -> dict[Path, str]:
    """The part of a set that each shard is called after, or a folder below the one that all are in."""
    shared = os.path.commonpath([shard.parent for shard in shards]) if shards else ""
    return {shard: part_of(str(shard.relative_to(shared))) for shard in shards}


def _is_divided(kinds: Mapping[Path, str]) -> bool:
    """Whether there are shards for training and others for testing."""
    return "train" in kinds.values() and not TESTING.keys().isdisjoint(kinds.values())


def tars_of(spec: str, image_filter: ImageFilter) -> list[Path]:
    """The tar files of a spec: a file, a pattern, or a folder that holds tar files and no images. Raises
    DataError if some are missing.

    Other files of a folder are counted in `image_filter`.
    """
    if Path(spec).is_dir():
        return _tars_below(spec, image_filter)
    patterns = _expand_braces(spec)
    matching = {pattern: _matching(pattern) for pattern in patterns}
    missing = [pattern for pattern, paths in matching.items() if not paths]
    if missing and len(patterns) > 1:
        raise DataError(
            f"{missing[0]} does not exist ({len(missing)} of {len(patterns)} shards of {spec} are missing)"
        )
    return sorted(path for paths in matching.values() for path in paths if path.suffix == ".tar")


def _tars_below(folder: str, image_filter: ImageFilter) -> list[Path]:
    """The tar files in a folder and its subfolders; none if there is an image."""
    tars = []
    for entry in files_below(folder, image_filter):
        if entry.name.endswith(".tar"):
            tars.append(Path(entry.path))
        elif entry.name != MANIFEST and image_filter.takes(os.fsencode(entry.name)):
            return []
    return sorted(tars)


def _matching(pattern: str) -> list[Path]:
    """The files of a pattern. Brackets in the name of a file or folder that exists are no pattern."""
    path = Path(pattern)
    if path.exists():
        return [path]
    parent = next(folder for folder in path.parents if folder.exists())
    whole = os.path.join(glob.escape(str(parent)), path.relative_to(parent))  # noqa: PTH118
    return [Path(path) for path in glob.glob(whole)]  # noqa: PTH207 - without hidden files


def _expand_braces(spec: str) -> list[str]:
    """The file names of WebDataset's 'x-{000..003}.tar'."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
    if not match:
        return [spec]
    numbers = [f"{i:0{len(match[1])}d}" for i in range(int(match[1]), int(match[2]) + 1)]
    return [spec[: match.start()] + i + rest for i in numbers for rest in _expand_braces(spec[match.end() :])]
