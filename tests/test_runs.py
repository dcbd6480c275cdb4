"""Lists of jobs of benchmarks, which resume."""

import multiprocessing as mp
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from benchmarks.runs import Rates, Results, make, packed, unpacked


class Job(NamedTuple):
    """A job that writes a line, or fails."""

    folder: str
    rate: float
    seed: int


def run(job: Job) -> None:
    if job.seed < 0:
        raise ValueError("no such seed")
    Results(Path(job.folder) / "jobs.jsonl").append(job._asdict() | {"process": mp.current_process().name})


def test_finished_jobs_are_not_repeated(tmp_path):
    results, jobs = Results(tmp_path / "jobs.jsonl"), [Job(str(tmp_path), 3e-3, seed) for seed in range(4)]
    assert results.missing(jobs) == jobs and results.missing([]) == []
    for job in jobs[::2]:
        run(job)
    assert results.missing(iter(jobs)) == jobs[1::2]
    assert results.missing([jobs[0]._replace(rate=6e-3)]), "all fields of a job count"


def test_a_line_that_a_kill_has_cut_is_no_result(tmp_path):
    results, jobs = Results(tmp_path / "jobs.jsonl"), [Job(str(tmp_path), 3e-3, seed) for seed in range(2)]
    run(jobs[0])
    with results.path.open("a") as file:
        file.write('{"folder": "')
    assert results.missing(jobs) == jobs[1:]
    run(jobs[1])
    assert results.missing(jobs) == []


def test_jobs_run_side_by_side_and_end_at_the_first_error(tmp_path, capfd):
    results, jobs = Results(tmp_path / "jobs.jsonl"), [Job(str(tmp_path), 0.1, seed) for seed in range(20)]
    with pytest.raises(ValueError, match="no such seed"):
        make(run, [*jobs[:4], jobs[0]._replace(seed=-1), *jobs[4:]], processes=2)
    assert {0, 1, 2} <= {line["seed"] for line in results.lines()}
    assert "2 of 21 done" in capfd.readouterr().out
    assert len(results.lines()) < 8, "no job begins after an error"


@pytest.mark.parametrize("images", [1, 8, 13])
def test_correct_images_survive_packing(images):
    correct = np.random.default_rng(0).random(images) < 0.5
    result = packed(correct)
    assert (unpacked(result) == correct).all() and result["accuracy"] == 100 * correct.mean()


def test_rates_are_screened_and_bracketed():
    rates = Rates((2.0, 4.0, 8.0), (0.5, 1.0, 2.0, 4.0, 8.0, 16.0), seeds=4, screening=2)
    assert rates.requested({}) == {2.0: 2, 4.0: 2, 8.0: 2}
    screened = {2.0: [52.0, 50.0], 4.0: [50.0, 48.5], 8.0: [47.0, 47.0]}
    assert rates.requested(screened) == {2.0: 4, 4.0: 4, 8.0: 2}, "8 is 4 points below the best"
    done = screened | {2.0: [52.0, 50.0, 51.0, 51.0], 4.0: [50.0, 48.5, 60.0, 60.0]}
    assert rates.best(done) == 4.0
    assert rates.requested(done) == {2.0: 4, 4.0: 4, 8.0: 2}, "the best one has two neighbors"
    done[4.0] = [50.0] * 4
    assert rates.best(done) == 2.0 and rates.requested(done) == {2.0: 4, 4.0: 4, 8.0: 2, 1.0: 4}
    done[1.0] = [60.0] * 4
    assert rates.best(done) == 1.0 and rates.requested(done).keys() == {0.5, 1.0, 2.0, 4.0, 8.0}


RATES = Rates((3.0, 6.0), (1.5, 3.0, 6.0, 12.0), seeds=2)


@pytest.mark.parametrize(
    ("accuracies", "requested"),
    [
        ({}, [3, 6]),
        ({3: [50.0, 50], 6: [60.0]}, [3, 6]),  # interrupted: the best one is not known yet
        ({3: [50.0, 50], 6: [40.0, 40]}, [3, 6, 1.5]),
        ({3: [50.0, 50], 6: [60.0, 60]}, [3, 6, 12]),
        ({3: [50.0, 50], 6: [60.0, 60], 12: [99.0]}, [3, 6, 12]),
        ({3: [50.0, 50], 6: [60.0, 60], 12: [70.0, 70]}, [3, 6, 12]),  # there is none beyond
    ],
)
def test_rates_around_the_best_one_are_tried(accuracies, requested):
    assert [*RATES.requested(accuracies)] == requested


def test_the_best_rate_has_all_seeds():
    assert RATES.best({3: [50.0, 50], 6: [60.0], 12: [55.0, 57]}) == 12
