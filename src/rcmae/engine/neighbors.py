"""How the threads of OpenMP wait for one another, chosen at the start by whether other processes are busy.

By default they spin until all have finished their part of an operation. This is fastest on idle cores. As
soon as another process needs one of the cores, a thread spins for as long as its partner waits for a core,
and both make hardly any progress; sleeping threads (OMP_WAIT_POLICY=passive) then are twice as fast or more
(`benchmarks.busy`). OpenMP reads the policy when torch is imported. The results are the same, bit for bit.
"""

import os
import time
from contextlib import suppress
from pathlib import Path

POLICY = "OMP_WAIT_POLICY"

BUSY = 0.3
"Cores that other processes keep busy from which on threads sleep."

SHARE = 0.7
"Fraction of its threads' cores below which a process has been disturbed; spinning threads use nearly all."


class Neighbors:
    """The load of other processes, from the creation of this object to `choose`."""

    def __init__(self) -> None:
        self.began, self.before = time.monotonic(), _others()

    def choose(self) -> None:
        """Let threads sleep if other processes are busy, unless the user has set a policy. Before torch is
        imported."""
        seconds, now = time.monotonic() - self.began, _others()
        if self.before is not None and now is not None and now - self.before > BUSY * seconds:
            os.environ.setdefault(POLICY, "passive")


def _others() -> float | None:
    """Seconds that other processes have used of the cores that this process may use; None if unknown."""
    with suppress(OSError, ValueError, AttributeError):
        usable = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        rows = [line.split() for line in Path("/proc/stat").read_text(encoding="ascii").splitlines()]
        # user, nice, system; idle and iowait, irq and softirq and steal follow
        used = sum(int(ticks) for name, *row in rows if name in usable for ticks in row[:3])
        return used / os.sysconf("SC_CLK_TCK") - time.process_time()
    return None


def waiting() -> str:
    """How threads wait, in words."""
    return "sleeping" if os.environ.get(POLICY, "").lower() == "passive" else "spinning"


def crowded(line: dict[str, float], workers: int) -> str:
    """The advice to a run whose spinning threads have had less than `SHARE` of their cores according to a
    log line; empty otherwise. `workers` is the number of its loader processes."""
    import torch  # after `choose`

    threads, cores = torch.get_num_threads(), line["cores"]
    if threads == 1 or waiting() == "sleeping" or cores > SHARE * threads * (1 - line["data_wait"]):
        return ""
    text = f"the {threads} threads of this process had {cores:.1f} cores, since "
    if workers:
        text += "other processes or its own loader processes are busy, and spinning threads are slow then. "
        advice = f"start it again with {POLICY}=passive in the environment: it resumes exactly"
    else:
        text += "other processes are busy, and spinning threads are slow then. "
        advice = "run the same command again: it resumes exactly, and lets threads sleep if others are busy "
        advice += "at its start"
    return f"{text}Stop this run and {advice}"
