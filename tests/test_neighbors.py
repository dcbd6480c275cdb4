"""How threads wait, by the load of other processes."""

import subprocess
import sys

import pytest

from rcmae.engine import neighbors
from rcmae.engine.neighbors import POLICY, Neighbors, crowded


@pytest.mark.parametrize(
    ("others", "given", "policy"),
    [(0.5, None, "passive"), (0.1, None, None), (None, None, None), (0.9, "active", "active")],
)
def test_threads_sleep_beside_busy_processes_unless_the_user_has_chosen(others, given, policy, monkeypatch):
    clock = iter([10.0, 12.0])  # two seconds
    load = iter([100.0, None if others is None else 100.0 + 2 * others])
    monkeypatch.setattr(neighbors.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(neighbors, "_others", lambda: next(load))
    monkeypatch.setenv(POLICY, given or "")
    if given is None:
        monkeypatch.delenv(POLICY)
    Neighbors().choose()
    assert neighbors.os.environ.get(POLICY) == policy


@pytest.mark.skipif(sys.platform != "linux", reason="the load of cores is read from /proc/stat")
def test_a_busy_process_counts_and_this_one_does_not(monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        before = neighbors._others()
        neighbors.time.sleep(1.0)
        after = neighbors._others()
        busy.kill()
    assert after > before + 0.3
    monkeypatch.setattr(neighbors.time, "process_time", lambda: 1e6)
    assert neighbors._others() < after - 1e5


def test_a_crowded_run_advises_to_start_it_again(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.delenv(POLICY, raising=False)
    assert "the 4 threads of this process had 2.0 cores" in crowded({"cores": 2.0, "data_wait": 0.0}, 0)
    assert not crowded({"cores": 2.0, "data_wait": 0.5}, 0), "it had no work for half of the time"
    assert not crowded({"cores": 3.5, "data_wait": 0.0}, 0)
    monkeypatch.setenv(POLICY, "passive")
    assert not crowded({"cores": 2.0, "data_wait": 0.0}, 0), "sleeping threads use less of their cores"
    monkeypatch.delenv(POLICY)
    assert "its own loader processes" in crowded({"cores": 2.0, "data_wait": 0.0}, 3)
