"""A set of real pictures with classes: `python -m benchmarks.clipart PNG_FOLDER OUT`.

PNG_FOLDER is the folder `usr/share/openclipart/png` of Debian's package openclipart-png (public domain;
`apt-get download openclipart-png && dpkg -x openclipart-png*.deb .`). The twelve largest of its top folders,
without those that are no subject, become the classes in OUT; every picture is taken once, by its content, and
pictures in two classes are left out. The files are hard links where the disk allows it.
"""

import argparse
import hashlib
import os
import shutil
from collections import Counter
from pathlib import Path

CLASSES = 12

NO_SUBJECT = {"special", "unsorted", "buttons", "logos"}
"Folders that are named by something else than what their pictures show."


def main() -> None:
    """Make the set and print the number of pictures of each class."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    contents: dict[str, list[Path]] = {}
    for path in sorted(options.pictures.rglob("*.png")):
        if path.is_file() and not path.is_symlink():
            contents.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), []).append(path)
    classes = [{path.relative_to(options.pictures).parts[0] for path in same} for same in contents.values()]
    unique = [
        (same[0], of.pop())
        for same, of in zip(contents.values(), classes, strict=True)
        if len(of) == 1 and not of & NO_SUBJECT
    ]
    largest = Counter(name for _, name in unique).most_common(CLASSES)
    names = dict(largest)
    for path, name in unique:
        if name in names:
            to = options.out / name / "-".join(path.relative_to(options.pictures / name).parts)
            to.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, to)
            except OSError:  # another disk
                shutil.copyfile(path, to)
    for name, count in largest:
        print(f"{name:20} {count:,}")
    files, taken = sum(map(len, contents.values())), sum(names.values())
    reasons = "copies, in two classes, or in other folders"
    print(f"{options.out}: {taken:,} pictures; left out {files - taken:,}: {reasons}")


if __name__ == "__main__":
    main()
