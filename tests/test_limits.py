"""What a process may use, where control groups limit it."""

import os

import pytest
import torch

from rcmae.data import loader
from rcmae.engine import distributed, limits
from tests.mutations import catches


def system(root, lines: str, files: dict[str, object]):
    """A machine of 1,024,000 free bytes whose process is in the control groups of `lines`, with `files`."""
    contents = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 1000 kB\n", "proc/self/cgroup": lines}
    contents |= {f"sys/fs/cgroup/{name}": f"{content}\n" for name, content in files.items()}
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def memory(group: str, limit: object, used: int, version: int = 2) -> dict[str, object]:
    """The files of a group; 1000 bytes of those used are of cached files that are not in use."""
    names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    cached = f"active_file 77\ninactive_file {1000 if version == 2 else 1}\n"
    cached += "total_inactive_file 1000" if version == 1 else ""
    values = {**dict(zip(names, (limit, used), strict=True)), "stat": cached}
    return {f"{group}memory.{name}": value for name, value in values.items()}


@catches(
    "only the group itself is looked at",
    "rcmae.engine.limits:_groups",
    lambda old: lambda root, controller: list(old(root, controller))[:1],
    case="parent",
)
@catches(
    "groups of version 1 are not looked at",
    "rcmae.engine.limits:_groups",
    lambda old: lambda *a: (group for group in old(*a) if group[1] == 2),
    case="version 1",
)
@pytest.mark.parametrize(
    ("line", "files", "free"),
    [
        pytest.param("0::/job/step", memory("job/", 9000, 4000), 6000, id="parent"),
        pytest.param("0::/job", memory("", 9000, 4000) | memory("job/", 7000, 3000), 5000, id="smallest"),
        pytest.param("0::/", memory("", "max", 3000), 1_024_000, id="no limit"),
        pytest.param("0::/job", memory("job/", 3000, 5000), 0, id="above the limit"),
        pytest.param("0::/job", {}, 1_024_000, id="no files"),
        pytest.param("5:memory:/job", memory("memory/job/", 8000, 1000, 1), 8000, id="version 1"),
        pytest.param("5:memory:/outside/id", memory("memory/", 8000, 1000, 1), 8000, id="container"),
        pytest.param("5:cpuset:/job", memory("memory/job/", 8000, 1000, 1), 1_024_000, id="no controller"),
    ],
)
def test_free_memory_is_that_of_the_closest_limit(line, files, free, tmp_path):
    assert limits.free_memory(system(tmp_path, f"4:cpu:/job\n{line}\n", files)) == free


def test_free_memory_of_this_machine():
    assert 2**20 < limits.free_memory() < 2**50


@catches(
    "one core is kept back",
    "rcmae.engine.limits:cores",
    lambda old: lambda root: old(root) - 1,
    case="part of a core",
)
@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        pytest.param("0::/job", {"job/cpu.max": "400000 100000"}, 4, id="version 2"),
        pytest.param("0::/job", {"job/cpu.max": "max 100000", "cpu.max": "250000 100000"}, 3, id="parent"),
        pytest.param("0::/job", {"job/cpu.max": "1000 100000"}, 1, id="part of a core"),
        pytest.param("0::/job", {"job/cpu.max": "max 100000"}, 64, id="no limit"),
        pytest.param("0::/job", {"job/cpu.max": "9900000 100000"}, 64, id="above the machine"),
        pytest.param("0::/job", {"job/memory.max": "100"}, 64, id="no controller"),
        pytest.param(
            "3:cpu,cpuacct:/outside/id",
            {"cpu/cpu.cfs_quota_us": 200000, "cpu/cpu.cfs_period_us": 50000},
            4,
            id="version 1",
        ),
        pytest.param(
            "3:cpu:/job",
            {"cpu/job/cpu.cfs_quota_us": -1, "cpu/job/cpu.cfs_period_us": 100000},
            64,
            id="version 1, no limit",
        ),
        pytest.param(
            "3:cpuacct:/job",
            {"cpu/job/cpu.cfs_quota_us": 200000, "cpu/job/cpu.cfs_period_us": 100000},
            64,
            id="another controller",
        ),
    ],
)
def test_cores_are_those_of_the_smallest_limit(line, files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    assert limits.cores(system(tmp_path, line + "\n", files)) == expected


@catches("limits are ignored", "rcmae.data.loader:cores", lambda old: lambda: 64)
def test_cores_are_divided_among_ranks(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    monkeypatch.setattr(limits, "_groups", lambda *a: iter(()))
    for ranks, expected in ((1, 4), (2, 2), (3, 1), (9, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert loader.usable_cores() == expected


@pytest.mark.parametrize(("variables", "threads"), [({}, 3), ({"OMP_NUM_THREADS": "8"}, 8)])
def test_torch_uses_no_more_threads_than_a_control_group_allows(monkeypatch, variables, threads):
    used = [8]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "cores", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    with distributed.process_group(torch.device("cpu")):
        assert used[-1] == threads
