"""Data sets of the Hugging Face Hub."""

import errno
import hashlib
from pathlib import Path

import numpy as np

from ..errors import DataError, first_line, optional
from .base import OpenOptions, Source, no_labels
from .layout import MULTI_LABEL, part_of

SCHEME = "hub:"


class Hub(Source):
    """`hub:NAME` or `hub:NAME:SPLIT`: the first image column and the first class label column."""

    form, kind = SCHEME + "NAME", "hub"

    @classmethod
    def matches(cls, spec: str) -> bool:
        return spec.startswith(SCHEME)

    @classmethod
    def open(cls, spec: str, options: OpenOptions) -> "Hub":
        return cls(spec)

    @classmethod
    def parts(cls, spec: str) -> tuple[str, str] | None:
        if spec.count(":") > 1:
            return None
        try:
            splits = optional("datasets", "hub").get_dataset_split_names(spec.removeprefix(SCHEME))
        except (OSError, ValueError) as e:
            raise DataError(f"{spec} cannot be loaded: {type(e).__name__}: {e}") from e
        by_part = {part_of(split): split for split in reversed(splits)}
        testing = by_part.get("val") or by_part.get("test")
        if "train" in by_part and testing:
            return f"{spec}:{by_part['train']}", f"{spec}:{testing}"
        raise DataError(
            f"{spec} has no split for training and one for validation or test (it has {', '.join(splits)}); "
            f"choose them with --data and --val {SCHEME}NAME:SPLIT"
        )

    def __init__(self, name: str):
        datasets = optional("datasets", "hub")
        path, _, split = name.removeprefix(SCHEME).partition(":")
        try:
            self.table = datasets.load_dataset(path, split=split or "train")
        except Exception as e:
            raise DataError(f"{name} cannot be loaded: {type(e).__name__}: {first_line(e)}") from e
        kinds = self.table.features
        self.column = next((k for k, v in kinds.items() if type(v).__name__ == "Image"), None)
        if self.column is None:
            raise DataError(f"{name} has no image column; its columns are {', '.join(kinds)}")
        label, *others = [k for k, v in kinds.items() if type(v).__name__ == "ClassLabel"] or [None]
        multiple = [k for k, v in kinds.items() if type(getattr(v, "feature", None)).__name__ == "ClassLabel"]
        if others:
            self.notes = (f"labels are the column {label} of {name}, not {', '.join(others)}",)
        elif multiple and label is None:
            self.why_unlabeled = MULTI_LABEL.format("an image", f"column {multiple[0]} of {name}")
            self.notes = no_labels(self.why_unlabeled)
        self.name = name
        self.classes = kinds[label].names if label else []
        self.labels = (
            np.array([-1 if v is None else v for v in self.table[label]], dtype=np.int64) if label else None
        )
        self.table = self.table.cast_column(self.column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> bytes:
        cell = self.table[index][self.column]
        if cell is None:
            raise FileNotFoundError(errno.ENOENT, "no image in this row")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def where(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.name} {len(self)} {self.table._fingerprint}".encode()).hexdigest()
