"""The laboratory: theory against autograd, identities on a real network, and diagnostics against known
values."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from rcmae.cli import main
from rcmae.engine.optim import adamw
from rcmae.engine.schedules import Progress
from rcmae.lab import linear_experiment, linear_model
from rcmae.lab.health import effective_rank, health, lidar
from rcmae.lab.linear_controls import ControlSettings, run_controls
from rcmae.lab.linear_model import (
    Matrix,
    companion,
    consistency_gradient,
    contraction,
    descend,
    effective_beta,
    effective_momentum,
    gated_consistency,
    reconstruction_gradient,
    stability_limit,
    stationary_variance,
    steps_to,
)
from rcmae.lab.monitor import LIDAR_EVERY, Monitor, both_gradients, relation
from tests.conftest import batch_for, method_for, small
from tests.mutations import catches

D, B, STEPS, LR, ALPHA = 7, 3, 12, 0.05, 0.9
ONE = torch.ones(())


def inputs(steps: int = STEPS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(steps, B, D, generator=g, dtype=torch.float64)
    return [(a, a * (torch.rand(B, D, generator=g) < 0.5)) for a in x]


def history(optimizer: str, gamma: float = 0.7, alpha: float = ALPHA) -> list[linear_model.Step]:
    start = torch.randn(D, D, dtype=torch.float64)
    return list(descend(iter(inputs()), start, alpha, gamma=gamma, lr=LR, optimizer=optimizer))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).norm() <= 1e-10 * b.norm()


# --- the proposition ----------------------------------------------------------------------------------------


def residual(s: Matrix, t: Matrix, x: Matrix, visible: Matrix, gamma: float) -> Matrix:
    """r = (S x~ - x) + gamma (S - T) x~; the gradient of L is mean r x~'."""
    return visible @ s.T - x + gamma * (visible @ (s - t).T)


def lag(updates: torch.Tensor, alpha: float) -> Matrix:
    """S_t - T_t = sum_{i=1..t} alpha^i u_{t-i}, from all updates since S_0 = T_0, oldest first.

    By induction: S_t - T_t = alpha (S_t - T_t-1) = alpha ((S_t-1 - T_t-1) + u_t-1).
    """
    weights = alpha ** torch.arange(len(updates), 0, -1, dtype=updates.dtype)
    return torch.einsum("t,tde->de", weights, updates)


def momentum_weights(t: int, alpha: float, beta: float) -> torch.Tensor:
    """Weights w_k of the past gradients, oldest first: S_t - T_t = -lr sum_k w_k g_{t-k}, for
    v <- beta v + g, S <- S - lr v.

    w_k = alpha (alpha^k - beta^k) / (alpha - beta), or k alpha^k if both are equal; alpha^k for beta = 0.
    """
    k = torch.arange(t, 0, -1, dtype=torch.float64)
    return k * alpha**k if alpha == beta else alpha * (alpha**k - beta**k) / (alpha - beta)


def adamw_update(gradients: torch.Tensor, lr: float) -> Matrix:
    """AdamW's update u_k from all gradients g_0 .. g_k, oldest first, without weight decay.

    u = -lr m / (sqrt(v) + eps), m and v the normalized averages of g and g^2 (Loshchilov and Hutter, 2019).
    """
    means = []
    for beta, values in ((0.9, gradients), (0.95, gradients**2)):
        weights = beta ** torch.arange(len(gradients) - 1, -1, -1, dtype=gradients.dtype)
        means.append(torch.einsum("t,tde->de", weights / weights.sum(), values))
    return -lr * means[0] / (means[1].sqrt() + 1e-8)


@pytest.mark.parametrize("optimizer", linear_model.OPTIMIZERS)
def test_gradients_are_those_of_autograd(optimizer):
    for (x, masked), step in zip(inputs(), history(optimizer), strict=True):
        s = step.student.clone().requires_grad_()
        reconstruction = ((masked @ s.T - x) ** 2).sum() / (2 * B)
        consistency = ((masked @ s.T - masked @ step.teacher.T) ** 2).sum() / (2 * B)
        reconstruction_gradient, consistency_gradient = (
            torch.autograd.grad(loss, s)[0] for loss in (reconstruction, consistency)
        )
        assert close(step.reconstruction, reconstruction_gradient)
        assert torch.allclose(step.consistency, consistency_gradient, rtol=0, atol=1e-13)


@pytest.mark.parametrize("optimizer", linear_model.OPTIMIZERS)
def test_student_minus_teacher_is_a_sum_of_past_updates(optimizer):
    past = history(optimizer)
    updates = torch.stack([step.update for step in past])
    for t in range(1, STEPS):
        assert close(lag(updates[:t], ALPHA), past[t].student - past[t].teacher)


@catches(
    "past gradients are not weighted by the similarity of inputs",
    "rcmae.lab.linear_model:gated_consistency",
    lambda old: (
        lambda residuals, past, batch, lr, weights: old(residuals, batch.expand_as(past), batch, lr, weights)
    ),
)
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_the_consistency_gradient_is_a_sum_of_gated_past_gradients(beta):
    """With momentum or without; 0.9 is where momentum and the teacher's rate are equal."""
    gamma, start = 0.7, torch.randn(D, D, dtype=torch.float64)
    past = list(descend(iter(inputs()), start, ALPHA, gamma=gamma, lr=LR, optimizer="momentum", beta=beta))
    pairs = inputs()
    residuals = torch.stack(
        [residual(p.student, p.teacher, x, masked, gamma) for p, (x, masked) in zip(past, pairs, strict=True)]
    )
    all_masked = torch.stack([masked for _, masked in pairs])
    for t in range(1, STEPS):
        predicted = gated_consistency(
            residuals[:t], all_masked[:t], pairs[t][1], LR, momentum_weights(t, ALPHA, beta)
        )
        assert close(predicted, past[t].consistency)


@pytest.mark.parametrize("optimizer", linear_model.OPTIMIZERS)
def test_an_ungated_pull_has_the_norm_of_the_consistency_gradient(optimizer):
    start = torch.randn(D, D, dtype=torch.float64)
    for (_, masked), step in zip(
        inputs(), descend(iter(inputs()), start, ALPHA, lr=LR, optimizer=optimizer, gated=False), strict=True
    ):
        gap = step.student - step.teacher
        expected = consistency_gradient(step.student, step.teacher, masked).norm()
        assert step.consistency.norm() == pytest.approx(expected.item(), rel=1e-9)
        assert (step.consistency * gap).sum() == pytest.approx((gap.norm() * expected).item(), rel=1e-9)


@catches(
    "the effective momentum forgets the weight of a new gradient",
    "rcmae.lab.linear_model:effective_beta",
    lambda old: lambda beta, gamma, kappa: beta + gamma * kappa,
)
@pytest.mark.parametrize("kappa", [-0.5, -3.0])
def test_a_gradient_along_the_moment_acts_as_another_momentum(kappa):
    """m <- beta m + (1 - beta) (r + gamma kappa m) is the moment of a descent with the effective beta."""
    gamma, beta = 0.7, 0.9
    start = torch.randn(D, D, dtype=torch.float64)
    s, m = start, torch.zeros_like(start)
    for x, masked in inputs():
        r = reconstruction_gradient(s, x, masked)
        m = beta * m + (1 - beta) * (r + gamma * kappa * m)
        s = s - LR * m
    lowered = effective_beta(beta, gamma, kappa)
    steps = descend(iter(inputs()), start, ALPHA, 0.0, LR * (1 - beta), optimizer="momentum", beta=lowered)
    *_, last = steps
    assert close(last.student + last.update, s)


def test_several_runs_at_once_are_those_runs():
    starts = torch.randn(3, D, D, dtype=torch.float64)
    pairs = inputs()
    for optimizer in linear_model.OPTIMIZERS:
        together = list(
            descend(
                ((x.expand(3, -1, -1), m.expand(3, -1, -1)) for x, m in pairs),
                starts,
                ALPHA,
                lr=LR,
                optimizer=optimizer,
                gated=False,
            )
        )
        for i, start in enumerate(starts):
            alone = list(descend(iter(pairs), start, ALPHA, lr=LR, optimizer=optimizer, gated=False))
            assert close(together[-1].student[i], alone[-1].student)


def test_orthogonal_inputs_have_a_consistency_gradient_of_zero():
    x = torch.randn(2, 1, D, dtype=torch.float64)
    first, second = (x[i] * (torch.arange(D) % 2 == i) for i in (0, 1))
    past = list(descend(iter([(x[0], first), (x[1], second)]), torch.zeros(D, D, dtype=torch.float64), ALPHA))
    assert past[1].consistency.abs().max() == 0
    assert past[1].update.abs().max() > 0


def test_adamw_matches_its_closed_form():
    gamma, past = 0.7, history("adamw")
    gradients = torch.stack([p.reconstruction + gamma * p.consistency for p in past])
    for t, step in enumerate(past):
        assert close(adamw_update(gradients[: t + 1], LR), step.update)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [0.5, 0.9, 0.996])
def test_the_companion_matrix_matches_the_recursion_and_its_stability_limit(gamma, alpha):
    """One number instead of a matrix: the companion matrix is the recursion, and it diverges at the predicted
    limit."""
    rate = 0.3
    e = f = 1.0
    m, state = companion(rate, gamma, alpha), torch.ones(2, dtype=torch.float64)
    for _ in range(5):
        e, f = e - rate * ((1 + gamma) * e - gamma * f), f
        f = alpha * f + (1 - alpha) * e
        state = m @ state
    assert torch.allclose(state, torch.tensor([e, f], dtype=torch.float64), rtol=1e-13, atol=0)
    limit = stability_limit(gamma, alpha)
    assert contraction(limit * 0.999, gamma, alpha) < 1 < contraction(limit * 1.001, gamma, alpha)
    assert torch.linalg.det(m).item() == pytest.approx(effective_momentum(rate, gamma, alpha))
    assert stability_limit(1.0, 1.0) == 1


@pytest.mark.parametrize(("gamma", "alpha"), [(0.0, 0.9), (1.0, 0.9), (1.0, 0.99)])
def test_stationary_variance_matches_a_long_simulation(gamma, alpha):
    rate, noise = 0.1, 0.01
    g = torch.Generator().manual_seed(0)
    disturbance = noise**0.5 * torch.randn(2000, 4000, generator=g, dtype=torch.float64)
    e = f = torch.zeros(4000, dtype=torch.float64)
    for xi in disturbance:
        e = e - rate * ((1 + gamma) * e - gamma * f) + xi
        f = alpha * f + (1 - alpha) * e
    student, teacher = stationary_variance(rate, gamma, alpha, noise)
    assert e.var().item() == pytest.approx(student, rel=0.1)
    assert f.var().item() == pytest.approx(teacher, rel=0.15)


def test_the_numbers_of_the_research_notes():
    """Derived and measured independently, before this code was written."""
    assert stationary_variance(0.1, 1.0, 0.9, 0.01)[0] == pytest.approx(0.0367, abs=5e-5)
    assert stationary_variance(0.091, 0.0, 0.9, 0.091**2)[0] == pytest.approx(0.0477, abs=5e-5)
    assert steps_to(0.01, 0.0199, 0.0, 0.5) == pytest.approx(230, abs=2)
    assert steps_to(0.01, 0.0099 * 1.2, 1.0, 0.5) == pytest.approx(390, abs=5)
    with pytest.raises(ValueError, match="not stable"):
        steps_to(0.01, 3.0, 0.0, 0.5)


def test_the_linear_experiment_agrees_with_its_reference_values():
    setting = linear_experiment.LinearSettings()
    for alpha, same, different in ((0.9, -0.98, -0.03), (0.996, -0.88, -0.02)):
        cosines = {
            r: linear_experiment.measure(setting, r, alpha, "sgd", seed=0)["previous"]
            for r in linear_experiment.RELATIONS
        }
        assert cosines["same"] == pytest.approx(same, abs=0.02)
        assert cosines["different"] == pytest.approx(different, abs=0.02)
        assert cosines["orthogonal"] == 0


def test_lab_linear_writes_its_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(linear_experiment, "LinearSettings", lambda seeds: linear_model_setting(seeds))
    few = ControlSettings(lengths=(2, 4), tuning=2, seeds=2, rates=2)
    monkeypatch.setattr(linear_experiment, "run_controls", lambda setting, tick: run_controls(few, tick))
    assert main(["lab", "linear", "--out", str(tmp_path), "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert "adamw" in out
    assert "no teacher: stable below a learning rate of 2.00" in out
    assert "Teacher against no teacher: " in out
    page = (tmp_path / "linear.html").read_text()
    assert page.count("<svg") == 4
    assert "http" not in page.replace("http-equiv", "")
    assert {p.name for p in tmp_path.glob("*.svg")} == {
        "gate.svg",
        "momentum.svg",
        "trade.svg",
        "descent.svg",
    }
    results = json.loads((tmp_path / "linear.json").read_text())
    assert results["gate"]["measured"] == pytest.approx(results["gate"]["predicted"], abs=1e-12)


def linear_model_setting(seeds):
    return SETTING(width=32, rank=4, steps=20, seeds=seeds)


SETTING = linear_experiment.LinearSettings


# --- identities on a real network ---------------------------------------------------------------------------


def trained(**changes) -> tuple:
    """A method after some steps, with all of its updates."""
    method = method_for(small(half_life="3 steps", **changes))
    optimizer = adamw(method.student, method.recipe.optim, 1e-3)
    updates = []
    for i in range(8):
        t = Progress(i, 100, 10)
        before = [p.detach().double().clone() for p in method.student.parameters()]
        method(batch_for(method, size=6, seed=i), t)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(t, ONE)
        updates.append(
            [p.detach().double() - b for p, b in zip(method.student.parameters(), before, strict=True)]
        )
    return method, updates


def test_the_lag_identity_holds_for_a_vision_transformer():
    method, updates = trained()
    alpha = method.momentum_per_step(Progress(0, 100, 10))
    weights = [alpha ** (len(updates) - k) for k in range(len(updates))]
    gap, size = 0.0, 0.0
    for i, (s, t) in enumerate(
        zip(method.student.parameters(), method.teacher.model.parameters(), strict=True)
    ):
        predicted = sum(w * u[i] for w, u in zip(weights, updates, strict=True))
        gap += (predicted - (s.double() - t.double())).norm().item() ** 2
        size += s.double().norm().item() ** 2
    assert math.sqrt(gap / size) < 1e-6


def test_the_mixed_target_identity_holds_for_a_vision_transformer():
    """|s-x|^2 + g |s-t|^2 = (1+g) |s - (x + g t)/(1+g)|^2 + const: one gradient."""
    method, _ = trained(gamma=0.6)
    batch, g = batch_for(method, size=4, seed=99), 0.6
    method(batch, Progress(0, 100, 10))["loss"].backward()
    fused = {n: p.grad.clone() for n, p in method.student.named_parameters() if p.grad is not None}
    method.student.zero_grad()
    c = method.compare(batch)
    ((1 + g) * F.mse_loss(c.prediction, (c.target + g * c.teacher_prediction) / (1 + g))).backward()
    mixed = {n: p.grad for n, p in method.student.named_parameters() if p.grad is not None}
    size = math.sqrt(sum(v.norm().item() ** 2 for v in mixed.values()))
    assert all((fused[n] - mixed[n]).norm().item() < 1e-6 * size for n in mixed)


# --- diagnostics --------------------------------------------------------------------------------------------


def recorded(method, optimizer, monitor, step: int, skip: bool = False, **options) -> dict[str, float]:
    """One step that the monitor measures."""
    t = Progress(step, 100, 10)
    batch = batch_for(method, size=options.get("size", 6), seed=step)
    monitor.start(t)
    losses = method(batch, t)
    losses["loss"].backward()
    applied = ONE * (0 if skip else 1)
    method.before_step(t, applied)
    if not skip:
        optimizer.step()
    optimizer.zero_grad()
    method.after_step(t, applied)
    return monitor.finish({k: v.item() for k, v in losses.items()})


@pytest.mark.parametrize("mask", ["same", "different"])
def test_the_monitors_numbers_of_the_last_layer_are_those_of_autograd(mask):
    method, _ = trained(teacher_mask=mask, gamma=0.7)
    monitor = Monitor(method, 100)
    batch = batch_for(method, size=6, seed=3)
    r, c = both_gradients(method, batch)
    name = "decoder.pred.weight"
    expected = relation([r[name]], [c[name]], 0.7)
    logged = recorded(method, adamw(method.student, method.recipe.optim, 1e-3), monitor, 3)
    for key, value in expected.items():
        assert logged[f"last_{key}"] == pytest.approx(value, rel=1e-4), key


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # which torch._dynamo reads
def test_both_gradients_do_not_use_compiled_blocks():
    """Which torch cannot differentiate twice."""
    (method, _), compiled = trained(), []
    for block in method.student.encoder.vit.blocks:
        block.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    both_gradients(method, batch_for(method))
    assert not compiled
    method(batch_for(method), Progress(0, 10, 5))
    assert compiled, "training does"


def test_both_gradients_add_up_to_the_loss():
    method, _ = trained(gamma=0.7)
    batch = batch_for(method, size=6, seed=3)
    r, c = both_gradients(method, batch)
    method(batch, Progress(0, 100, 10))["loss"].backward()
    whole = {n: p.grad for n, p in method.student.named_parameters() if p.grad is not None}
    size = max(g.norm().item() for g in whole.values())
    assert all((r[n] + 0.7 * c[n] - whole[n]).norm() < 1e-5 * size for n in whole)


def test_advantage_and_output_cosine():
    method, _ = trained()
    monitor = Monitor(method, 100)
    logged = recorded(method, adamw(method.student, method.recipe.optim, 1e-3), monitor, 3)
    c = monitor.comparison
    student_error, teacher_error = (
        F.mse_loss(c.prediction, c.target),
        F.mse_loss(c.teacher_prediction, c.target),
    )
    assert logged["teacher_advantage"] == pytest.approx(
        ((student_error - teacher_error) / student_error).item(), abs=1e-5
    )
    cosine = F.cosine_similarity(
        (c.prediction - c.target).flatten(), (c.prediction - c.teacher_prediction).flatten(), 0
    )
    assert logged["output_cosine"] == pytest.approx(cosine.item(), rel=1e-4)


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_measured_momentum_counts_every_move_of_the_teacher(updates):
    """Updates towards the student before and after the step."""
    method, _ = trained(ema_updates=updates)
    monitor, optimizer = Monitor(method, 100), adamw(method.student, method.recipe.optim, 1e-3)
    logged = recorded(method, optimizer, monitor, 3)
    assert logged["measured_momentum"] == pytest.approx(0.5 ** (1 / 3), rel=1e-4)
    assert logged["expected_momentum"] == pytest.approx(0.5 ** (1 / 3), rel=1e-6)
    assert "measured_momentum" not in recorded(method, optimizer, monitor, 4, skip=True)


def test_momentum_is_not_measured_on_distances_that_are_rounding():
    """After each update, a teacher with a half-life of 0.05 steps differs from the student by rounding, from
    which no momentum follows, although the student moves far."""
    method = method_for(small(half_life="0.05 steps"))
    monitor, optimizer = Monitor(method, 100), adamw(method.student, method.recipe.optim, 1e-3)
    lines = [recorded(method, optimizer, monitor, step) for step in range(4)]
    assert not any("measured_momentum" in line for line in lines[1:])


def test_the_monitor_changes_nothing():
    """Weights are equal to the bit with and without it, slow diagnostics included, and it frees its
    copies."""
    weights = []
    for look in (False, True):
        method = method_for(small())
        optimizer, monitor = (
            adamw(method.student, method.recipe.optim, 1e-3),
            Monitor(method, 100) if look else None,
        )
        for step in range(4):
            if monitor:
                recorded(method, optimizer, monitor, step)
                monitor.features = torch.randn(32, method.student.encoder.width)
                monitor.slow()
                monitor.lidar(batch_for(method, size=6))
            else:
                t = Progress(step, 100, 10)
                method(batch_for(method, size=6, seed=step), t)["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
                method.after_step(t, ONE)
        weights.append(method.state_dict())
    assert method.recorded is None
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_health_of_known_features():
    g = torch.Generator().manual_seed(0)
    full = torch.randn(4000, 16, generator=g)
    assert health(full)["rankme"] == pytest.approx(16, rel=0.01)
    assert health(full)["spread"] == pytest.approx(1, abs=0.01)
    flat = full[:, :1] @ torch.randn(1, 16, generator=g)
    assert health(flat)["rankme"] == pytest.approx(1, abs=0.01)
    same = torch.ones(100, 16)
    assert health(same)["spread"] < 1e-6
    assert health(same)["uniformity"] == pytest.approx(0, abs=1e-6)
    assert health(full)["uniformity"] < -2
    scales = torch.arange(1, 17) ** -0.5  # eigenvalues 1, 1/2, 1/3 ...
    orthogonal, _ = torch.linalg.qr(full - full.mean(0))
    assert health(orthogonal * scales * 100)["alpha_req"] == pytest.approx(1, abs=0.02)
    assert effective_rank(torch.tensor([1.0, 1.0, 0.0])) == pytest.approx(2)
    assert effective_rank(torch.zeros(3)) == pytest.approx(1)


def test_slow_diagnostics_are_rare_in_short_runs_and_always_made_at_the_end():
    """How often full gradients and LiDAR are computed, by the length of the run: a log line every hundredth,
    a picture every sixth of it."""

    def looks(total):
        monitor = Monitor(method_for(small()), total)
        line, picture = max(1, total // 100), total // 6
        lines = {step for step in range(1, total + 1) if step % line == 0 or step == total}
        pictures = {round(total * (i + 1) / 6) for i in range(6)}
        slow = [step for step in sorted(lines) if monitor.due(step, line)]
        return slow, [step for step in sorted(pictures) if monitor.due(step, picture, LIDAR_EVERY)]

    assert looks(6) == ([6], [6])
    assert looks(300) == ([201, 300], [300])
    assert looks(1000)[1] == [333, 667, 1000]
    assert [len(kind) for kind in looks(2000)] == [10, 6]


def test_lidar_counts_directions_that_tell_images_apart():
    g = torch.Generator().manual_seed(0)
    within = torch.randn(200, 8, 6, generator=g)
    apart = torch.zeros(200, 1, 6)
    apart[:, 0, :2] = 30 * torch.randn(200, 2, generator=g)
    assert lidar(apart + within) == pytest.approx(2, abs=0.1)
