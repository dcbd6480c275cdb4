"""Data sets of the Hugging Face Hub."""

import errno
import hashlib
from pathlib import Path

import numpy as np

from ..errors import DataError, first_line, optional
from .base import OpenOptions, Source

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
        for test in ("validation", "val", "test"):
            if test in splits:
                return f"{spec}:train", f"{spec}:{test}"
        raise DataError(
            f"{spec} has no split named validation or test (it has {', '.join(splits)}); choose one with "
            f"--val {SCHEME}NAME:SPLIT"
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
        label = next((k for k, v in kinds.items() if type(v).__name__ == "ClassLabel"), None)
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
