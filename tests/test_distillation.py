"""DINO, iBOT, MSN and MoCo v3: losses against plain loops and recorded numbers, and what each network may
see."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import rcmae.config as c
from benchmarks.parity_distillation import compare_distillation
from rcmae.data.augment import color_jitter
from rcmae.data.masking import block_mask
from rcmae.data.views import rng
from rcmae.engine.schedules import Progress
from rcmae.errors import ConfigError
from rcmae.methods.distillation_losses import (
    assignments,
    cross_view_loss,
    info_nce,
    masked_patch_loss,
    me_max,
    sinkhorn_knopp,
)
from rcmae.models.heads import PrototypeHead
from rcmae.pretraining import pretrain
from tests.conftest import GOLDEN, batch_for, method_for, small, stop_at
from tests.mutations import catches

NAMES = ("dino", "ibot", "msn", "mocov3")
T0, LATER = Progress(0, 10, 2), Progress(5, 10, 2)
ONE, NONE = torch.ones(()), torch.zeros(())


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# --- losses -------------------------------------------------------------------------------------------------


@catches(
    "assignments are not balanced over prototypes",
    "rcmae.methods.distillation_losses:sinkhorn_knopp",
    lambda old: lambda p, rounds=3: p / p.sum(1, keepdim=True),
)
@catches(
    "queries are their own keys",
    "rcmae.methods.distillation_losses:info_nce",
    lambda old: lambda q, k, temperature: old(q, q, temperature),
)
def test_losses_match_recorded_numbers_of_the_reference_implementations():
    comparisons = compare_distillation(str(GOLDEN / "self_distillation_reference.safetensors"))
    assert len(comparisons) == 10
    assert max(error for error, _ in comparisons.values()) < 1e-5, comparisons


def test_across_views_is_a_mean_over_pairs_of_different_views():
    student, teacher = random(4, 3, 5), random(2, 3, 5).softmax(-1)
    pairs = [(w, v) for w in range(2) for v in range(4) if w != v]
    expected = sum(
        -(teacher[w, b] * (student[v, b] / 0.2).log_softmax(-1)).sum() for w, v in pairs for b in range(3)
    ) / (len(pairs) * 3)
    assert cross_view_loss(student, teacher, 0.2).item() == pytest.approx(expected.item(), rel=1e-12)


def test_only_masked_patches_contribute_and_every_image_counts_equally():
    student, teacher, masked = random(2, 3, 6, 5), random(2, 3, 6, 5).softmax(-1), torch.rand(2, 3, 6) < 0.5
    masked[0, 0], masked[1, 2] = True, False
    expected = 0.0
    for v in range(2):
        for b in range(3):
            each = [
                -(teacher[v, b, n] * (student[v, b, n] / 0.1).log_softmax(-1)).sum()
                for n in range(6)
                if masked[v, b, n]
            ]
            expected += sum(each) / max(len(each), 1) / 6
    assert masked_patch_loss(student, teacher, masked, 0.1).item() == pytest.approx(
        float(expected), rel=1e-12
    )


@given(st.integers(2, 20), st.integers(2, 8))
@settings(max_examples=30, deadline=None)
def test_sinkhorn_balances_the_use_of_prototypes(rows, prototypes):
    p = torch.rand(rows, prototypes, dtype=torch.float64, generator=torch.Generator().manual_seed(rows)) + 0.1
    q = sinkhorn_knopp(p, rounds=300)
    assert torch.allclose(q.sum(1), torch.ones(rows, dtype=torch.float64))
    assert torch.allclose(
        q.sum(0), torch.full((prototypes,), rows / prototypes, dtype=torch.float64), rtol=1e-6
    )
    assert torch.allclose(sinkhorn_knopp(7 * p), sinkhorn_knopp(p)), "a common factor has no effect"


def test_the_entropy_gap_is_zero_for_even_use_and_log_c_for_one_prototype():
    assert me_max(torch.full((6, 4), 0.25)).item() == pytest.approx(0, abs=1e-6)
    assert me_max(torch.eye(4)).item() == pytest.approx(0, abs=1e-6), "one prototype per image is even use"
    assert me_max(torch.eye(4)[:1].repeat(6, 1)).item() == pytest.approx(np.log(4), rel=1e-6)


def test_assignments_do_not_depend_on_norms():
    z, prototypes = random(3, 4), random(5, 4)
    assert torch.allclose(
        assignments(3 * z, prototypes * torch.rand(5, 1), 0.1), assignments(z, prototypes, 0.1)
    )


def test_info_nce_matches_a_plain_loop():
    q, k = random(4, 3), random(4, 3)
    similar = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / 0.2
    expected = -sum(similar[i].log_softmax(0)[i] for i in range(4)) / 4 * 2 * 0.2
    assert info_nce(q, k, 0.2).item() == pytest.approx(expected.item(), rel=1e-12)
    order = torch.randperm(4)
    assert info_nce(q[order], k[order], 0.2).item() == pytest.approx(expected.item(), rel=1e-12)


# --- views --------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_block_masks_have_exactly_the_requested_number_of_patches(height, width, fraction, seed):
    count = round(fraction * height * width)
    mask = block_mask((height, width), count, np.random.default_rng(seed))
    assert mask.shape == (height, width)
    assert mask.sum() == count


def test_block_masks_are_blocks():
    """Masked patches have more masked neighbors than patches drawn one by one."""
    draws = np.random.default_rng(0)
    blocks = [block_mask((14, 14), 59, draws) for _ in range(50)]
    alone = [(draws.permutation(196) < 59).reshape(14, 14) for _ in range(50)]
    beside = [np.mean([(m[:, 1:] & m[:, :-1]).sum() / m.sum() for m in masks]) for masks in (blocks, alone)]
    assert beside[0] > 2 * beside[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_a_function_of_seed_epoch_and_index(name):
    view = method_for(small(name)).views()
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    one, same, other = (view(image, rng(0, epoch, 3)) for epoch in (1, 1, 2))
    assert one.keys() == same.keys()
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["image"], other["image"])
    assert one["image"].shape == (2, 3, 16, 16)
    assert not torch.equal(one["image"][0], one["image"][1])


def test_zero_strength_leaves_colors_unchanged():
    crop = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    for seed in range(10):
        assert torch.equal(color_jitter(crop, (0.0, 0.0, 0.0, 0.0), 0.0, np.random.default_rng(seed)), crop)
    gray = color_jitter(crop, (0.0, 0.0, 0.0, 0.0), 1.0, np.random.default_rng(0))
    assert torch.equal(gray[0], gray[1])
    assert not torch.equal(gray[0], crop[0])


def test_the_encoder_without_ids_sees_all_patches():
    encoder = method_for(small("dino")).student.encoder
    patches = torch.randn(2, 16, 48)
    every = torch.arange(16).expand(2, -1)
    assert torch.equal(encoder(patches), encoder(patches, every))
    assert torch.equal(encoder(patches, grid=(4, 4)), encoder(patches, every))
    assert encoder(patches[:, :4], grid=(2, 2)).shape == (2, 5, 24)


# --- methods ------------------------------------------------------------------------------------------------


def gradients(method, batch, t=T0) -> dict[str, torch.Tensor]:
    method.zero_grad()
    method(batch, t)["loss"].backward()
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_has_no_gradient_and_every_trained_weight_has_one(name):
    method = method_for(small(name))
    grads = gradients(method, batch_for(method))
    assert not [n for n in grads if n.startswith("teacher")]
    assert set(grads) == {n for n, p in method.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_images_changes_nothing(name):
    method, order = method_for(small(name)), torch.tensor([2, 0, 1])
    batch = batch_for(method)
    one, other = (method(b, T0)["loss"].item() for b in (batch, {k: v[order] for k, v in batch.items()}))
    assert one == pytest.approx(other, rel=1e-5)


def center_of_the_last_micro_batch(old):
    def update(self, applied):
        del self.accumulated[:-1]
        return old(self, applied)

    return update


@catches(
    "the center is that of the last micro-batch",
    "rcmae.methods.distillation:Center.update",
    center_of_the_last_micro_batch,
)
@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_micro_batches_give_the_gradient_and_the_center_of_the_whole_batch(name):
    whole, parts = method_for(small(name)), method_for(small(name))
    batch = batch_for(whole, size=4)
    expected = gradients(whole, batch)
    parts.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        (parts({k: v[part] for k, v in batch.items()}, T0)["loss"] / 2).backward()
    grads = {n: p.grad for n, p in parts.named_parameters() if p.grad is not None}
    scale = max(g.abs().max() for g in expected.values())
    for key, value in expected.items():
        assert torch.allclose(grads[key], value, rtol=1e-4, atol=1e-6 * scale.item()), key
    for method in (whole, parts):
        method.after_step(T0, ONE)
    assert whole.center.value.abs().sum() > 0
    assert torch.allclose(whole.center.value, parts.center.value, atol=1e-7)


@catches(
    "a skipped step moves the center",
    "rcmae.methods.distillation:Center.update",
    lambda old: lambda self, applied: old(self, torch.ones_like(applied)),
)
@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_a_center_is_a_running_mean_that_a_skipped_step_leaves_alone(name):
    method = method_for(small(name))
    batch = batch_for(method)
    with torch.no_grad():
        logits = method.teacher.model.head(method.tokens(method.teacher.model, batch["image"])[:, :, 0])
    for applied, expected in ((NONE, 0.0), (ONE, 0.1), (ONE, 0.19)):
        method(batch, T0)
        method.after_step(T0, applied)
        assert torch.allclose(method.center.value, expected * logits.mean((0, 1)), atol=1e-6)
        method.teacher = method_for(small(name)).teacher


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_balanced_targets_use_all_prototypes(name):
    """For a teacher that prefers one prototype for all images: the targets are uniform, and the log still
    shows the preference."""
    method = method_for(small(name, sinkhorn=True, head_norm=True, local_crops=0))
    logits = 0.1 * torch.randn(2, 6, 12)
    logits[..., 3] += 1.0
    even = method.target(logits, method.center, 0.1).flatten(0, 1)
    torch.testing.assert_close(even.sum(1), torch.ones(12))
    torch.testing.assert_close(even.sum(0), torch.ones(12), rtol=0.1, atol=0)
    assert method.spread(logits, 0.1)["prototypes_used"] < 2
    assert method(batch_for(method, size=6), LATER)["loss"].isfinite()


def test_a_collapse_of_msn_shows_in_the_log():
    """Equal outputs for all images, balanced or not: few prototypes are in use."""
    method = method_for(small("msn", sinkhorn=True, sharpen=0.05))
    with torch.no_grad():
        for part in (method.student.shared, method.teacher.model):
            part.head[-1].weight.zero_()
            part.head[-1].bias.copy_(5 * method.student.predictor.weight[0])
    assert method(batch_for(method, size=6), LATER)["prototypes_used"] < 6


def test_a_center_of_masked_patches_does_not_depend_on_micro_batches():
    """Images have different numbers of masked patches; an image without any counts for nothing."""
    batch = batch_for(method_for(small("ibot")), size=4)
    batch["masked"][0] = False
    whole, parts = (method_for(small("ibot", patch_head="masked")) for _ in range(2))
    whole(batch, LATER)
    for i in range(4):
        parts({k: v[i : i + 1] for k, v in batch.items()}, LATER)
    for method in (whole, parts):
        method.after_step(LATER, ONE)
    assert whole.patch_center.value.abs().sum() > 0
    torch.testing.assert_close(whole.patch_center.value, parts.patch_center.value)


def test_a_heads_statistics_are_those_of_all_views_and_images():
    """BatchNorm after the first layer normalizes over views and images together, not over the views of one
    image."""
    head = PrototypeHead(6, 10, 4, 5, norm=True)
    outputs = []
    head.mlp[1].register_forward_hook(lambda module, args, out: outputs.append(out))
    x = torch.randn(3, 7, 6)
    flat = head(x.flatten(0, 1))
    torch.testing.assert_close(head(x).flatten(0, 1), flat)
    torch.testing.assert_close(outputs[1].mean(0), torch.zeros(10), atol=1e-5, rtol=0)


def test_the_last_layer_is_frozen_in_the_first_epoch():
    method = method_for(small("dino", freeze_last=1.0))
    for t, moves in (
        (T0, False),
        (LATER, True),
        (Progress(40, 100, 1000), True),
    ):  # the third: an epoch longer than the run
        gradients(method, batch_for(method), t)
        method.before_step(t, ONE)
        assert (method.student.head.last.grad is not None) == moves
        assert method.student.head.mlp[0].weight.grad is not None


def test_the_teachers_temperature_warms_up_and_then_stays_constant():
    method = method_for(
        small(
            "dino", teacher_temperature=0.07, teacher_temperature_start=0.04, teacher_temperature_warmup=0.4
        )
    )
    temperatures = [method.teacher_temperature(Progress(step, 10, 5)) for step in (0, 2, 4, 9)]
    assert temperatures == pytest.approx([0.04, 0.055, 0.07, 0.07])


@catches(
    "iBOT's student sees masked patches",
    "rcmae.methods.distillation:SelfDistillation.tokens",
    lambda old: lambda self, net, images, ids=None, masked=None: old(self, net, images, ids),
)
def test_masked_patches_do_not_reach_ibots_student():
    method = method_for(small("ibot", masked_images=1.0))
    batch = batch_for(method)
    masked = batch["masked"].transpose(0, 1).flatten(0, 1)
    assert masked.any()
    assert not masked.all()
    with torch.no_grad():
        method.student.mask_token.normal_()
    tokens = []
    for change in (False, True):
        images = batch["image"].clone()
        if change:
            gh, gw = method.student.encoder.grid
            pixels = (
                batch["masked"]
                .unflatten(2, (gh, gw))
                .repeat_interleave(4, 2)
                .repeat_interleave(4, 3)
                .unsqueeze(2)
            )
            images = torch.where(pixels, 255 - images, images)
        tokens.append(method.tokens(method.student, images, masked=(masked, method.student.mask_token)))
    assert torch.equal(*tokens)


def compared_with_itself(old):
    def loss(student, teacher, temperature):
        log = (student / temperature).log_softmax(-1).sum(0)
        return -(teacher * log).sum(-1).mean(1).sum() / (len(teacher) * len(student))

    return loss


@catches("a view is compared with itself", "rcmae.methods.dino:cross_view_loss", compared_with_itself)
def test_ibot_without_masks_equals_dino():
    dino, ibot = method_for(small("dino")), method_for(small("ibot", masked_images=0.0))
    ibot.load_state_dict(dino.state_dict(), strict=False)
    batch = batch_for(ibot)
    assert ibot(batch, T0)["loss"].item() == pytest.approx(dino(batch, T0)["loss"].item(), rel=1e-6)


def test_the_head_on_masked_patches_alone_gives_the_same_gradient():
    """At the initial center: which patches it averages is the only difference."""
    all_, some = (method_for(small("ibot", masked_images=1.0, patch_head=kind)) for kind in ("all", "masked"))
    batch = batch_for(all_)
    one, two = gradients(all_, batch), gradients(some, batch)
    for name, value in one.items():
        assert torch.allclose(two[name], value, rtol=1e-4, atol=1e-7), name
    none = method_for(small("ibot", masked_images=0.0, patch_head="masked"))
    assert none(batch_for(none), T0)["within"] == 0


@catches(
    "MSN's anchor keeps all patches",
    "rcmae.methods.distillation:SelfDistillation.tokens",
    lambda old: lambda self, net, images, ids=None, masked=None: old(self, net, images, None, masked),
)
def test_dropped_patches_do_not_reach_msns_anchor():
    method = method_for(small("msn", anchor_drop=0.5, local_crops=0))
    batch = batch_for(method)
    dropped = batch["anchor_order"][:, 8:]
    changed = batch["image"].clone()
    for i, places in enumerate(dropped.tolist()):
        for patch in places:
            y, x = 4 * (patch // 4), 4 * (patch % 4)
            changed[i, 1, :, y : y + 4, x : x + 4] ^= 255
    assert torch.equal(method(batch, T0)["loss"], method(batch | {"image": changed}, T0)["loss"])


def test_mocov3_leaves_its_patch_embedding_alone_and_its_teacher_has_no_predictor():
    method = method_for(small("mocov3"))
    grads = gradients(method, batch_for(method))
    assert not [n for n in grads if "patch_embed" in n]
    assert any(n.startswith("student.predictor") for n in grads)
    assert not [n for n, _ in method.teacher.named_parameters() if "top" in n]


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_starts_as_the_student_and_follows_it(name):
    method = method_for(small(name, schedule="constant", momentum=0.9))
    pairs = dict(method.teacher.model.named_parameters())
    with torch.no_grad():
        for key, p in method.ema_source.named_parameters():
            assert torch.equal(pairs[key], p)
            if p.requires_grad:
                p += 1
    before = {key: p.clone() for key, p in pairs.items()}
    method(batch_for(method), T0)
    method.after_step(T0, ONE)
    for key, p in method.ema_source.named_parameters():
        assert torch.allclose(pairs[key], before[key] + 0.1 * p.requires_grad, atol=1e-6), key


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(name, tmp_path, monkeypatch):
    """Also when stopped in the epoch in which the last layer has no optimizer state yet, and with centers in
    the checkpoint."""
    from rcmae.engine.checkpoint import checkpoints
    from rcmae.errors import Preempted
    from rcmae.pretraining import Pretraining

    data = tmp_path / "data"
    data.mkdir()
    from PIL import Image

    for i in range(16):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(
            data / f"{i}.png"
        )
    recipe = small(name, data=str(data), steps=5)
    runtime = c.RuntimeConfig(out=tmp_path / "uninterrupted", device="cpu", workers=0)
    pretrain(recipe, runtime)
    again = replace(runtime, out=tmp_path / "stopped")
    for step in (1, 3):
        with monkeypatch.context() as patch:
            stop_at(patch, Pretraining, step)
            with pytest.raises(Preempted):
                pretrain(recipe, again)
    pretrain(recipe, again)
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, two = (checkpoints(m.out / "checkpoints")[0] / file for m in (runtime, again))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dino", {"local_size": 10}, "local_size 10 is not a multiple of the patch, 4"),
        ("dino", {"local_size": 20}, "local_size 20 is larger than the image, 16"),
        ("ibot", {"prototypes": 1}, "prototypes must be 2 or more, not 1"),
        ("mocov3", {"batch_size": 1}, "batch_size of 2 or more, not 1"),
        ("msn", {"half_life": "adaptive"}, "half_life adaptive needs a reconstruction"),
        (
            "dino",
            {
                "model": "timm:vit_base_patch16_siglip_224",
                "width": None,
                "depth": None,
                "heads": None,
                "size": 32,
            },
            "class token",
        ),
    ],
)
def test_impossible_settings_are_refused_before_data_is_read(name, changes, message, tmp_path):
    recipe = small(name, data=str(tmp_path / "nowhere"), **changes)
    with pytest.raises(ConfigError, match=message):
        pretrain(recipe, c.RuntimeConfig(out=tmp_path / "run", device="cpu"))
