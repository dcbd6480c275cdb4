"""The cost of a step: against counts by hand, or a real step."""

import json
from dataclasses import asdict

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from rcmae.cli import main
from rcmae.compare.cost import MID_RUN, _Phases, _SavedBytes, cost, largest_batch, peak, recipes
from rcmae.methods import METHODS
from rcmae.methods.recipes import load_recipe
from tests.conftest import ROOT, batch_for, method_for, small
from tests.mutations import catches


def test_flops_of_the_encoder_by_hand():
    """Matrix products of MAE's encoder and decoder at fp32, with 2 FLOPs per multiplication."""
    recipe = small("mae", depth=1, decoder_depth=1)
    n, v, d, w, patch = 16, 4, 24, 16, 48

    def block(tokens, queries, width):
        """Queries, output and MLP for `queries` tokens, keys and values for all; two attention products."""
        return 2 * (
            2 * tokens * width * width
            + queries * (2 * width * width + 8 * width * width)
            + 2 * tokens * queries * width
        )

    hidden, encoder_tokens, decoder_tokens = n - v, v + 1, n + 1
    expected = (
        2 * v * patch * d
        + block(encoder_tokens, encoder_tokens, d)
        + 2 * encoder_tokens * d * w
        + block(decoder_tokens, hidden, w)
        + 2 * hidden * w * patch
    )
    # Nothing else multiplies matrices but the loss: an inner product over the hidden values.
    assert cost(recipe, "fp32").student_forward == expected + 2 * hidden * patch


@pytest.mark.parametrize("groups", [1, 4])
def test_the_backward_pass_of_a_convolution_costs_twice_its_forward_pass(groups):
    convolution, x = (
        torch.nn.Conv2d(8, 12, 3, padding=1, groups=groups),
        torch.randn(2, 8, 5, 5, requires_grad=True),
    )
    with _Phases() as counter:
        y = convolution(x)
        counter.phase = "backward"
        y.sum().backward()
    expected = 2 * 2 * 25 * 12 * (8 // groups) * 9
    assert counter.flops == {"student_forward": expected, "teacher_forward": 0, "backward": 2 * expected}


@catches(
    "results that share memory with arguments are counted again",
    "rcmae.compare.cost:_WithoutData.new",
    lambda old: lambda self, func, args, kwargs, given: func(*args, **kwargs),
)
def test_costs_are_those_recorded_with_torchs_fake_tensors():
    """Which have the same purpose as our tensors without data, and take many times as long."""
    recorded = json.loads((ROOT / "results" / "cost.json").read_text())["rows"]
    row = next(r for r in recorded if (r["model"], r["name"]) == ("vit_small_patch16", "mae"))
    recipe = recipes("vit_small_patch16", ["mae"])["mae"]
    for key, value in asdict(cost(recipe)).items():
        assert row[key] == value, key
    assert row["peak"] == peak(recipe, 128, "bf16")


def test_rcmae_costs_a_third_more_than_mae_and_saves_as_many_activations():
    mae, rc = cost(small("mae"), "fp32"), cost(small("rcmae"), "fp32")
    assert rc.teacher_forward == pytest.approx(rc.student_forward, rel=0.01)
    assert rc.student_forward == pytest.approx(mae.student_forward, rel=0.01)
    assert mae.teacher_forward == 0
    assert rc.flops < 1.34 * mae.flops
    assert rc.saved <= 1.05 * mae.saved
    assert rc.trained == mae.trained
    assert rc.frozen > mae.trained
    assert rc.state == 16 * rc.trained + 4 * rc.frozen


@pytest.mark.parametrize("name", METHODS)
def test_estimated_activation_memory_matches_a_real_step(name):
    """Counted on shapes, and on a real step with two batch sizes."""
    recipe = small(name)
    saved = []
    for size in (4, 8):
        method = method_for(recipe)
        count = _SavedBytes({p.untyped_storage()._cdata for p in method.parameters()})
        with saved_tensors_hooks(count.pack, lambda t: t):
            method(batch_for(method, size=size), MID_RUN)
        saved.append(count.bytes)
    assert cost(recipe, "fp32").saved == pytest.approx((saved[1] - saved[0]) / 4, rel=0.02)


def test_peak_memory_includes_weights_and_activations_and_grows_with_the_batch():
    recipe = small("rcmae")
    c, few, many = cost(recipe, "fp32"), peak(recipe, 8, "fp32"), peak(recipe, 64, "fp32")
    assert few > c.state
    assert (many - few) / 56 >= c.saved
    batch = largest_batch(recipe, many + 1000, "fp32")
    assert 60 <= batch <= 64
    assert largest_batch(recipe, 1000, "fp32") == 0


def test_a_head_on_masked_patches_costs_less():
    both = recipes("vit_small_patch16", ["ibot"])
    assert list(both) == ["ibot", "ibot, head on masked"]
    assert both["ibot, head on masked"].ibot.patch_head == "masked"
    faithful, modern = (cost(small("ibot", patch_head=kind), "fp32") for kind in ("all", "masked"))
    assert modern.flops < faithful.flops
    assert modern.saved < faithful.saved


def test_the_command_measures_and_writes_a_page(tmp_path, capsys):
    argv = [
        "compare",
        "cost",
        "--models",
        "vit_tiny_patch16",
        "--methods",
        "mae",
        "--methods",
        "rcmae",
        "--batch-size",
        "4",
    ]
    argv += [
        "--precision",
        "fp32",
        "--measure",
        "--device",
        "cpu",
        "--measured-batch",
        "2",
        "--out",
        str(tmp_path / "cost"),
    ]
    assert main(argv) == 0
    rows = json.loads((tmp_path / "cost" / "cost.json").read_text())["rows"]
    assert [r["name"] for r in rows] == ["mae", "rcmae"]
    assert rows[1]["flops_ratio"] == pytest.approx(4 / 3, rel=0.01)
    assert all(r["measured_peak"] > 0 and r["images_per_second"] > 0 for r in rows)
    page = (tmp_path / "cost" / "cost.html").read_text()
    assert "1.33×" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "rcmae" in capsys.readouterr().out
    assert main(["compare", "cost", "--fit", "-1"]) == 2
    assert main(["compare", "cost", "--batch-size", "1"]) == 2
    assert main(["compare", "cost", "--models", "vit_bas"]) == 2


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--models", "vit_huge_patch14"], 2, "local_size 96 is not a multiple of the patch, 14"),
        (["--models", "timm:vit_base_patch16_siglip_224"], 2, "reads the class token"),
        (["--measure", "--device", "mps"], 2, "mps"),
    ],
)
def test_unsupported_models_are_rejected_before_counting(tmp_path, capsys, argv, code, message):
    assert main(["compare", "cost", *argv, "--out", str(tmp_path / "cost")]) == code
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out.count("\n") == 1, "only the line on what was requested"


def test_settings_are_those_of_the_nearest_size():
    assert recipes("vit_small_patch16", ["dino"])["dino"] == load_recipe("dino-vits16-in1k")
    assert (
        recipes("vit_tiny_small_images", ["mae"])["mae"].network.decoder_width
        == load_recipe("mae-vits16-in1k").network.decoder_width
    )
    assert (
        recipes("timm:vit_large_patch16_224", ["dino"])["dino"].epochs
        == load_recipe("dino-vitb16-in1k").epochs
    )
