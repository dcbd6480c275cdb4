"""`faithful`, drop path and the trained norms of prototypes: the rules of the reference codes."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rcmae.compare.race import arms
from rcmae.config import RuntimeConfig, changed
from rcmae.engine.checkpoint import checkpoints
from rcmae.engine.optim import adamw
from rcmae.engine.schedules import Progress, warmup_cosine
from rcmae.engine.step import clip_gradients
from rcmae.errors import Preempted
from rcmae.pretraining import Pretraining, pretrain
from tests.conftest import batch_for, method_for, small, stop_at
from tests.mutations import catches

T0 = Progress(0, 10, 2)


def on_cpu(out) -> RuntimeConfig:
    return RuntimeConfig(out=out, device="cpu", workers=0)


def ten_images(folder) -> str:
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return str(folder)


def gradients(method) -> dict[str, torch.Tensor]:
    method(batch_for(method), T0)["loss"].backward()
    return {n: p.grad.clone() for n, p in method.student.named_parameters() if p.grad is not None}


@catches(
    "all gradients are clipped together",
    "rcmae.methods.dino:DINO.clipped_together",
    lambda old: property(lambda self: [list(self.student.parameters())]),
    case="dino",
)
@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_every_tensor_is_clipped_by_its_own_norm(name):
    method = method_for(small(name, faithful=True))
    before = gradients(method)
    limit = float(torch.stack([g.norm() for g in before.values()]).median())
    optimizer = adamw(method.student, method.recipe.optim, 1e-3)
    norm = clip_gradients(optimizer, limit, method.clipped_together)
    assert norm == pytest.approx(float(torch.stack([g.norm() for g in before.values()]).norm()), rel=1e-5)
    for key, p in method.student.named_parameters():
        if key in before:
            expected = before[key] * min(1.0, limit / (float(before[key].norm()) + 1e-6))
            torch.testing.assert_close(p.grad, expected)


def test_msn_clips_the_encoder_and_its_head_but_not_the_prototypes():
    method = method_for(small("msn", faithful=True))
    before = gradients(method)
    clip_gradients(adamw(method.student, method.recipe.optim, 1e-3), 1e-3, method.clipped_together)
    after = {n: p.grad for n, p in method.student.named_parameters() if p.grad is not None}
    prototypes = [key for key in after if key.startswith("predictor")]
    assert len(prototypes) == 1 and torch.equal(after[prototypes[0]], before[prototypes[0]])
    rest = [g for key, g in after.items() if key not in prototypes]
    assert float(nn.utils.get_total_norm(rest)) == pytest.approx(1e-3, rel=1e-2)


def test_msns_schedules_are_cut_off_from_longer_ones():
    """The warm-up starts at a fifth of the peak; the run ends where cosines over 1.25 runs are by then."""
    start, length = method_for(small("msn", faithful=True)).schedule
    assert (start, length) == (0.2, 1.25) and method_for(small("msn")).schedule == (0.0, 1.0)

    def rate(step: int) -> float:
        return warmup_cosine(1.0, 0.0, 0.1, Progress(step, 100, 10), start, length)

    assert [rate(0), rate(5), rate(10)] == pytest.approx([0.2, 0.6, 1.0])
    assert rate(100) == pytest.approx((1 + math.cos(math.pi * 0.9 / 1.15)) / 2)


@catches(
    "the method's schedule is not used",
    "rcmae.methods.msn:MSN.schedule",
    lambda old: property(lambda self: (0.0, 1.0)),
)
def test_the_trainer_uses_the_schedule_of_the_method(tmp_path, monkeypatch):
    rates = []
    update = Pretraining.update

    def recorded(self, t):
        applied = update(self, t)
        group = self.optimizer.param_groups[0]
        rates.append((group["lr"], group["weight_decay"]))
        return applied

    monkeypatch.setattr(Pretraining, "update", recorded)
    recipe = small("msn", data=ten_images(tmp_path), faithful=True, steps=4, warmup=0.5, base_lr=0.32)
    recipe = changed(recipe, weight_decay_end=0.4)
    pretrain(recipe, on_cpu(tmp_path / "run"))
    assert [lr for lr, _ in rates[:3]] == pytest.approx([0.002, 0.006, 0.01])
    assert rates[3][1] == pytest.approx(0.4 + (0.05 - 0.4) * (1 + math.cos(math.pi * 0.75 / 1.25)) / 2)


def test_moco_decays_all_weights():
    for faithful in (False, True):
        method = method_for(small("mocov3", faithful=faithful))
        decayed, undecayed = adamw(method.student, method.recipe.optim, 1e-3).param_groups
        assert decayed["params"] and (not undecayed["params"]) == faithful


@pytest.mark.parametrize("name", ["dino", "ibot", "msn"])
def test_positions_and_weights_are_normal_and_trained(name):
    method = method_for(small(name, faithful=True, width=192, depth=2, heads=3))
    vit = method.ema_source.encoder.vit
    assert vit.pos_embed.requires_grad and "pos_embed" in str(
        [n for n, _ in method.student.named_parameters()]
    )
    for weight in (vit.pos_embed, vit.blocks[1].attn.qkv.weight, vit.blocks[0].mlp.fc2.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    teacher = method.teacher.model.encoder.vit
    assert torch.equal(teacher.pos_embed, vit.pos_embed) and not teacher.pos_embed.requires_grad
    assert gradients(method)["shared." * (name == "msn") + "encoder.vit.pos_embed"].abs().sum() > 0
    assert not method_for(small(name)).ema_source.encoder.vit.pos_embed.requires_grad


def test_mocos_initialization():
    method = method_for(small("mocov3", faithful=True, width=96, heads=2))
    vit = method.ema_source.encoder.vit
    assert not vit.pos_embed.requires_grad and float(vit.cls_token.detach().abs().max()) < 1e-5
    for weight, bound in (
        (vit.blocks[0].attn.qkv.weight, (6 / (96 + 96)) ** 0.5),
        (vit.blocks[0].mlp.fc1.weight, (6 / (96 + 384)) ** 0.5),
        (vit.patch_embed.proj.weight, (6 / (96 + 3 * 4 * 4)) ** 0.5),
    ):
        assert 0.97 * bound < float(weight.detach().abs().max()) <= bound


@catches(
    "dropped paths are not drawn from the seed and the step",
    "rcmae.pretraining:path_seed",
    lambda old: lambda seed, step, part: int(torch.seed() % 2**31),
)
def test_dropped_paths_are_those_of_the_step_after_a_resume(tmp_path, monkeypatch):
    recipe = small("dino", data=ten_images(tmp_path), drop_path=0.5, depth=3)
    pretrain(recipe, on_cpu(tmp_path / "straight"))
    with monkeypatch.context() as patch:
        stop_at(patch, Pretraining, 3)
        with pytest.raises(Preempted):
            pretrain(recipe, on_cpu(tmp_path / "stopped"))
    torch.rand(5)
    pretrain(recipe, on_cpu(tmp_path / "stopped"))
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, two = (checkpoints(tmp_path / n / "checkpoints")[0] / file for n in ("straight", "stopped"))
        assert one.read_bytes() == two.read_bytes()


def test_paths_are_dropped_in_the_student_and_in_training_only():
    method, plain = (method_for(small("dino", drop_path=rate, depth=3)) for rate in (0.9, 0.0))
    batch = batch_for(method)
    assert method(batch, T0)["loss"] != method(batch, T0)["loss"]
    images = batch["image"]
    teachers = [m.tokens(m.teacher.model, images) for m in (method, plain)]
    torch.testing.assert_close(*teachers)
    students = [m.eval().tokens(m.student, images) for m in (method, plain)]
    torch.testing.assert_close(*students)
    assert "dropped paths" in type(method).accumulation_caveat(method.recipe)


@catches(
    "a frozen last layer is scaled",
    "rcmae.methods.dino:DINO.before_step",
    lambda old: lambda self, t, applied: None,
)
def test_trained_norms_of_prototypes_start_at_one_and_are_frozen_with_them():
    fixed, trained = (method_for(small("dino", prototype_norm=norm)) for norm in (False, True))
    batch = batch_for(fixed)
    torch.testing.assert_close(fixed(batch, T0)["loss"], trained(batch, T0)["loss"])
    assert gradients(trained)["head.scale"].abs().sum() > 0
    trained.before_step(T0, torch.ones(()))
    assert trained.student.head.scale.grad is None


def test_a_race_on_own_data_has_the_same_rules_for_all():
    for arm in arms(["dino", "ibot", "msn", "mocov3"], data="photos"):
        assert not arm.recipe.faithful and not arm.recipe.drop_path
