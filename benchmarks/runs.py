"""Pre-training runs that benchmarks make on one thread each, and lists of jobs that resume.

A job is a NamedTuple that says all about a piece of work, such as arm, seed and length. A finished one is a
line of results/NAME.jsonl, its fields and what was measured, and is never repeated:

    results = Results(ROOT / "results" / "NAME.jsonl")
    make(run, results.missing(jobs), processes=2)  # `run` takes a job and ends with results.append
"""

import base64
import contextlib
import fcntl
import io
import itertools
import json
import multiprocessing as mp
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from safetensors.numpy import load_file

import rcmae.pretraining as pretraining
from benchmarks import markdown
from benchmarks.alarms import patched
from rcmae.config import Probe, Recipe, RuntimeConfig
from rcmae.data.digits import glyphs_of
from rcmae.data.sources import open_source
from rcmae.engine.console import clock
from rcmae.engine.run import read_json
from rcmae.interop.load import load
from rcmae.tasks.evaluate import evaluate
from rcmae.tasks.evaluation.base import EvaluationOptions
from rcmae.tasks.evaluation.finetune import FineTune
from rcmae.tasks.interval import Correct, Difference, judged
from rcmae.tasks.probe import ProbeSet, probe_set

Job = TypeVar("Job", bound=tuple)
"A NamedTuple."


# --- lists of jobs ------------------------------------------------------------------------------------------


class Results(NamedTuple):
    """The finished jobs of a list, one a line."""

    path: Path

    def lines(self) -> list[dict[str, Any]]:
        """All of them."""
        content = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        return [json.loads(line) for line in content[: content.rfind("\n") + 1].splitlines()]

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """The jobs without a line."""
        jobs = list(jobs)
        names: Sequence[str] = jobs[0]._fields if jobs else ()  # type: ignore[attr-defined]  # a NamedTuple
        done = {tuple(line[name] for name in names) for line in self.lines()}
        return [job for job in jobs if tuple(job) not in done]

    def append(self, result: dict[str, Any]) -> None:
        """Add a line, one process at a time, and print it without the single images."""
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # a kill may have cut the last line
            file.write(json.dumps(result).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        print(json.dumps({key: _short(value) for key, value in result.items()}), flush=True)


def _short(value: Any) -> Any:
    """A value of a line, with the accuracy alone of what `packed` returns."""
    if isinstance(value, list):
        return [_short(each) for each in value]
    return f"{value['accuracy']:.1f} %" if isinstance(value, dict) and "accuracy" in value else value


def make(run: Callable[[Job], None], jobs: Sequence[Job], processes: int) -> None:
    """Do the jobs, so many at once. After the first error, or an interruption, none is begun."""
    began, left, finished = time.monotonic(), iter(jobs), 0
    with ProcessPoolExecutor(processes, mp.get_context("spawn")) as pool:
        running = {pool.submit(run, job) for job in itertools.islice(left, processes)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for job in done:
                job.result()
            running |= {pool.submit(run, job) for job in itertools.islice(left, len(done))}
            finished += len(done)
            seconds = (time.monotonic() - began) / finished * (len(jobs) - finished)
            print(f"{finished:,} of {len(jobs):,} done, about {clock(seconds)} left", flush=True)


def packed(correct: Bool[np.ndarray, " m"]) -> dict[str, Any]:
    """The accuracy in percent, and the bits of the images, which the analysis of shared images needs."""
    bits = base64.b64encode(np.packbits(correct).tobytes()).decode()
    return {"accuracy": 100 * float(correct.mean()), "images": len(correct), "correct": bits}


def unpacked(result: dict[str, Any]) -> Bool[np.ndarray, " m"]:
    """Which images were classified correctly, from `packed`."""
    bits = np.frombuffer(base64.b64decode(result["correct"]), np.uint8)
    return np.unpackbits(bits, count=result["images"]).astype(bool)


HOPELESS = 3.0
"Points of accuracy."


class Rates(NamedTuple):
    """Learning rates of which an arm takes the one with the best mean over the seeds of its tuning."""

    first: tuple[float, ...]
    further: tuple[float, ...]
    "all in order: the neighbors of the best one are tried too"
    seeds: int
    screening: int = 0
    """seeds after which a rate that is more than `HOPELESS` points below the best one is dropped; 0: none is
    dropped"""

    def best(self, accuracies: Mapping[float, Sequence[float]]) -> float:
        """The best of the rates that have an accuracy for each seed."""
        done = [rate for rate in self.further if len(accuracies.get(rate, ())) == self.seeds]
        return max(done, key=lambda rate: np.mean(accuracies[rate]))

    def requested(self, accuracies: Mapping[float, Sequence[float]]) -> dict[float, int]:
        """The rates to try, with their number of seeds, after these accuracies by rate, of seeds in order."""
        first = self.screening or self.seeds
        rates = dict.fromkeys(self.first, first)
        if any(len(accuracies.get(rate, ())) < first for rate in rates):
            return rates
        means = {rate: np.mean(accuracies[rate][:first]) for rate in rates}
        rates |= {r: self.seeds for r in rates if means[r] >= max(means.values()) - HOPELESS}
        if any(len(accuracies[rate]) < count for rate, count in rates.items()):
            return rates
        place = self.further.index(self.best(accuracies))
        near = self.further[max(0, place - 1) : place + 2]
        return rates | {rate: self.seeds for rate in near if rate not in rates}


# --- analysis -----------------------------------------------------------------------------------------------


def family(gains: Mapping[str, Difference]) -> dict[str, dict[str, Any]]:
    """The differences and verdicts of a family of comparisons, by name."""
    verdicts = judged(gains.values())
    return {
        name: {"gain": gain, "verdict": str(verdict)}
        for (name, gain), verdict in zip(gains.items(), verdicts, strict=True)
    }


def gain_cell(result: dict[str, Any] | None, planned: bool) -> str:
    """A comparison of a `family` in a table: the verdict if the analysis is the planned one, with all seeds,
    otherwise the numbers."""
    if result is None:
        return ""
    return str(result["verdict"]) if planned else markdown.signed(result["gain"])


NOT_PLANNED = "**This is not the planned analysis, which has all seeds.**"


def digits_of(seeds: Iterable[int], correct: Correct) -> list[Int[np.ndarray, " m"]]:
    """The handwritten digit in each of the bundled test images of these seeds, for `difference`: the digits
    are the samples, since drawings of one are alike."""
    return [glyphs_of(seed, "test", len(c)) for seed, c in zip(seeds, correct, strict=True)]


# --- runs ---------------------------------------------------------------------------------------------------


def pretrain_quietly(recipe: Recipe, out: Path, **options: Any) -> None:
    """Make or resume a run on one thread of the CPU, without output and without reports, which would cost a
    fifth of a short one. `options`: further fields of RuntimeConfig."""
    with (
        patched("rcmae.pretraining:Pretraining.report", lambda old: lambda run, stopping=False: None),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        pretraining.pretrain(recipe, RuntimeConfig(out=out, device="cpu", threads=1, **options))


def machine(run: Path) -> dict[str, Any]:
    """What made a run: processor, precision, commit and recipe."""
    about = read_json(run / "machine.json")
    return {key: about[key] for key in ("cpu", "precision", "commit", "recipe_hash")}


RANDOM = "random"
"Beside student and teacher: the encoder of a run, randomly initialized."


def _named(run: Path, network: str) -> tuple[str, Any]:
    """The name and the network of a backbone, for `load` and `evaluate`."""
    return (f"scratch:{run}", "teacher") if network == RANDOM else (str(run), network)


def probed(run: Path, recipe: Recipe, probe: Probe, networks: Iterable[str]) -> dict[str, Any]:
    """The results of the linear probe on these networks of a finished run, in the way a run is probed during
    training."""
    probes = probe_set(open_source(recipe.data, size=recipe.images.size), replace(recipe, probe=probe))
    assert probes is not None, f"{recipe.data} has labels"
    return linear(run, probes, networks, recipe.seed)


def linear(run: Path, probes: ProbeSet, networks: Iterable[str], seed: int) -> dict[str, Any]:
    """The results of the linear probe on these networks of a finished run."""
    results = {}
    for network in networks:
        name, which = _named(run, network)
        backbone = load(name, which, seed=seed)
        correct = probes.backbone(backbone, torch.device("cpu"), machine(run)["precision"])
        results[f"{network} linear"] = packed(correct["linear"])
    return results


def fine_tuned(
    run: Path, network: str, data: str, labels: float, seed: int, settings: tuple[str, ...] = ()
) -> Bool[np.ndarray, " m"]:
    """Which test images are classified correctly after fine-tuning on so many percent of the labels."""
    (name, which), out = _named(run, network), run / "finetune" / f"{network}-{labels:g}"
    options = EvaluationOptions(
        data=data, labels=labels, seed=seed, which=which, device="cpu", workers=0, out=out
    )
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate(name, FineTune(settings=settings), options)
    (file,) = out.glob("*.safetensors")
    return load_file(file)["correct"].astype(bool)
