"""data2vec 2.0: what student and teacher see, what the target is, and independence of micro-batches."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcmae.data.views import rng
from rcmae.engine.schedules import Progress
from rcmae.errors import ConfigError
from rcmae.methods.data2vec import squares_mask
from rcmae.methods.recipes import load_recipe
from rcmae.pretraining import pretrain
from tests.conftest import batch_for, method_for, small
from tests.mutations import catches

T0, ONE = Progress(0, 10, 2), torch.ones(())


def make_method(**changes):
    return method_for(
        small("data2vec", masks=4) if not changes else small("data2vec", **({"masks": 4} | changes))
    )


def gradients(method, batch) -> dict[str, torch.Tensor]:
    method.zero_grad()
    method(batch, T0)["loss"].backward()
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def with_other_pixels(batch, mask: int, hidden: bool, method):
    """The batch with other pixels in the patches that a mask hides, or in those that it leaves visible."""
    image = batch["image"].clone()
    for i, order in enumerate(batch["orders"][:, mask].tolist()):
        for patch in order[method.visible :] if hidden else order[: method.visible]:
            y, x = 4 * (patch // 4), 4 * (patch % 4)
            image[i, :, y : y + 4, x : x + 4] ^= 255
    return batch | {"image": image}


# --- masks --------------------------------------------------------------------------------------------------


@catches(
    "one visible patch is missing",
    "rcmae.methods.data2vec:squares_mask",
    lambda old: lambda grid, count, side, rng: old(grid, max(count - 1, 0), side, rng),
)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_exactly_the_requested_number_of_patches_is_visible(height, width, side, fraction, seed):
    count = round(fraction * height * width)
    visible = squares_mask((height, width), count, side, np.random.default_rng(seed))
    assert visible.shape == (height, width)
    assert visible.sum() == count


def test_visible_patches_are_squares_at_any_position():
    draws = np.random.default_rng(0)
    masks = np.stack([squares_mask((14, 14), 39, 3, draws) for _ in range(200)])
    alone = np.stack([(draws.permutation(196) < 39).reshape(14, 14) for _ in range(200)])
    beside = [(m[:, :, 1:] & m[:, :, :-1]).sum() / m.sum() for m in (masks, alone)]
    assert beside[0] > 2.5 * beside[1]
    corner = masks.mean(0)[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corner > 0.03).all(), "squares are centered anywhere and clipped at the border"
    one = squares_mask((14, 14), 9, 3, np.random.default_rng(3))
    assert one[one.any(1)][:, one.any(0)].all()
    assert one.sum() == 9


def test_a_sample_is_a_function_of_seed_epoch_and_index():
    method = make_method()
    view = method.views()
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    one, same, other = (view(image, rng(0, epoch, 3)) for epoch in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["orders"], other["orders"])
    assert torch.equal(one["orders"].sort(1)[0], torch.arange(16).expand(4, -1))
    visible = one["orders"][:, : method.visible]
    assert len({tuple(v.sort()[0].tolist()) for v in visible}) > 1, "masks differ"


# --- what is seen -------------------------------------------------------------------------------------------


@catches(
    "the student sees hidden patches",
    "rcmae.methods.data2vec:Data2Vec.predict",
    lambda old: (
        lambda self, patches, orders: old(self, patches + 1e-3 * patches.mean(1, keepdim=True), orders)
    ),
)
def test_hidden_pixels_change_the_target_but_not_the_student():
    method = make_method(masks=1)
    batch = batch_for(method)
    other = with_other_pixels(batch, 0, True, method)
    with torch.no_grad():
        one, two = (
            method.predict(method.normalize_and_patchify(b["image"]), b["orders"]) for b in (batch, other)
        )
    assert all(map(torch.equal, one, two))
    assert not torch.equal(
        *(method.target(method.normalize_and_patchify(b["image"])) for b in (batch, other))
    )
    with torch.no_grad():
        shown = with_other_pixels(batch, 0, False, method)
        assert not torch.equal(
            one[1], method.predict(method.normalize_and_patchify(shown["image"]), shown["orders"])[1]
        )


def test_the_target_does_not_depend_on_the_masks(monkeypatch):
    method, targets = make_method(), []
    target = method.target
    monkeypatch.setattr(method, "target", lambda patches: targets.append(target(patches)) or targets[-1])
    batch = batch_for(method)
    other = batch | {"orders": batch["orders"].flip(2)}
    losses = [method(b, T0)["loss"] for b in (batch, other)]
    assert torch.equal(*targets)
    assert losses[0] != losses[1]


def target_with_gradient(old):
    def target(self, patches):
        self.teacher.requires_grad_(True)
        return old.__wrapped__(self, patches)

    return target


@catches("the teacher gets a gradient", "rcmae.methods.data2vec:Data2Vec.target", target_with_gradient)
def test_the_teacher_has_no_gradient_and_every_trained_weight_has_one():
    method = make_method()
    grads = gradients(method, batch_for(method))
    assert not [n for n in grads if n.startswith("teacher")]
    assert set(grads) == {n for n, p in method.named_parameters() if p.requires_grad}
    assert all(g.abs().sum() > 0 for g in grads.values())


def test_the_teacher_is_the_encoder_alone_and_probing_it_keeps_nothing():
    method = make_method()
    assert {n.split(".")[0] for n, _ in method.teacher.model.named_parameters()} == {"encoder"}
    method.backbone("teacher")(torch.rand(2, 3, 16, 16))
    assert method.feed_forward is None
    method(batch_for(method), T0)
    assert method.feed_forward is None


# --- the target ---------------------------------------------------------------------------------------------


@catches(
    "targets include the residual connection",
    "rcmae.methods.data2vec:Data2Vec._collect",
    lambda old: lambda self, mlp, args, output: old(self, mlp, args, output + args[0]),
)
@pytest.mark.parametrize("top", [1, 2, 3])
def test_the_target_is_the_mean_of_the_normalized_feed_forward_outputs_of_the_top_blocks(top):
    method = make_method(depth=3, top_blocks=top)
    patches = method.normalize_and_patchify(batch_for(method)["image"])
    vit, x, outputs = method.teacher.model.encoder.vit, None, []
    handle = vit.blocks[0].register_forward_pre_hook(lambda block, args: outputs.append(args[0]))
    target = method.target(patches)
    handle.remove()
    x, outputs = outputs[0], []
    with torch.no_grad():
        for block in vit.blocks:
            x = x + block.attn(block.norm1(x))
            outputs.append(block.mlp(block.norm2(x)))
            x = x + outputs[-1]
    expected = torch.zeros_like(target)
    for y in outputs[-top:]:
        y = y[:, 1:]  # without the class token
        expected += (
            (y - y.mean(1, keepdim=True)) * (y.var(1, keepdim=True, correction=0) + 1e-5).rsqrt() / top
        )
    expected = (expected - expected.mean(2, keepdim=True)) * (
        expected.var(2, keepdim=True, correction=0) + 1e-5
    ).rsqrt()
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-5)


def test_by_default_ten_of_twelve_blocks_make_the_target():
    method = make_method(depth=12)
    assert len([b for b in method.teacher.model.encoder.vit.blocks if b.mlp._forward_hooks]) == 10
    assert not [b for b in method.teacher.model.encoder.vit.blocks[:2] if b.mlp._forward_hooks]


def test_targets_are_float32_under_autocast():
    method = make_method()
    with torch.autocast("cpu", torch.bfloat16):
        target = method.target(method.normalize_and_patchify(batch_for(method)["image"]))
        low = method(batch_for(method), T0)["loss"]
    assert target.dtype == low.dtype == torch.float32
    torch.testing.assert_close(target.var(2, correction=0), torch.ones(3, 16), rtol=1e-3, atol=1e-3)
    assert low.item() == pytest.approx(method(batch_for(method), T0)["loss"].item(), rel=0.02)


# --- the loss -----------------------------------------------------------------------------------------------


def test_the_loss_matches_its_definition():
    method = make_method(class_weight=0.5)
    batch = batch_for(method)
    patches, orders = method.normalize_and_patchify(batch["image"]), batch["orders"]
    target, (classes, prediction) = method.target(patches), method.predict(patches, orders)
    regression, of_class = [], []
    for i in range(3):
        for j in range(4):
            row = 4 * i + j
            for patch, predicted in zip(
                orders[i, j, method.visible :].tolist(), prediction[row], strict=True
            ):
                regression.append((predicted - target[i, patch]).square().sum() / 24**0.5)
            of_class.append((classes[row] - target[i].mean(0)).square().sum() / 24**0.5)
    expected = torch.stack(regression).mean() + 0.5 * torch.stack(of_class).mean()
    assert method(batch, T0)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_visible_patches_get_no_loss(monkeypatch):
    method = make_method(masks=1, class_weight=0.0)
    batch = batch_for(method)
    loss, target = method(batch, T0)["loss"], method.target
    orders = batch["orders"][:, 0]

    def changed(places):
        def with_noise(patches):
            new = target(patches).clone()
            for i, row in enumerate(places.tolist()):
                new[i, row] += 100
            return new

        return with_noise

    monkeypatch.setattr(method, "target", changed(orders[:, : method.visible]))
    assert torch.equal(method(batch, T0)["loss"], loss)
    monkeypatch.setattr(method, "target", changed(orders[:, -1:]))
    assert method(batch, T0)["loss"] > loss + 1


def test_predictions_are_at_the_positions_of_their_patches():
    """With a kernel of one patch, the prediction of a hidden patch depends only on its own noise, in the row
    that the order gives."""
    method = make_method(masks=2, conv_kernel=1)
    batch, decoder = batch_for(method), method.student.predictor
    with torch.no_grad():
        one = method.predict(method.normalize_and_patchify(batch["image"]), batch["orders"])[1]
        orders = torch.cat(
            [batch["orders"][:, :, : method.visible], batch["orders"][:, :, method.visible :].flip(2)], 2
        )
        two = method.predict(method.normalize_and_patchify(batch["image"]), orders)[1]
    assert torch.equal(one, two), "the j-th hidden patch has the j-th row of noise"
    assert decoder.noise.std().item() == pytest.approx(0.01, rel=0.2)
    rows = one.unflatten(0, (3, 2))
    assert torch.allclose(rows, rows[:1, :1].expand_as(rows), atol=1e-6)
    assert (one[0, 0] - one[0, 1]).abs().max() > 0


@catches(
    "only the first mask is used",
    "rcmae.methods.data2vec:Data2Vec.forward",
    lambda old: (
        lambda self, batch, t: old(
            self, batch | {"orders": batch["orders"][:, :1].expand_as(batch["orders"])}, t
        )
    ),
)
def test_several_masks_in_one_pass_equal_the_mean_over_single_masks():
    method = make_method()
    batch = batch_for(method)
    whole, single = (
        gradients(method, batch),
        [gradients(method, batch | {"orders": batch["orders"][:, j : j + 1]}) for j in range(4)],
    )
    loss = (
        sum(method(batch | {"orders": batch["orders"][:, j : j + 1]}, T0)["loss"].item() for j in range(4))
        / 4
    )
    assert method(batch, T0)["loss"].item() == pytest.approx(loss, rel=1e-5)
    scale = max(g.abs().max() for g in whole.values()).item()
    for name, value in whole.items():
        torch.testing.assert_close(sum(g[name] for g in single) / 4, value, rtol=1e-4, atol=1e-6 * scale)


def test_all_masks_of_an_image_share_one_pass_of_the_teacher():
    method, passes = make_method(), []
    method.teacher.model.encoder.vit.blocks[0].register_forward_hook(
        lambda block, args, out: passes.append(len(out))
    )
    method(batch_for(method), T0)
    assert passes == [3]


@catches(
    "targets depend on the batch",
    "rcmae.methods.data2vec:Data2Vec.target",
    lambda old: lambda self, patches: (lambda y: y - y.mean(0))(old(self, patches)),
)
def test_micro_batches_give_the_gradient_of_the_whole_batch():
    method = make_method()
    assert not type(method).accumulation_caveat(method.recipe)
    batch = batch_for(method, size=4)
    whole = gradients(method, batch)
    parts = [gradients(method, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(4)]
    scale = max(g.abs().max() for g in whole.values()).item()
    for name, value in whole.items():
        torch.testing.assert_close(sum(g[name] for g in parts) / 4, value, rtol=1e-4, atol=1e-6 * scale)


def test_a_step_depends_only_on_weights_and_batch():
    """It uses no global generator, and the decoder's noise is part of the checkpoint."""
    method, other = make_method(), make_method()
    batch = batch_for(method)
    with torch.no_grad():
        for p in [*other.parameters(), other.student.predictor.noise]:
            p += 0.1
    losses = [method(batch, T0)["loss"]]
    torch.manual_seed(1)
    other.load_state_dict(method.state_dict())
    losses += [m(batch, T0)["loss"] for m in (method, other)]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


# --- the teacher --------------------------------------------------------------------------------------------


@catches(
    "momentum rises until the end of the run",
    "rcmae.methods.data2vec:Data2Vec.momentum",
    lambda old: lambda self, t: 0.9998 + (0.99999 - 0.9998) * t.fraction,
)
def test_the_teachers_momentum_rises_linearly_and_then_stays_constant():
    method = method_for(small("data2vec"))
    momenta = [
        method.momentum(Progress(step, 375_300, 5004)) for step in (0, 50_000, 100_000, 100_001, 375_299)
    ]
    assert momenta == pytest.approx([0.9998, 0.999895, 0.99999, 0.99999, 0.99999], abs=1e-9)
    averaged = make_method(schedule="half-life", half_life="50 steps")
    assert averaged.momentum(Progress(3, 10, 5)) ** 50 == pytest.approx(0.5)
    assert method.momentum_per_step(Progress(50_000, 375_300, 5004)) == pytest.approx(0.999895, abs=1e-9)


def test_the_teacher_starts_as_the_student_and_follows_it():
    method = make_method(schedule="constant", momentum=0.9)
    pairs = dict(method.teacher.model.named_parameters())
    with torch.no_grad():
        for key, p in method.ema_source.named_parameters():
            assert torch.equal(pairs[key], p)
            if p.requires_grad:
                p += 1
    before = {key: p.clone() for key, p in pairs.items()}
    method.before_step(T0, ONE)
    method.after_step(T0, ONE)
    for key, p in method.ema_source.named_parameters():
        torch.testing.assert_close(pairs[key], before[key] + 0.1 * p.requires_grad, rtol=0, atol=1e-6)


def test_new_masks_differ_and_have_the_same_size():
    method = make_method()
    batch, generator = batch_for(method), torch.Generator().manual_seed(0)
    one, two = (method.remask(batch, generator)["orders"] for _ in range(2))
    assert one.shape == (3, 1, 16)
    assert torch.equal(one.sort(2)[0], torch.arange(16).expand(3, 1, -1))
    assert not torch.equal(one, two)
    assert torch.equal(one, method.remask(batch, torch.Generator().manual_seed(0))["orders"])
    assert method.encode(batch | {"orders": one}).shape == (3, 1 + method.visible, 24)


def test_predicting_zero_has_the_loss_of_its_baseline():
    method = make_method()
    with torch.no_grad():
        for part in (method.student.predictor.predict.weight, method.student.predictor.predict.bias):
            part.zero_()
    batch = batch_for(method)
    assert method(batch, T0)["regression"].item() == pytest.approx(method.references(batch)["zero"], rel=1e-3)


def test_a_collapse_shows_in_the_log():
    method = make_method()
    with torch.no_grad():
        method.student.predictor.predict.weight.zero_()
    losses = method(batch_for(method), T0)
    assert losses["prediction_std"] < 1e-2
    assert losses["target_std"] > 0.5
    means = {name: value.item() for name, value in losses.items()}
    assert ("bad", True) in [
        (mark, "collapse" in text) for mark, text in method.judge(means, method.references({}))
    ]


# --- recipes ------------------------------------------------------------------------------------------------


def test_the_published_recipe_makes_the_published_network():
    with torch.device("meta"):
        method = method_for(load_recipe("data2vec-vitb16-in1k"))
    assert method.visible == 39
    decoder = method.student.predictor
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.groups) for c in decoder.convolutions] == [
        (768, 768, (3, 3), 16)
    ] * 6
    assert decoder.noise.shape == (157, 768)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_blocks": 3}, "top_blocks must lie in 1 to the encoder's 2 blocks, not 3"),
        (
            {"hidden_fraction": 1.0, "masks": 0},
            "masks must be 1 or more, not 0; hidden_fraction must lie between 0 and 1, not 1.0",
        ),
        ({"schedule": "half-life", "half_life": "adaptive"}, "half_life adaptive needs a reconstruction"),
        ({"conv_groups": 16}, "conv_groups 16 must divide the encoder's width, 24, and conv_width, 24"),
        (
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
def test_impossible_settings_are_refused_before_data_is_read(changes, message, tmp_path):
    import rcmae.config as c

    recipe = small("data2vec", data=str(tmp_path / "nowhere"), **changes)
    with pytest.raises(ConfigError, match=message):
        pretrain(recipe, c.RuntimeConfig(out=tmp_path / "run", device="cpu"))
