"""The memory and the cores that this process may use: of the machine, and of the control groups that contain
the process, as in a container."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("sys/fs/cgroup")
"Where control groups of version 2 are, and those of version 1 in a folder of each controller."

MEMORY = {2: ("memory.max", "memory.current"), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes")}
"Files of the limit of memory and of its usage, in bytes."


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that processes can still take."""
    available = re.search(r"MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text())
    free = [1024 * int(available[1])] if available else []
    for group, version in _groups(root, "memory"):
        with contextlib.suppress(OSError, ValueError):  # ValueError: the limit is "max"
            most, used = (int((group / name).read_text()) for name in MEMORY[version])
            statistics = (group / "memory.stat").read_text()
            # Cached files count as free.
            cached = re.findall(r"^(?:total_)?inactive_file (\d+)", statistics, re.MULTILINE)
            free.append(max(0, most - used + int(cached[-1] if cached else 0)))
    return min(free, default=0)


def cores(root: Path = Path("/")) -> int:
    """Cores, at least one; of a limit such as 1.5, two."""
    counts = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    for group, version in _groups(root, "cpu"):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        with contextlib.suppress(OSError, ValueError):  # ValueError: the limit is "max"
            quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
            if quota > 0 and period > 0:  # -1 is no limit
                counts.append(-(-quota // period))
    return min(counts)


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """The control groups of this process that may limit what the controller is for, the closest first, and
    their version. Some may not exist: inside of a container they may be named as outside of it."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                version, mount = (1, GROUPS / controller) if controllers else (2, GROUPS)
                group = Path(path.lstrip("/"))
                for folder in (group, *group.parents):
                    yield root / mount / folder, version
