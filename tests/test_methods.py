"""Properties of MAE and RC-MAE: masking, losses, the teacher, schedules."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from rcmae.engine.optim import adamw
from rcmae.engine.schedules import Progress
from rcmae.methods.mean_teacher import half_life_units
from rcmae.methods.reconstruction_loss import squared_errors
from rcmae.models.patches import gather_tokens, patchify, standardize
from tests.conftest import batch_for, method_for, small
from tests.mutations import catches

ONE = torch.ones(())
T0 = Progress(0, 100, 10)


def pixels_of(method, order: torch.Tensor, places: slice) -> torch.Tensor:
    """Boolean image [b, 1, h, w]: the pixels of the patches in these columns of the order."""
    b, n = order.shape
    chosen = torch.zeros(b, n, dtype=torch.bool).scatter_(1, order[:, places], True)
    gh, gw = method.student.encoder.grid
    p = method.patch
    return chosen.view(b, 1, gh, 1, gw, 1).expand(b, 1, gh, p, gw, p).reshape(b, 1, gh * p, gw * p)


def train(method, steps: int, applied: torch.Tensor = ONE) -> None:
    optimizer = adamw(method.student, method.recipe.optim, 1e-3)
    for step in range(steps):
        t = Progress(step, steps, 10)
        method(batch_for(method, seed=step), t)["loss"].backward()
        method.before_step(t, applied)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(t, applied)


@catches(
    "the encoder sees hidden pixels",
    "rcmae.models.autoencoder:Autoencoder.forward",
    lambda old: (
        lambda self, patches, order, visible: old(
            self, patches + 1e-3 * patches.mean(1, keepdim=True), order, visible
        )
    ),
)
@pytest.mark.parametrize("registers", [0, 2])
def test_hidden_pixels_cannot_reach_the_encoder(registers):
    method = method_for(small(registers=registers))
    batch = batch_for(method)
    hidden, visible = (
        pixels_of(method, batch["order"], part)
        for part in (slice(method.visible, None), slice(method.visible))
    )
    snapshots = [
        method.snapshot(batch | {"image": x})[0]
        for x in (
            batch["image"],
            torch.where(hidden, 255 - batch["image"], batch["image"]),
            torch.where(visible, 255 - batch["image"], batch["image"]),
        )
    ]
    assert not torch.equal(snapshots[0]["image"], snapshots[1]["image"])
    for network in ("student", "teacher"):
        assert torch.equal(snapshots[0][network], snapshots[1][network])
        assert not torch.equal(snapshots[0][network], snapshots[2][network])
    ids = batch["order"][:, : method.visible]
    latents = [
        method.student.encoder(gather_tokens(method.normalize_and_patchify(s["image"]), ids), ids)
        for s in snapshots[:2]
    ]
    assert torch.equal(*latents)


def test_targets_of_visible_patches_get_no_gradient():
    """The loss depends only on hidden patches of its targets: visible targets have no gradient."""
    method = method_for(small("mae", target="pixels"))
    batch = batch_for(method)
    patches = method.normalize_and_patchify(batch["image"]).requires_grad_()
    with torch.no_grad():
        prediction = method.student(patches, batch["order"], method.visible)
    loss = F.mse_loss(prediction, method.target(gather_tokens(patches, batch["order"][:, method.visible :])))
    assert loss.item() == pytest.approx(method(batch, T0)["loss"].item(), rel=1e-6)
    loss.backward()
    by_order = gather_tokens(patches.grad, batch["order"])
    assert by_order[:, : method.visible].count_nonzero() == 0
    assert (by_order[:, method.visible :].abs().sum(2) > 0).all()


@catches(
    "targets are divided by the biased standard deviation",
    "rcmae.methods.mae:standardize",
    lambda old: lambda patches, eps: F.layer_norm(patches, patches.shape[-1:], eps=eps),
)
def test_the_loss_is_the_mean_over_hidden_patches():
    """Against a plain loop over images and patches."""
    method = method_for(small())
    batch = batch_for(method)
    losses = method(batch, T0)
    snapshots, _ = method.snapshot(batch)
    patches = patchify((batch["image"].double() / 255 - 0.5) / 0.25, method.patch)
    total = count = 0
    for i, order in enumerate(batch["order"].tolist()):
        for j, patch in enumerate(order[method.visible :]):
            x = patches[i, patch]
            x = (x - x.mean()) / (x.var(unbiased=True) + method.recipe.mae.target_eps).sqrt()
            total += (snapshots["student"][i, j].double() - x).square().mean().item()
            count += 1
    assert count == 3 * (method.patches - method.visible)
    assert losses["reconstruction"].item() == pytest.approx(total / count, rel=1e-5)


@catches(
    "gamma is always 1",
    "rcmae.methods.rcmae:squared_errors",
    lambda old: lambda s, x, t=None, gamma=0.0: old(s, x, t, 1.0),
)
def test_gamma_zero_equals_mae_to_the_bit():
    mae, rc = method_for(small("mae")), method_for(small("rcmae", gamma=0.0))
    for model in (mae, rc):
        train(model, 5)
    assert mae.state_dict().keys() < rc.state_dict().keys()
    for name, value in mae.state_dict().items():
        assert torch.equal(value, rc.state_dict()[name]), name


def test_gamma_changes_the_result():
    one, two = method_for(small(gamma=1.0)), method_for(small(gamma=0.0))
    for model in (one, two):
        train(model, 3)
    assert not torch.equal(one.student.decoder.pred.weight, two.student.decoder.pred.weight)


def test_at_the_start_student_and_teacher_agree_exactly():
    losses = (method := method_for(small()))(batch_for(method), T0)
    assert losses["consistency"] == 0
    assert losses["teacher_reconstruction"].item() == pytest.approx(losses["reconstruction"].item(), rel=1e-6)


@catches(
    "the fused loss returns half of its gradients",
    "rcmae.methods.reconstruction_loss:_Blend.backward",
    lambda old: lambda ctx, *grads: tuple(g if g is None else g / 2 for g in old(ctx, *grads)),
)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 4.0])
def test_the_fused_loss_is_the_sum_of_both(gamma):
    s, x, t = (torch.randn(2, 5, 12, dtype=torch.float64) for _ in range(3))
    one, two = s.clone().requires_grad_(), s.clone().requires_grad_()
    fused = squared_errors(one, x, t, gamma)
    plain = (two - x).square().mean() + gamma * (two - t).square().mean()
    fused["loss"].backward()
    plain.backward()
    assert fused["loss"].item() == pytest.approx(plain.item(), rel=1e-13)
    assert torch.allclose(one.grad, two.grad, rtol=1e-12, atol=1e-15)
    assert fused["teacher_reconstruction"].item() == pytest.approx((t - x).square().mean().item(), rel=1e-12)
    assert fused["loss"].item() == pytest.approx(
        (fused["reconstruction"] + gamma * fused["consistency"]).item(), rel=1e-13
    )


@catches(
    "predictions are rounded to bf16",
    "rcmae.models.decoder:Decoder.forward",
    lambda old: lambda self, tokens, order: old(self, tokens, order).bfloat16().float(),
)
def test_small_differences_to_the_teacher_survive_bf16():
    """The last layer runs in float32 under autocast: a difference of 1e-3 in a weight is not rounded away."""
    method = method_for(small())
    with torch.no_grad():
        method.student.decoder.pred.bias.add_(1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        losses = method(batch_for(method), T0)
    assert losses["consistency"].item() == pytest.approx(1e-6, rel=0.01)


def trainable_teacher(old):
    def init(self, student):
        old(self, student)
        self.model.requires_grad_(True)

    return init


@catches("the teacher is trained", "rcmae.models.teacher:Teacher.__init__", trainable_teacher)
def test_the_teacher_never_gets_a_gradient():
    method = method_for(small())
    method(batch_for(method), T0)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert all(p.grad is not None for p in method.student.parameters() if p.requires_grad)
    assert not method.train().teacher.model.training


@catches(
    "momentum and 1 - momentum are swapped",
    "rcmae.models.teacher:Teacher.update",
    lambda old: lambda self, student, momentum, applied=None: old(self, student, 1 - momentum, applied),
)
def test_momentum_one_keeps_the_teacher_and_zero_copies_the_student():
    for momentum in (1.0, 0.0):
        method = method_for(small(schedule="constant", momentum=momentum))
        before = copy.deepcopy(method.teacher.model.state_dict())
        train(method, 2)
        expected = before if momentum else method.student.state_dict()
        for name, value in method.teacher.model.state_dict().items():
            assert torch.allclose(value, expected[name], rtol=0, atol=0 if momentum else 1e-7), (
                momentum,
                name,
            )
        assert not torch.equal(method.student.decoder.pred.weight, before["decoder.pred.weight"])


def test_the_teacher_is_the_moving_average_of_the_students():
    method = method_for(small(schedule="constant", momentum=0.7, ema_updates=2))
    expected = method.student.decoder.pred.weight.detach().double().clone()
    optimizer = adamw(method.student, method.recipe.optim, 1e-2)
    for step in range(4):
        method(batch_for(method, seed=step), T0)["loss"].backward()
        expected = (
            0.7 * expected + 0.3 * method.student.decoder.pred.weight.detach()
        )  # against the student before the step
        method.before_step(T0, ONE)
        optimizer.step()
        optimizer.zero_grad()
        expected = 0.7 * expected + 0.3 * method.student.decoder.pred.weight.detach()
        method.after_step(T0, ONE)
    assert torch.allclose(method.teacher.model.decoder.pred.weight.double(), expected, rtol=1e-5, atol=1e-7)


@catches(
    "a skipped step moves the teacher",
    "rcmae.models.teacher:Teacher.update",
    lambda old: lambda self, student, momentum, applied=None: old(self, student, momentum),
)
def test_a_skipped_step_moves_no_teacher():
    method = method_for(small())
    before = copy.deepcopy(method.teacher.model.state_dict())
    train(method, 2, applied=torch.zeros(()))
    assert all(torch.equal(v, before[k]) for k, v in method.teacher.model.state_dict().items())


def test_student_and_teacher_get_the_same_patches():
    """With equal weights the two agree on any batch; with the teacher's own mask (D) they do not."""
    different = method_for(small(teacher_mask="different"))
    batch = batch_for(different)
    assert different(batch, T0)["consistency"] > 1e-4
    batch["teacher_order"] = batch["order"]
    assert different(batch, T0)["consistency"] == pytest.approx(0, abs=1e-12)


def test_different_masks_are_compared_on_patches_hidden_from_both():
    method = method_for(small(teacher_mask="different"))
    batch = batch_for(method)
    losses = method(batch, T0)
    patches = method.normalize_and_patchify(batch["image"])
    s = method.student(patches, batch["order"], method.visible)
    t = method.teacher(patches, batch["teacher_order"], method.visible)
    terms = []
    for i in range(len(s)):
        student_hidden, teacher_hidden = (
            batch[k][i, method.visible :].tolist() for k in ("order", "teacher_order")
        )
        both = [p for p in student_hidden if p in teacher_hidden]
        terms.append(
            torch.stack(
                [
                    (s[i, student_hidden.index(p)] - t[i, teacher_hidden.index(p)]).square().mean()
                    for p in both
                ]
            ).mean()
        )
    assert losses["consistency"].item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)


@catches(
    "the momentum schedule restarts in every epoch",
    "rcmae.methods.rcmae:RCMAE.momentum",
    lambda old: (
        lambda self, t: old(self, Progress(t.step % t.steps_per_epoch, t.total_steps, t.steps_per_epoch))
    ),
)
def test_momentum_schedules_and_half_life_units():
    times = [Progress(k, 100, 10) for k in (0, 50, 100)]
    cosine, constant = method_for(small(schedule="cosine")), method_for(small(schedule="constant"))
    assert [cosine.momentum(t) for t in times] == pytest.approx([0.996, 0.998, 1.0])
    assert [constant.momentum(t) for t in times] == [0.996] * 3
    for text, steps in (("5%", 5), ("7 steps", 7), ("80 images", 10), ("0.5 epochs", 5)):
        method = method_for(small(half_life=text))
        assert method.momentum(times[0]) ** steps == pytest.approx(0.5), text
        assert half_life_units(method.momentum(times[0]), times[0], 8) == pytest.approx(
            {
                "momentum": 0.5 ** (1 / steps),
                "half_life_steps": steps,
                "half_life_images": 8 * steps,
                "half_life_epochs": steps / 10,
                "half_life_fraction": steps / 100,
            }
        )
    assert half_life_units(1.0, times[0], 8)["half_life_steps"] == math.inf


def test_half_life_counts_every_update_of_a_step():
    method = method_for(small(half_life="6 steps", ema_updates=3))
    assert (method.momentum(T0) ** 3) ** 6 == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["mae", "rcmae"])
def test_micro_batches_give_the_gradient_of_the_whole(kind):
    whole, parts = method_for(small(kind)), method_for(small(kind))
    batch = batch_for(whole, size=8)
    whole(batch, T0)["loss"].backward()
    for i in range(4):
        (parts({k: v[2 * i : 2 * i + 2] for k, v in batch.items()}, T0)["loss"] / 4).backward()
    for (name, p), q in zip(whole.student.named_parameters(), parts.student.parameters(), strict=True):
        if p.requires_grad:
            assert torch.allclose(
                p.grad, q.grad, rtol=1e-5, atol=1e-6 * whole.student.decoder.pred.weight.grad.abs().max()
            ), name


def test_the_loss_falls_during_training():
    method = method_for(small(gamma=1.0))
    batch = batch_for(method, size=4)
    first = method(batch, T0)["loss"].item()
    optimizer = adamw(method.student, method.recipe.optim, 3e-3)
    for _ in range(60):
        method(batch, T0)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(T0, ONE)
    assert method(batch, T0)["reconstruction"].item() < 0.7 * first


def test_baselines_are_computed_from_the_data():
    """On patches of one color every baseline is exact; on noise, copying is worse than predicting zero."""
    method = method_for(small("mae", target="pixels"))
    batch = batch_for(method, size=8)
    noise = method.references(batch)
    assert noise["nearest_visible"] == pytest.approx(2 * noise["zero"], rel=0.1)
    assert noise["patch_mean"] < noise["zero"]
    batch["image"] = torch.full_like(batch["image"], 200)
    flat = method.references(batch)
    assert flat["nearest_visible"] == 0
    assert flat["patch_mean"] == pytest.approx(0, abs=1e-10)
    assert flat["zero"] == pytest.approx(((200 / 255 - 0.5) / 0.25) ** 2, rel=1e-5)


def test_standardize_is_unbiased():
    x = torch.randn(1, 2, 16, dtype=torch.float64) * 3 + 1
    y = standardize(x, 1e-6)
    assert torch.allclose(y.mean(2), torch.zeros(1, 2, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(y.var(2, unbiased=True), torch.ones(1, 2, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("name", ["mae", "rcmae"])
def test_losses_are_not_rounded_under_autocast(name):
    """The log and the adaptive half-life use differences far below the rounding of bf16."""
    s, x, t = (torch.randn(4, 3, 48) for _ in range(3))
    args = (s, x) if name == "mae" else (s, x, t, 0.7)
    plain = squared_errors(*args)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = squared_errors(*args)
    assert plain == mixed
    assert plain["loss"] != plain["loss"].bfloat16()


@pytest.mark.parametrize("mask", ["same", "different"])
def test_adaptive_half_life_depends_on_which_network_is_better(mask):
    method = method_for(small(half_life="adaptive", teacher_mask=mask))
    t, half_lives = Progress(50, 1000, 10), []
    assert method.half_life(t) == 2
    for advantage, steps in ((0.5, 10), (-0.5, 3), (0.001, 10), (5.0, 1000), (-5.0, 1000)):
        for _ in range(steps):
            method.pending_errors.append(
                torch.tensor([1.0, 1.0 - advantage])
            )  # the student's error, and the teacher's
            method.after_step(t, ONE)
        half_lives.append(float(method.half_life(t)))
    grown = 2 + 10 * math.log(2)
    assert half_lives == pytest.approx(
        [grown, grown - 3 * math.log(2), grown - 2 * math.log(2), 100, 2], rel=1e-4
    )
    assert float(method.momentum(t)) == pytest.approx(0.5**0.5)
    assert method.state(t)["half_life_fraction"] == pytest.approx(0.002)


@pytest.mark.parametrize("mask", ["same", "different"])
def test_adaptive_half_life_ignores_skipped_steps(mask):
    method = method_for(small(half_life="adaptive", teacher_mask=mask))
    t, batch = Progress(50, 1000, 10), batch_for(method, size=8)
    with torch.no_grad():  # a student that predicts zero, and a worse teacher
        method.student.decoder.pred.weight.zero_()
        method.teacher.model.decoder.pred.weight.mul_(30)
    method.adaptive_half_life.fill_(40.0)
    method(batch, t)
    method.after_step(t, 0 * ONE)
    assert method.adaptive_half_life == 40
    method(batch, t)
    method(batch, t)  # two micro-batches are one step
    method.after_step(t, ONE)
    assert method.adaptive_half_life.item() == pytest.approx(40 - math.log(2), rel=1e-5)
    assert "adaptive_half_life" in method.state_dict(), "it is part of the checkpoint"
    assert "adaptive_half_life" not in method_for(small(half_life="2 steps")).state_dict()
