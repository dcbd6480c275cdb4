"""What does the teacher of RC-MAE revert, and does learning gain from that it depends on the images?
`python -m benchmarks.mechanism`.

docs/lab.md has the plan, which was committed before the first run. Every finished run is a line of
results/mechanism.jsonl and is never repeated.

1. RC-MAE on the seeds of `STUDIED`, and `rcmae lab gradients` on these runs: results/lab_gradients.json.
2. RC-MAE, MAE and, with what the first two and part 1 measured, the controls, on `SEEDS`:
   results/mechanism.json.

`--try` makes all of this with 8 steps and 2 seeds in a temporary folder.
"""

import argparse
import contextlib
import functools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import ROOT, markdown
from benchmarks.alarms import patched
from benchmarks.runs import NOT_PLANNED, Results, digits_of, machine, make, pretrain_quietly, probed, unpacked
from rcmae.config import Probe, Recipe, changed
from rcmae.data.sources import open_source
from rcmae.engine.checkpoint import checkpoints
from rcmae.engine.run import describe_machine, read_json, write_json
from rcmae.engine.schedules import Progress
from rcmae.lab import gradients
from rcmae.methods import METHODS
from rcmae.methods.rcmae import RCMAE
from rcmae.methods.recipes import load_recipe, with_method
from rcmae.tasks.interval import Difference, correction_note, difference, judged, over_seeds
from rcmae.tasks.probe import probe_set

MAE, RCMAE_ARM, PULL, BETA, RATE = "MAE", "RC-MAE", "ungated pull", "MAE, lower beta1", "MAE, lower rate"
CONTROLS = (PULL, BETA, RATE)
WITH_TEACHER = (RCMAE_ARM, PULL)
"Arms of which the teacher is evaluated; of the others, the student."

SEEDS, STUDIED, STEPS = range(8), range(5), 1000
PROBE = Probe(probes=1, probe_train=2000, probe_test=4000)
HELD_OUT = 1000
"Images of the probe's test on which the reconstruction error is measured, each with one mask."

EVERY = 20
"Steps between two measurements of the norm of the update."


class UngatedPull(RCMAE):
    """RC-MAE whose consistency gradient is replaced, tensor by tensor, by the weights of student minus
    teacher with its norm: a pull that depends on the images in nothing but its strength."""

    def forward(self, batch: Any, t: Progress) -> dict[str, Tensor]:
        c = self.compare(batch)
        self.record_comparison(c)
        consistency = c.mean_square(c.prediction - c.teacher_prediction)
        weights = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        norms = [g.norm() for g in torch.autograd.grad(consistency, [*weights.values()], retain_graph=True)]
        teacher = dict(self.teacher.model.named_parameters())
        pull = torch.zeros(())
        for norm, (name, weight) in zip(norms, weights.items(), strict=True):
            gap = weight.detach() - teacher[name]
            pull = pull + (weight * gap * (norm / gap.norm().clamp_min(1e-30))).sum()
        reconstruction, consistency = F.mse_loss(c.prediction, c.target), consistency.detach()
        return {
            # The value of RC-MAE's loss, with the gradient of `pull` in place of that of the consistency.
            "loss": reconstruction + c.gamma * (pull - pull.detach() + consistency),
            "reconstruction": reconstruction.detach(),
            "consistency": consistency,
            "teacher_reconstruction": c.mean_square(c.teacher_prediction - c.target),
        }


class Job(NamedTuple):
    """A run."""

    arm: str
    seed: int
    steps: int


class Study(NamedTuple):
    """Where runs and results are, and its size."""

    runs: Path
    results: Path
    seeds: Sequence[int] = SEEDS
    studied: Sequence[int] = STUDIED
    steps: int = STEPS
    blocks: int = gradients.GradientSettings.blocks

    @property
    def finished(self) -> Results:
        """The finished runs."""
        return Results(self.results / "mechanism.jsonl")

    def path(self, job: Job) -> Path:
        """The directory of a run."""
        return self.runs / f"{job.arm.replace(',', '').replace(' ', '-')}-{job.seed}-{job.steps}"

    def jobs(self, arms: Sequence[str], seeds: Sequence[int]) -> list[Job]:
        """Seed by seed."""
        return [Job(arm, seed, self.steps) for seed in seeds for arm in arms]

    def lines(self, arm: str) -> list[dict[str, Any]]:
        """The results of an arm by seed, of this length."""
        lines = [line for line in self.finished.lines() if (line["arm"], line["steps"]) == (arm, self.steps)]
        return sorted((line for line in lines if line["seed"] in self.seeds), key=lambda line: line["seed"])

    def settings(self, arm: str) -> dict[str, float]:
        """What the controls take from earlier runs: the beta1 as which the teacher acts on other images, and
        the rate times the ratio of the norms of RC-MAE's and MAE's updates."""
        if arm == BETA:
            return {"beta1": read_json(self.results / "lab_gradients.json")["beta1"][0]}
        if arm == RATE:
            norms = [np.mean([line["update"] for line in self.lines(a)]) for a in (RCMAE_ARM, MAE)]
            return {"rate_factor": float(norms[0] / norms[1])}
        return {}


def recipe_of(job: Job, beta1: float | None = None, rate_factor: float = 1.0) -> Recipe:
    """The bundled recipe with the changes of an arm. Probes on few images at every quarter make the run keep
    checkpoints there."""
    recipe = load_recipe("bundled")
    probes = {"probes": 4, "probe_train": 100, "probe_test": 100, "attentive": "never"}
    recipe = changed(recipe, seed=job.seed, steps=job.steps, **probes)
    if job.arm not in WITH_TEACHER:
        recipe = with_method(recipe, "mae")
    betas = (beta1 or recipe.optim.betas[0], recipe.optim.betas[1])
    return changed(recipe, betas=betas, base_lr=recipe.optim.base_lr * rate_factor)


def recording(norms: list[float]) -> Callable[[Any], Any]:
    """A wrapper of a run's `update` that appends the norm of every `EVERY`th one, over its learning rate."""

    def wrap(old: Any) -> Any:
        def update(run: Any, t: Progress) -> Tensor:
            if t.step % EVERY != 1:
                return old(run, t)
            weights = list(run.method.student.parameters())
            before = [p.detach().clone() for p in weights]
            applied = old(run, t)
            moves = torch.stack(
                torch._foreach_norm(torch._foreach_sub([p.detach() for p in weights], before))
            )
            norms.append(moves.norm().item() / run.optimizer.param_groups[0]["lr"])
            return applied

        return update

    return wrap


def run(study: Study, job: Job) -> None:
    """Train, evaluate, and append a line to the results. An unfinished run is made again, since the norms of
    its updates would not be complete."""
    torch.set_num_threads(1)
    path, settings = study.path(job), study.settings(job.arm)
    shutil.rmtree(path, ignore_errors=True)
    recipe, norms = recipe_of(job, **settings), list[float]()
    method = {"rcmae": UngatedPull} if job.arm == PULL else {}
    with mock.patch.dict(METHODS, method), patched("rcmae.pretraining:Pretraining.update", recording(norms)):
        pretrain_quietly(recipe, path, workers=0, keep=99)
    network = "teacher" if job.arm in WITH_TEACHER else "student"
    result = {
        "linear": probed(path, recipe, PROBE, [network])[f"{network} linear"],
        "reconstruction": reconstruction_error(path, recipe),
        "update": float(np.mean(norms)),
        "settings": settings,
    }
    study.finished.append(job._asdict() | machine(path) | result)
    if not (job.arm == RCMAE_ARM and job.seed in study.studied):
        shutil.rmtree(path)


def reconstruction_error(path: Path, recipe: Recipe) -> float:
    """That of the evaluated network on held-out images, the same masks for all runs, in float32."""
    about = read_json(path / "machine.json")
    method = METHODS[recipe.method](recipe, tuple(about["mean"]), tuple(about["std"]))  # type: ignore[call-arg]
    method.load_state_dict(load_file(checkpoints(path / "checkpoints")[0] / "model.safetensors"))
    source = open_source(recipe.data, size=recipe.images.size)
    held_out = probe_set(source, changed(recipe, seed=0, probe_train=100, probe_test=HELD_OUT))
    assert held_out is not None, "the bundled set has labels"
    batch = {"image": held_out.test, "order": torch.zeros(len(held_out.test), 1, dtype=torch.long)}
    masked = method.remask(batch, torch.Generator().manual_seed(0))
    key = "teacher_reconstruction" if method.teacher else "reconstruction"
    errors = []
    with torch.no_grad():
        for i in range(0, len(held_out.test), 250):
            losses = method({k: v[i : i + 250] for k, v in masked.items()}, Progress(0, 1, 1))
            errors.append(losses[key].item())
    return float(np.mean(errors))


# --- part 1 -------------------------------------------------------------------------------------------------


def study_gradients(study: Study) -> None:
    """`rcmae lab gradients` on the runs of part 1, unless that is done."""
    file = study.results / "lab_gradients.json"
    if file.exists():
        return
    paths = [str(study.path(job)) for job in study.jobs([RCMAE_ARM], study.studied)]
    setting = gradients.GradientSettings(device="cpu", blocks=study.blocks)
    result = gradients.run_gradients(paths, setting, print)
    for start in result["about"]["starts"]:
        start["run"] = Path(start["run"]).name
    gradients.write_gradients_page(result, study.runs / "lab")
    kept = {k: v for k, v in result.items() if k != "rows"}
    write_json(file, kept | {"machine": describe_machine(torch.device("cpu"), "fp32")})


def gradients_table(results: dict[str, Any]) -> str:
    """What c reverts on the same batch and on other images, and the conclusions."""

    def cell(interval: Sequence[float], form: str = "{:.3f} [{:.3f}, {:.3f}]") -> str:
        return form.format(*interval)

    rows = [
        [
            line["what"],
            *(cell(line[key]) for key in ("same", "other", "contrast")),
            cell([100 * v for v in line["fraction"]], "{:.0f} % [{:.0f}, {:.0f}]")
            if line["fraction"]
            else "",
        ]
        for line in results["targets"]
    ]
    about = results["about"]
    steps = sorted({start["step"] for start in about["starts"]})
    return markdown.table(
        ["reverted (cosine)", "same batch", "other images", "difference", "also on other images"],
        rows,
        f"{about['units']} {about['unit']}s, from their steps {', '.join(f'{step:,}' for step in steps)}; "
        f"{about['blocks']} blocks of steps after each, {about['batch_size']} images; means with 95 % t "
        f"intervals over {about['unit']}s.",
        markdown.bullets(text for _, text in results["findings"]),
    )


# --- part 2 -------------------------------------------------------------------------------------------------


def summary(study: Study) -> dict[str, Any]:
    """A row per arm and, of the seeds that all arms have, the verdicts."""
    arms = {arm: study.lines(arm) for arm in (MAE, RCMAE_ARM, *CONTROLS)}
    seeds = set.intersection(*({line["seed"] for line in lines} for lines in arms.values()))
    arms = {arm: [line for line in lines if line["seed"] in seeds] for arm, lines in arms.items()}
    rows = []
    for arm, lines in arms.items():
        means = {
            "linear": over_seeds([line["linear"]["accuracy"] for line in lines]),
            "reconstruction": over_seeds([line["reconstruction"] for line in lines]),
        }
        rows.append({"arm": arm, **means, "settings": lines[0]["settings"]})
    verdicts = []
    for reference, others in ((MAE, (RCMAE_ARM, *CONTROLS)), (RCMAE_ARM, CONTROLS)):
        pairs = [gains(arms[arm], arms[reference]) for arm in others]
        linear, lower = judged(pair[0] for pair in pairs), judged((pair[1] for pair in pairs), unit="%")
        verdicts += [
            f"{arm} against {reference}: linear probe {a}; reconstruction {b}"
            for arm, a, b in zip(others, linear, lower, strict=True)
        ]
    about = {"seeds": sorted(seeds), "planned": len(study.seeds), "steps": study.steps}
    return about | {"rows": rows, "verdicts": verdicts}


def gains(lines: list[dict[str, Any]], others: list[dict[str, Any]]) -> tuple[Difference, Difference]:
    """Paired by seed: the difference of the accuracies, and by how many percent the reconstruction error is
    lower. Each seed has its own test images of the same digits."""
    correct, correct_of_others = ([unpacked(line["linear"]) for line in arm] for arm in (lines, others))
    images = digits_of((line["seed"] for line in lines), correct)
    error, reference = (np.array([line["reconstruction"] for line in arm]) for arm in (lines, others))
    linear = difference(correct, correct_of_others, images)
    return linear, over_seeds(100 * (reference - error) / reference)


def table(results: dict[str, Any]) -> str:
    """Both endpoints by arm, and with all seeds the verdicts."""
    planned = len(results["seeds"]) == results["planned"]
    rows = [
        [
            row["arm"] + "".join(f" ({v:.3f})" for v in row["settings"].values()),
            "{:.1f} [{:.1f}, {:.1f}]".format(*row["linear"]),
            "{:.4f} [{:.4f}, {:.4f}]".format(*row["reconstruction"]),
        ]
        for row in results["rows"]
    ]
    return markdown.table(
        ["arm", "linear probe", "reconstruction error"],
        rows,
        f"{len(results['seeds'])} paired seeds, {results['steps']:,} steps; means with 95 % t intervals over "
        "them. The comparisons with MAE are a family for each endpoint, and those with RC-MAE. "
        f"{correction_note(None)}",
        markdown.bullets(f"{text}." for text in results["verdicts"]) if planned else NOT_PLANNED,
    )


# --- both ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def study_of(trial: bool) -> Iterator[Study]:
    """The study, or a small one in a temporary folder."""
    if not trial:
        yield Study(ROOT / "runs" / "mechanism", ROOT / "results")
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Study(Path(folder) / "runs", Path(folder), range(2), range(2), 8, 2)


def main() -> int:
    """Make what is missing, then write and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=int, choices=(1, 2), help="only this part [default: both]")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--try", action="store_true", dest="trial", help="8 steps, 2 seeds, nothing kept")
    options = parser.parse_args()
    with study_of(options.trial) as study:
        parts = (options.part,) if options.part else (1, 2)
        if 1 in parts:
            make(
                functools.partial(run, study),
                study.finished.missing(study.jobs([RCMAE_ARM], study.studied)),
                options.jobs,
            )
            study_gradients(study)
        if 2 in parts:
            for arms in ((MAE, RCMAE_ARM), CONTROLS):
                make(
                    functools.partial(run, study),
                    study.finished.missing(study.jobs(arms, study.seeds)),
                    options.jobs,
                )
            results = summary(study)
            write_json(study.results / "mechanism.json", results)
            print(*results["verdicts"], sep="\n")
        if options.trial:
            print(gradients_table(json.loads((study.results / "lab_gradients.json").read_text())))
            print(table(json.loads((study.results / "mechanism.json").read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
