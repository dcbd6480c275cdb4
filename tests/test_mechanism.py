"""The controls of what a teacher's dependence on the images is worth: the linear model and the benchmark."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import mechanism
from benchmarks.mechanism import Job, Study, UngatedPull
from benchmarks.runs import packed
from rcmae.engine.schedules import Progress
from rcmae.lab.gradients import analyzed
from rcmae.lab.linear_controls import ControlSettings, Problem, run_controls, trained
from tests.conftest import batch_for, small
from tests.mutations import catches
from tests.test_gradients import about, rows_of

TIME = Progress(1, 10, 5)


def test_the_ungated_pull_has_the_norm_of_the_consistency_gradient():
    """And the direction of student minus teacher, tensor by tensor; the loss has the value of RC-MAE's."""
    torch.manual_seed(0)
    method = UngatedPull(small(gamma=0.7), (0.5,) * 3, (0.25,) * 3)
    with torch.no_grad():
        for p in method.student.parameters():
            p += 0.01 * torch.randn_like(p)
    batch = batch_for(method)
    weights = {n: p for n, p in method.student.named_parameters() if p.requires_grad}
    c = method.compare(batch)
    losses = F.mse_loss(c.prediction, c.target), F.mse_loss(c.prediction, c.teacher_prediction)
    r, g = (torch.autograd.grad(loss, [*weights.values()], retain_graph=True) for loss in losses)
    output = method(batch, TIME)
    assert output["loss"].item() == pytest.approx((losses[0] + 0.7 * losses[1]).item(), rel=1e-5)
    output["loss"].backward()
    teacher = dict(method.teacher.model.named_parameters())
    for (name, p), first, gated in zip(weights.items(), r, g, strict=True):
        pull, gap = p.grad - first, p.detach() - teacher[name]
        assert pull.norm() == pytest.approx(0.7 * gated.norm().item(), rel=1e-3, abs=1e-7), name
        assert torch.allclose(pull, gap * (0.7 * gated.norm() / gap.norm()), rtol=1e-2, atol=1e-6), name


def test_without_a_gap_there_is_no_pull():
    method = UngatedPull(small(), (0.5,) * 3, (0.25,) * 3)
    method(batch_for(method), TIME)["loss"].backward()
    assert all(p.grad.isfinite().all() for p in method.student.parameters() if p.requires_grad)


def test_every_arm_differs_from_the_bundled_recipe_as_planned():
    first, *_ = (mechanism.recipe_of(Job(arm, 3, 100)) for arm in (mechanism.RCMAE_ARM,))
    assert (first.method, first.seed, first.steps) == ("rcmae", 3, 100)
    lowered = mechanism.recipe_of(Job(mechanism.BETA, 3, 100), beta1=0.8)
    assert lowered.method == "mae" and lowered.optim.betas == (0.8, first.optim.betas[1])
    slower = mechanism.recipe_of(Job(mechanism.RATE, 3, 100), rate_factor=0.5)
    assert slower.optim.base_lr == first.optim.base_lr / 2
    assert dataclasses.replace(slower.optim, base_lr=first.optim.base_lr) == first.optim


def test_the_verdicts_are_from_the_seeds_that_all_arms_have(tmp_path):
    study = Study(tmp_path / "runs", tmp_path, range(4), range(2), 10)
    accuracy = {mechanism.MAE: 40.0, mechanism.RCMAE_ARM: 45.0, mechanism.PULL: 48.2}
    for job in study.jobs([mechanism.MAE, mechanism.RCMAE_ARM, *mechanism.CONTROLS], range(4)):
        if (job.arm, job.seed) == (mechanism.RATE, 3):
            continue
        percent = accuracy.get(job.arm, 42.0) + 0.1 * (job.seed % 2)
        linear = packed(np.random.default_rng(job.seed).permutation(4000) < 40 * percent)
        error = 0.5 if job.arm == mechanism.MAE else 0.4 + 0.001 * job.seed
        study.finished.append(
            job._asdict() | {"linear": linear, "reconstruction": error, "update": 2.0, "settings": {}}
        )
    results = mechanism.summary(study)
    assert results["seeds"] == [0, 1, 2]
    texts = results["verdicts"]
    assert len(texts) == 7
    assert texts[0].startswith("RC-MAE against MAE: linear probe better (+5.0 points, ")
    assert "reconstruction better (+19.8 %" in texts[0]
    assert texts[4].startswith("ungated pull against RC-MAE: linear probe better (+3.2")
    text = mechanism.table(results)
    assert "| RC-MAE | 45.0 [" in text and "not the planned analysis" in text and texts[0] not in text
    assert texts[0] in mechanism.table(results | {"planned": 3})


def test_the_table_of_the_measurement_is_that_of_the_command():
    rows = rows_of(0.4, 0.02)
    results = json.loads(json.dumps(analyzed(about(rows), rows)))
    text = mechanism.gradients_table(results)
    assert "| S \N{MINUS SIGN} T, all past updates | 0.39" in text and "5 runs, from their steps 25;" in text
    assert "mostly conditional" in text


# --- the linear model ---------------------------------------------------------------------------------------


def test_the_error_is_that_on_fresh_inputs():
    """Above that of the best matrix, against the mean over many inputs."""
    setting = ControlSettings(
        width=12, rank=3, visible=4, batch=4000, lengths=(1,), noise=0.0, tuning=1, seeds=1
    )
    problem = Problem(setting)
    student = problem.best + 0.3 * torch.randn(2, 12, 12, dtype=torch.float64)
    ((x, visible),) = problem.inputs

    def error(s):
        return (visible @ s.mT - x).square().sum(2).mean(1)

    assert torch.allclose(error(student) - error(problem.best), problem.excess(student), rtol=0.05)


@catches("the worst rate is taken", "numpy:argmin", lambda old: lambda errors: old(np.negative(errors)))
def test_rates_are_chosen_on_other_seeds(monkeypatch):
    """The tuning seeds prefer the first rate, the others the last one."""
    setting = ControlSettings(lengths=(2,), tuning=2, seeds=2, rates=3)
    excess = Problem.excess
    signs = torch.tensor([1, 1, -1, -1])
    zero = excess(Problem(setting), torch.zeros(4, 16, 16, dtype=torch.float64))

    def one_sided(self, student):
        progress = excess(self, student) / zero
        return 2 + signs * (1 - progress)

    monkeypatch.setattr(Problem, "excess", one_sided)
    rows = run_controls(setting)["rows"]
    for row in rows:
        if row["arm"] in ("none", "teacher"):
            assert row["rate"] == setting.grid(row["optimizer"])[0], row["arm"]


def test_controls_damp_as_the_teacher_does():
    problem = Problem(ControlSettings(lengths=(40, 60), tuning=2, seeds=2))
    for optimizer in ("momentum", "adamw"):
        rate = problem.setting.grid(optimizer)[2]
        teacher = trained(problem, optimizer, rate, gamma=1.0)
        plain = trained(problem, optimizer, rate)
        assert set(teacher) == {40, 60} and teacher[60].kappa < 0, "c opposes the moment"
        assert (teacher[60].error < teacher[40].error).all()
        assert trained(problem, optimizer, rate, lengths=(40,))[40].error.equal(plain[40].error)
