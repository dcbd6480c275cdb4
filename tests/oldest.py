"""Print the lowest versions that pyproject.toml allows, in pip's format, for `make oldest`."""

import re
import tomllib
from pathlib import Path


def lowest(requirements: list[str]) -> list[str]:
    """`name>=1.2,<2` as `name==1.2`. Raises ValueError if no lowest version is given."""
    if odd := [text for text in requirements if not re.match(r"[\w-]+>=[\d.]+", text)]:
        raise ValueError(f"{odd[0]}: name the lowest version that works, as {odd[0]}>=1.2")
    return [re.sub(r">=([\d.]+).*", r"==\1", text) for text in requirements]


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    print("\n".join(lowest(project["dependencies"] + project["optional-dependencies"]["dev"])))
