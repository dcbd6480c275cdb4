"""Several seeds of a small network in one: the experiments `benchmarks.long` and `benchmarks.one_gpu`.

In a step of a small network most of the time is overhead, on a CPU, or a GPU is idle. In `SideBySide` every
weight has a leading axis for the seed, and the images are in memory. A group of seeds is trained at once; a
finished group is a line of results/NAME.jsonl and is never repeated, an interrupted one begins again. The
initial weights, losses, schedules and groups of the optimizer are the package's.

1. Rates: every arm at each of the first rates, on the seeds for tuning. An arm whose best rate is the lowest
   or the highest one so far is also trained at the next one, if there is one.
2. Confirmation: every arm at its best rate on the other seeds.
"""

import argparse
import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import ROOT, markdown
from benchmarks.runs import NOT_PLANNED, Rates, Results, digits_of, family, gain_cell, make, packed, unpacked
from rcmae.config import Images, Probe, changed
from rcmae.data.sources import open_source
from rcmae.engine.console import Screen
from rcmae.engine.distributed import autocast, pick_device, pick_precision
from rcmae.engine.optim import adamw
from rcmae.engine.run import describe_machine, write_json
from rcmae.engine.schedules import Progress, warmup_cosine
from rcmae.engine.step import set_lr
from rcmae.methods.rcmae import RCMAE, RCMAERecipe
from rcmae.methods.recipes import load_recipe
from rcmae.methods.reconstruction_loss import squared_errors
from rcmae.models.autoencoder import AutoencoderNetwork, build
from rcmae.models.backbone import usual_statistics
from rcmae.models.patches import gather_tokens
from rcmae.tasks.interval import Correct, correction_note, difference, over_seeds, percents
from rcmae.tasks.probe import ProbeSet, probe_set

MAE = "MAE"


class Group(NamedTuple):
    """Seeds that are trained side by side."""

    arm: str
    decay: str
    "schedule of the learning rate after the warm-up: cosine or constant"
    rate: float
    first: int
    "the first seed"
    together: int
    "the number of seeds"
    steps: int

    @property
    def seeds(self) -> range:
        return range(self.first, self.first + self.together)


@dataclass(frozen=True)
class Experiment:
    """The plan of an experiment on the bundled digits."""

    name: str
    network: dict[str, Any]
    "changes to the bundled recipe"
    arms: dict[str, dict[str, Any]]
    """further changes; the student of the first one, MAE, has no teacher, and its teacher is MAE averaged for
    evaluation; of the others the teacher is evaluated"""
    seeds: range
    tuning_seeds: range
    rates: Rates
    steps: int
    tuning_steps: int
    side_by_side: int
    "seeds in a group"
    decays: tuple[str, ...] = ("cosine",)
    images: int = 16_384
    probe: Probe = field(default_factory=lambda: Probe(probes=1, probe_train=2000, probe_test=16_000))
    folder: str = "results"

    def trial(self, share: float) -> "Experiment":
        """A share of the steps and of the images, but enough to run; its results are in runs/."""

        def part(value: int, least: int) -> int:
            return max(least, round(share * value))

        p = self.probe
        return replace(
            self,
            network=self.network | {"batch_size": part(self.network["batch_size"], 4)},
            steps=part(self.steps, 20),
            tuning_steps=part(self.tuning_steps, 10),
            images=part(self.images, 256),
            probe=replace(p, probe_train=part(p.probe_train, 200), probe_test=part(p.probe_test, 500)),
            folder="runs",
        )

    @property
    def results(self) -> Results:
        """The finished groups."""
        return Results(ROOT / self.folder / f"{self.name}.jsonl")

    def recipe(self, group: Group) -> RCMAERecipe:
        """The recipe of a group. A cosine that ends where it begins is a constant learning rate."""
        result = changed(load_recipe("bundled"), base_lr=group.rate, probes=0, **self.network)
        end = group.rate * result.optim.batch_size / 256 if group.decay == "constant" else 0.0
        result = changed(result, min_lr=end, **self.arms[group.arm])
        assert isinstance(result, RCMAERecipe)
        return result

    def accuracies(self, arm: str, decay: str) -> dict[float, list[float]]:
        """Of the first phase, by rate: of MAE's student, otherwise of the teacher."""
        network, by_rate = "student" if arm == MAE else "teacher", dict[float, list[float]]()
        for line in self.results.lines():
            if (line["arm"], line["decay"], line["steps"]) == (arm, decay, self.tuning_steps):
                by_rate.setdefault(line["rate"], []).extend(x["accuracy"] for x in line[network])
        return by_rate

    def groups(self, arm: str, decay: str, rate: float, seeds: range, steps: int) -> Iterator[Group]:
        """These seeds in groups."""
        for first in seeds[:: self.side_by_side]:
            yield Group(arm, decay, rate, first, min(self.side_by_side, seeds.stop - first), steps)

    def tuning(self) -> Iterator[Group]:
        """The groups of the first phase that the rules request so far."""
        for arm in self.arms:
            for decay in self.decays:
                for rate in self.rates.requested(self.accuracies(arm, decay)):
                    yield from self.groups(arm, decay, rate, self.tuning_seeds, self.tuning_steps)

    def confirmation(self) -> Iterator[Group]:
        """The groups of the second phase, all arms of the first seeds before the next seeds."""
        groups = [
            self.groups(arm, decay, self.rates.best(self.accuracies(arm, decay)), self.seeds, self.steps)
            for arm in self.arms
            for decay in self.decays
        ]
        for together in zip(*groups, strict=True):
            yield from together


# --- training -----------------------------------------------------------------------------------------------


@functools.cache
def predictor(images: Images, network: AutoencoderNetwork, visible: int, compiled: bool) -> Any:
    """The predictions of several seeds: weights and buffers [s, ...], patches [s, b, n, p] and orders
    [s, b, n] to [s, b, m, p]. It is compiled once for all groups of a process."""
    model = build(images, network)  # its own weights are not used

    def predict(weights: dict[str, Tensor], patches: Tensor, order: Tensor) -> Tensor:
        return functional_call(model, weights, (patches, order, visible))

    return torch.compile(vmap(predict)) if compiled else vmap(predict)


class SideBySide:
    """RC-MAE on s seeds of a recipe: every weight has a leading axis [s, ...], and so has every batch. Each
    seed has the initial weights of an ordinary run with that seed."""

    def __init__(self, recipe: RCMAERecipe, seeds: range, device: torch.device, compiled: bool = False):
        statistics = usual_statistics(recipe.images)
        assert statistics is not None  # those of ImageNet
        methods = []
        for seed in seeds:
            torch.manual_seed(seed)
            methods.append(RCMAE(recipe, *statistics).to(device))
        self.recipe, self.seeds, self.method = recipe, seeds, methods[0]
        self.precision = pick_precision("auto", device)
        self.weights, self.buffers = stack_module_state([method.student for method in methods])
        self.trained = {name: p for name, p in self.weights.items() if p.requires_grad}
        self.teacher = {name: p.detach().clone() for name, p in self.weights.items()}
        groups = adamw(self.method.student, recipe.optim, lr=0.0).param_groups
        decayed = {id(p) for p in groups[0]["params"]}
        names = {name: id(p) in decayed for name, p in self.method.student.named_parameters()}
        for group, decays in zip(groups, (True, False), strict=True):
            group["params"] = [p for name, p in self.trained.items() if names[name] == decays]
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.predict = predictor(recipe.images, recipe.network, self.method.visible, compiled)
        # The fused kernel of a CPU cannot be used for several seeds at once.
        math = functools.partial(sdpa_kernel, SDPBackend.MATH)
        self.attention = math if device.type == "cpu" else contextlib.nullcontext

    def step(
        self, images: UInt8[Tensor, "s b c h w"], order: Int[Tensor, "s b n"], t: Progress
    ) -> dict[str, Tensor]:
        """One step of all seeds. Returns the losses, means over the seeds."""
        method, optim, (s, b) = self.method, self.recipe.optim, images.shape[:2]
        set_lr(self.optimizer, warmup_cosine(optim.base_lr * b / 256, optim.min_lr, optim.warmup, t))
        patches = method.normalize_and_patchify(images.flatten(0, 1))
        target = method.target(gather_tokens(patches, order.flatten(0, 1)[:, method.visible :]))
        stacked = patches.unflatten(0, (s, b))
        with autocast(images.device, self.precision), self.attention():
            prediction = self.predict(self.weights | self.buffers, stacked, order).flatten(0, 1)
            teacher = None
            if self.recipe.rcmae.gamma:
                with torch.no_grad():
                    teacher = self.predict(self.teacher | self.buffers, stacked, order).flatten(0, 1)
            losses = squared_errors(prediction, target, teacher, self.recipe.rcmae.gamma)
        (s * losses["loss"]).backward()  # the weights of a seed get the gradient of its mean loss
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        averages = [self.teacher[name] for name in self.trained]
        torch._foreach_lerp_(
            averages, [p.detach() for p in self.trained.values()], 1 - float(method.momentum(t))
        )
        return losses

    def probed(self, probes: ProbeSet, weights: dict[str, Tensor]) -> list[dict[str, Any]]:
        """The results of the linear probe, for each seed. Weights that are not finite have no accuracy."""
        results, device = [], next(iter(weights.values())).device
        for index in range(len(self.seeds)):
            state = {name: w[index].detach() for name, w in weights.items()}
            correct = np.zeros(len(probes.truth), dtype=bool)
            if all(w.isfinite().all() for w in state.values()):
                self.method.student.load_state_dict(state)
                correct = probes.backbone(self.method.backbone("student"), device, self.precision)["linear"]
            results.append(packed(correct))
        self.method.train()
        return results


def train(
    net: SideBySide, images: UInt8[Tensor, "n c h w"], steps: int, tick: Any = lambda done: None
) -> None:
    """Train all seeds, each in its own order of images. Arms with the same seeds have the same images and
    masks."""
    s, b, n = len(net.seeds), net.recipe.optim.batch_size, len(images)
    generator = torch.Generator(images.device).manual_seed(net.seeds[0])
    for step in range(steps):
        place = step % (n // b)
        if place == 0:
            epoch = torch.rand(s, n, generator=generator, device=images.device).argsort(1)
        masks = torch.rand(s, b, net.method.patches, generator=generator, device=images.device).argsort(2)
        net.step(images[epoch[:, place * b : (place + 1) * b]], masks, Progress(step, steps, n // b))
        tick(step + 1)


# --- the experiment -----------------------------------------------------------------------------------------


@functools.cache
def material(
    size: int, images: int, fitted: int, tested: int, device: torch.device
) -> tuple[UInt8[Tensor, "n c h w"], ProbeSet]:
    """The training images, on the device, and those of the probes: the same ones for all seeds."""
    source, recipe = open_source("bundled:digits", size=size), changed(load_recipe("bundled"), size=size)
    pixels = torch.from_numpy(np.stack([source.read(i) for i in range(images)]))  # [n, h, w, c]
    probe = Probe(probes=1, probe_train=fitted, probe_test=tested)
    probes = probe_set(source, replace(recipe, probe=probe))
    assert probes is not None, "the bundled set has labels"
    return pixels.permute(0, 3, 1, 2).contiguous().to(device), probes


def run(experiment: Experiment, name: str, compiled: bool, group: Group) -> None:
    """Train and evaluate a group on the device of that name, and append its line to the results."""
    if (device := pick_device(name)).type == "cpu":
        torch.set_num_threads(1)
    recipe, p = experiment.recipe(group), experiment.probe
    images, probes = material(recipe.images.size, experiment.images, p.probe_train, p.probe_test, device)
    net = SideBySide(recipe, group.seeds, device, compiled)
    confirming = group.steps == experiment.steps
    results = {"random": net.probed(probes, net.weights)} if group.arm == MAE and confirming else {}
    began = time.monotonic()
    what = (
        f"{group.arm}, {group.decay}, rate {group.rate:g}, {group.together} seeds from {group.first}: steps"
    )
    with Screen(True).progress(what, group.steps) as tick:
        train(net, images, group.steps, tick)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    seconds = {"seconds": round(time.monotonic() - began, 1)}
    if group.arm == MAE:
        results["student"] = net.probed(probes, net.weights)
    if group.arm != MAE or confirming:
        results["teacher"] = net.probed(probes, net.teacher)
    machine = describe_machine(device, net.precision)
    about = {key: machine[key] for key in ("cpu", "device", "precision")}
    experiment.results.append(group._asdict() | about | seconds | results)


AVERAGED, START = "MAE, averaged", "random initialization"

Runs = dict[tuple[str, str], dict[str, Any]]
"Of a seed, by arm and schedule of the learning rate: the line of the group, with the results of this seed."


def complete(experiment: Experiment) -> dict[int, Runs]:
    """The runs of confirmation, by seed, of the seeds that have all of them, on one kind of device and in one
    precision."""
    seeds: dict[int, Runs] = {}
    for line in experiment.results.lines():
        if line["steps"] == experiment.steps:
            for index, seed in enumerate(Group(*(line[name] for name in Group._fields)).seeds):
                results = {k: v[index] if isinstance(v, list) else v for k, v in line.items()}
                seeds.setdefault(seed, {})[line["arm"], line["decay"]] = results
    return {
        seed: runs
        for seed, runs in sorted(seeds.items())
        if len(runs) == len(experiment.arms) * len(experiment.decays)
        and len({(run["cpu"], run["device"], run["precision"]) for run in runs.values()}) == 1
    }


def analysis(experiment: Experiment) -> dict[str, Any]:
    """All numbers of the page. Without two complete seeds there are none."""
    seeds = complete(experiment)
    about: dict[str, Any] = {"seeds": [*seeds], "planned": len(experiment.seeds)}
    if len(seeds) < 2:
        return about
    teachers = [arm for arm in experiment.arms if arm != MAE]
    networks = {START: (MAE, "random"), MAE: (MAE, "student"), AVERAGED: (MAE, "teacher")}
    networks |= {arm: (arm, "teacher") for arm in teachers}
    lines = [line for runs in seeds.values() for line in runs.values()]

    def correct(name: str, decay: str) -> Correct:
        arm, network = networks[name]
        return [unpacked(runs[arm, decay][network]) for runs in seeds.values()]

    def gain(name: str, other: str, decay: str) -> Any:
        first, second = correct(name, decay), correct(other, decay)
        return difference(first, second, digits_of([0] * len(first), first))

    def part(decay: str) -> dict[str, Any]:
        return {
            "rates": {
                name: next(iter(seeds.values()))[arm, decay]["rate"] for name, (arm, _) in networks.items()
            },
            "accuracy": {name: over_seeds(percents(correct(name, decay))) for name in networks},
            "against": {
                other: family({arm: gain(arm, other, decay) for arm in teachers}) for other in (MAE, AVERAGED)
            },
        }

    return about | {
        "steps": experiment.steps,
        "batch": experiment.network["batch_size"],
        "images": lines[0]["teacher"]["images"],
        "machines": sorted({f"{line['device']} ({line['cpu']}), {line['precision']}" for line in lines}),
        "hours": sum(line["seconds"] for line in experiment.results.lines()) / 3600,
        "decays": {decay: part(decay) for decay in experiment.decays},
        "assay": family({decay: gain(MAE, START, decay) for decay in experiment.decays}),
        "averaging": family({decay: gain(AVERAGED, MAE, decay) for decay in experiment.decays}),
    }


def table(results: dict[str, Any]) -> str:
    """The results section of the page."""
    count = f"{len(results['seeds'])} of {results['planned']} seeds are complete"
    if len(results["seeds"]) < 2:
        return f"{count}, too few for any result."
    planned = len(results["seeds"]) == results["planned"]
    parts = [
        f"{count}, {results['steps']:,} steps of {results['batch']}; {'; '.join(results['machines'])}, "
        f"{results['hours']:.1f} hours of training in all. Accuracy of the linear probe on "
        f"{results['images']:,} images in percent, means with 95 % intervals over seeds; differences in "
        "points."
    ]
    parts += [] if planned else [NOT_PLANNED]
    for decay, part in results["decays"].items():
        others = (MAE, AVERAGED)
        rows = [
            [
                name,
                "" if name == START else f"{1000 * part['rates'][name]:g}e-3",
                "{:.1f} [{:.1f}, {:.1f}]".format(*accuracy),
                *(gain_cell(part["against"][other].get(name), planned) for other in others),
            ]
            for name, accuracy in part["accuracy"].items()
        ]
        head = [f"{decay} learning rate", "rate", "linear probe", *(f"against {other}" for other in others)]
        parts.append(markdown.table(head, rows, left=(0, 3, 4)))
        if planned and not results["assay"][decay]["verdict"].startswith("better"):
            parts.append("MAE is not better than random initialization, so these verdicts do not count.")
    parts.append(f"Each column of verdicts is a family. {correction_note(len(part['against'][MAE]))}")
    checks = {"assay": f"MAE against {START}", "averaging": f"{AVERAGED} against {MAE}"}
    parts.append(
        markdown.bullets(
            f"{text}, {decay} learning rate: {gain_cell(comparison, planned)}."
            for key, text in checks.items()
            for decay, comparison in results[key].items()
        )
    )
    return "\n\n".join(parts)


def main(experiment: Experiment, doc: str | None, device: str, jobs: int) -> int:
    """The command of an experiment: make all missing groups, analyze, and write the analysis to
    results/NAME.json."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=device)
    parser.add_argument("--jobs", type=int, default=jobs, help="groups at once, one thread each on a CPU")
    parser.add_argument("--share", type=float, help="try it with this share of the steps and images")
    parser.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    parser.add_argument("--analyze", action="store_true", help="make no runs")
    options = parser.parse_args()
    if options.share:
        experiment = experiment.trial(options.share)
    if not options.analyze:
        work = functools.partial(run, experiment, options.device, options.compile)
        for phase in (experiment.tuning, experiment.confirmation):
            while groups := experiment.results.missing(phase()):
                make(work, groups, options.jobs)
    results = analysis(experiment)
    print(table(results))
    write_json(ROOT / experiment.folder / f"{experiment.name}.json", results)
    return 0
