"""Lists of image files, with or without labels, as text or as a table."""

import codecs
import csv
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError
from .base import EXTENSIONS, OpenOptions, printable
from .files import Files
from .layout import LABEL_NAMES, MULTI_LABEL, ImageFilter, several_labels

PATH_NAMES = {
    *("image", "images", "img", "image_path", "img_path", "image_name", "image_id", "path", "name", "id"),
    *("file", "files", "filename", "file_name", "filepath", "file_path"),
}
"Names of columns with paths, in lower case."

UTF8 = ("utf-8", "surrogateescape")
"For paths with invalid UTF-8."

Lines = list[tuple[int, str]]
"The lines that are not empty, with their numbers."

Readings = Iterable[tuple[int, Iterable[tuple[str, str]]]]
"By line, the ways to read it as a path and a label (empty for none); the first existing path is meant."


class ListFile(Files):
    """The files listed in a text file, each optionally with a tab or a space and a label, or in a table whose
    header names the columns. Paths are relative to the list."""

    form, kind = "list file (.txt, .csv or .tsv)", "list"

    @classmethod
    def matches(cls, spec: str) -> bool:
        return Path(spec).suffix.lower() in (".txt", ".csv", ".tsv") and Path(spec).is_file()

    @classmethod
    def open(cls, spec: str, options: OpenOptions) -> "ListFile":
        root, image_filter = os.fsencode(Path(spec).parent), ImageFilter(any_kind=True)
        content = Path(spec).read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
        lines = [(n, line.decode(*UTF8)) for n, line in enumerate(content, 1)]
        lines = [(n, line) for n, line in lines if line.strip()]
        readings, why, notes = _read(spec, root, lines)
        names: list[bytes] = []
        labels: list[bytes] = []
        sizes: list[int] = []
        for n, pairs in readings:
            options.tick(n / len(content))
            missing = []
            for path, text in pairs:
                name, label = path.encode(*UTF8), text.strip().encode(*UTF8)
                if (size := _size(root, name)) is not None:
                    break
                missing.append(printable(name))
            else:
                raise DataError(
                    f"{spec} line {n}: {missing[0]} does not exist; paths are relative to the list"
                )
            if image_filter.takes(name):
                names.append(name)
                labels.append(label)
                sizes.append(size)
        if not names:
            raise DataError(f"{spec} lists no images; write one path per line, optionally a tab and a label")
        repeated, differently = _repeated(names, labels)
        why = why or differently or several_labels(names, labels)
        if repeated:
            notes = [*notes, f"repeated lines of images, all kept: {repeated}"]
        labels = [b""] * len(names) if why else labels
        return cls(spec, Path(spec).parent, names, sizes, labels, tuple(notes), image_filter.left_out, why)


def _repeated(names: list[bytes], labels: list[bytes]) -> tuple[int, str]:
    """How many images are listed again, and why labels cannot be used if one of them has several."""
    seen: dict[bytes, bytes] = {}
    why = ""
    for name, label in zip(names, labels, strict=True):
        path = os.path.normpath(name)
        other = seen.get(path) or label
        if label not in (b"", other):
            why = why or MULTI_LABEL.format(printable(name), printable(other + b", " + label))
        seen[path] = other
    return len(names) - len(seen), why


def _read(spec: str, root: bytes, lines: Lines) -> tuple[Readings, str, Sequence[str]]:
    """The readings of all lines, why there are no labels, if that needs an explanation, and notes."""
    if not lines:
        return [], "", []
    first = lines[0][1]
    cells = _names(re.split(r"[\s,;]+", first))
    exists = any(_exists(root, path) for path, _ in _pairs(first))
    header = not exists and not any(cell.endswith(EXTENSIONS) for cell in cells)
    if Path(spec).suffix.lower() == ".txt" and not (header and {*cells} & {*PATH_NAMES, *LABEL_NAMES}):
        return ((n, _pairs(line)) for n, line in lines), "", []
    separated = re.search("[\t,;]", first) or Path(spec).suffix.lower() != ".txt"
    delimiter = max(",\t;", key=first.count) if separated else " "
    try:
        rows = list(csv.reader((line for _, line in lines), delimiter=delimiter, skipinitialspace=True))
    except csv.Error as e:
        raise DataError(f"{spec} is not a table: {e}") from e
    if len(rows) < len(lines):
        raise DataError(f"{spec} has a quotation mark without its counterpart on the same line")
    if short := next((n for (n, _), row in zip(lines, rows, strict=True) if len(row) < len(rows[0])), None):
        raise DataError(f"{spec} line {short} has fewer columns than the first line")
    body = rows[1:] if header else rows
    columns = _columns(root, rows[0] if header else [], body)
    numbers = [n for n, _ in lines[len(rows) - len(body) :]]
    pairs = ((n, [(row[columns.path], columns.label(row))]) for n, row in zip(numbers, body, strict=True))
    return pairs, columns.why_unlabeled, columns.notes


class Columns(NamedTuple):
    """The columns of a table that are read."""

    path: int
    label: Callable[[list[str]], str] = lambda row: ""
    "the label of a row"
    why_unlabeled: str = ""
    notes: Sequence[str] = ()


def _columns(root: bytes, header: list[str], rows: list[list[str]]) -> Columns:
    """The columns of the paths and of the labels. The header may be missing.

    Of columns for labels, the one that comes first in `LABEL_NAMES` is used. Several columns of the same name
    are several labels.
    """
    names, width = _names(header), len(rows[0]) if rows else 0
    existing = [c for c in range(width) if _exists(root, rows[0][c])]
    path = (existing or [c for c, name in enumerate(names) if name in PATH_NAMES] or [0])[0]
    others = [c for c in range(width) if c != path and (not names or names[c])]
    labels = [c for c in others if names and names[c] in LABEL_NAMES] or (others if len(others) == 1 else [])
    if labels:
        if names:
            labels.sort(key=lambda c: LABEL_NAMES.index(names[c]) if names[c] in LABEL_NAMES else 0)
        # A second coding of the same label, such as its number, says nothing new.
        labels = labels[:1] + [c for c in labels[1:] if not _same_classes(rows, labels[0], c)]
        used = [c for c in labels if not names or names[c] == names[labels[0]]]
        unused = ", ".join(header[c].strip() for c in labels if c not in used)
        notes = [f"labels are the column {header[used[0]].strip()}, not {unused}"] if unused else []
        return Columns(path, lambda row: "|".join(row[c] for c in used), notes=notes)
    if names and all(row[c].strip() in ("0", "1", "0.0", "1.0") for row in rows for c in others):
        return Columns(path, lambda row: "|".join(header[c].strip() for c in others if float(row[c])))
    return Columns(path, why_unlabeled="no column of the table is called label or class" if others else "")


def _same_classes(rows: list[list[str]], a: int, b: int) -> bool:
    """Whether two columns divide the rows in the same way."""
    return (
        len({(row[a], row[b]) for row in rows})
        == len({row[a] for row in rows})
        == len({row[b] for row in rows})
    )


def _names(header: list[str]) -> list[str]:
    return [cell.strip().lower().replace(" ", "_") for cell in header]


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    """The ways to read a line without a header as a path and a label. Paths may contain spaces and commas."""
    if "\t" in line:
        path, _, label = line.partition("\t")
        yield path, label
    yield line, ""
    yield line.strip(), ""
    for parts in (line.rsplit(None, 1), line.split(None, 1), line.rsplit(",", 1), line.split(",", 1)):
        if len(parts) == 2:
            yield parts[0], parts[1]


def _exists(root: bytes, path: str) -> bool:
    return _size(root, path.encode(*UTF8)) is not None


def _size(root: bytes, path: bytes) -> int | None:
    """The size in bytes of a file by its path in the list; None if there is no such file."""
    try:
        status = os.stat(os.path.join(root, path))  # noqa: PTH116, PTH118 - bytes
    except PermissionError:
        raise
    except (OSError, ValueError):  # ValueError: a null byte
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None
