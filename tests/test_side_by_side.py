"""Several seeds in one network, and an experiment of such groups."""

from dataclasses import replace

import pytest
import torch

from benchmarks import side_by_side
from benchmarks.long import LONG
from benchmarks.one_gpu import ONE_GPU
from benchmarks.runs import Rates
from rcmae.config import Probe, changed
from rcmae.engine.optim import adamw
from rcmae.engine.schedules import Progress, warmup_cosine
from rcmae.engine.step import conditional_step, set_lr
from rcmae.methods.rcmae import RCMAE
from rcmae.models.backbone import IMAGENET

CPU = torch.device("cpu")
TINY = {"width": 16, "heads": 2, "depth": 1, "decoder_width": 8, "decoder_heads": 1, "batch_size": 4}
GROUP = side_by_side.Group("RC-MAE 7", "cosine", 12e-3, first=3, together=2, steps=6)


@pytest.mark.parametrize("gamma", [1.0, 0.0])
def test_each_seed_is_trained_as_in_an_ordinary_run(gamma):
    """Same initial weights, losses, learning rates, weight decay and teachers, on the same batches."""
    recipe = changed(replace(LONG, network=LONG.network | TINY).recipe(GROUP), gamma=gamma)
    net = side_by_side.SideBySide(recipe, GROUP.seeds, CPU)
    net.precision = "fp32"
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    all_orders = [torch.rand(2, 4, 16, generator=generator).argsort(2) for _ in range(GROUP.steps)]
    for step, orders in enumerate(all_orders):
        net.step(images, orders, Progress(step, GROUP.steps, 2))
    for index, seed in enumerate(GROUP.seeds):
        torch.manual_seed(seed)
        method = RCMAE(recipe, *IMAGENET)
        optimizer = adamw(method.student, recipe.optim, lr=0.0)
        for step, orders in enumerate(all_orders):
            t = Progress(step, GROUP.steps, 2)
            peak = recipe.optim.base_lr * recipe.optim.batch_size / 256
            set_lr(optimizer, warmup_cosine(peak, recipe.optim.min_lr, recipe.optim.warmup, t))
            method({"image": images[index], "order": orders[index]}, t)["loss"].backward()
            conditional_step(optimizer, torch.ones(()))
            method.after_step(t, torch.ones(()))
        for name, p in method.student.named_parameters():
            if p.requires_grad and not name.endswith(
                "qkv.bias"
            ):  # those of keys have no gradient but rounding
                moment = net.optimizer.state[net.trained[name]]["exp_avg"][index]
                expected = optimizer.state[p]["exp_avg"]
                assert (moment - expected).norm() <= 1e-2 * expected.norm() + 1e-7, name
        for weights, model in ((net.weights, method.student), (net.teacher, method.teacher.model)):
            for name, p in model.named_parameters():
                if not name.endswith("qkv.bias"):
                    torch.testing.assert_close(
                        weights[name][index].detach(), p.detach(), rtol=1e-4, atol=1e-5
                    )


@pytest.mark.parametrize("decay", LONG.decays)
def test_the_learning_rate_of_a_group(decay):
    optim = LONG.recipe(GROUP._replace(decay=decay)).optim
    peak = optim.base_lr * optim.batch_size / 256
    last = warmup_cosine(peak, optim.min_lr, optim.warmup, Progress(9999, 10_000, 10))
    assert last == pytest.approx(peak if decay == "constant" else 0.0, abs=1e-6 * peak)


@pytest.mark.parametrize("experiment", [LONG, ONE_GPU])
def test_seeds_of_the_plan_are_new_and_all_in_groups(experiment):
    assert not {*experiment.seeds} & {*experiment.tuning_seeds}
    assert experiment.rates.seeds == len(experiment.tuning_seeds)
    groups = experiment.groups("MAE", "cosine", 1.0, experiment.seeds, 10)
    assert [seed for group in groups for seed in group.seeds] == [*experiment.seeds]
    for arm in experiment.arms:
        RCMAE.validate(experiment.recipe(GROUP._replace(arm=arm)))


def test_a_tiny_experiment(monkeypatch, tmp_path):
    """All phases, on a few images; it resumes, and the page names its seeds."""
    monkeypatch.setattr(side_by_side, "ROOT", tmp_path)
    (tmp_path / "runs").mkdir()
    tiny = replace(
        LONG,
        network=LONG.network | TINY,
        arms={name: LONG.arms[name] for name in ("MAE", "RC-MAE 7", "RC-MAE cosine")},
        seeds=range(31, 34),
        tuning_seeds=range(2),
        rates=Rates((3e-3,), (3e-3,), seeds=2),
        steps=6,
        tuning_steps=3,
        side_by_side=2,
        images=16,
        probe=Probe(probes=1, probe_train=50, probe_test=60),
        folder="runs",
    )
    assert side_by_side.analysis(tiny) == {"seeds": [], "planned": 3}
    for phase, count in ((tiny.tuning, 6), (tiny.confirmation, 12)):
        groups = tiny.results.missing(phase())
        assert len(groups) == count
        for group in groups:
            side_by_side.run(tiny, "cpu", False, group)
        assert not tiny.results.missing(phase())
    results = side_by_side.analysis(tiny)
    assert results["seeds"] == [31, 32, 33] and results["images"] == 60
    text = side_by_side.table(results)
    assert "3 of 3 seeds are complete" in text and text.count("RC-MAE 7") == 2
    lines = tiny.results.lines()
    (tiny.results.path).write_text("")
    for line in lines[:-1]:  # the third seed lacks a run
        tiny.results.append(line)
    assert side_by_side.analysis(tiny)["seeds"] == [31, 32]
