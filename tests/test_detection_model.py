"""The detector: windows, feature maps, regions and masks to the pixel, gradients of all weights."""

import dataclasses
import json
import re

import pytest
import torch
from timm.models import vision_transformer
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes
from torchvision.ops import MultiScaleRoIAlign, box_iou

from rcmae.config import shipped_recipes, to_toml
from rcmae.data.digits import scene
from rcmae.errors import ConfigError
from rcmae.interop.timm_export import architecture_of, blueprint
from rcmae.models.backbone import Backbone
from rcmae.models.encoder import build_vit
from rcmae.tasks.detection.model import (
    ANCHOR,
    Anchors,
    Detector,
    Pooler,
    cut,
    detector,
    export_pyramid,
    groups,
    paste,
    rebuild,
)
from rcmae.tasks.detection.settings import DetectionRecipe, load_detect
from rcmae.tasks.detection.windows import WindowAttention, ends
from tests.mutations import catches

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SMALL = DetectionRecipe(
    steps=1,
    size=32,
    window=3,
    width=16,
    box_width=24,
    box_convs=1,
    mask_convs=1,
    proposals=20,
    drop_path=0.0,
    jitter=(1.0, 1.0),
)
PLAIN_ATTENTION = {"window": 0, "rel_pos": False}
PRESETS = pytest.mark.parametrize("preset", ["vitdet", "benchmarking"])


def backbone(size=16, patch=8, depth=6, registers=0, seed=0) -> Backbone:
    torch.manual_seed(seed)
    return Backbone(
        build_vit(size=size, channels=3, patch=patch, width=16, depth=depth, heads=2, registers=registers),
        MEAN,
        STD,
    )


def small(b: Backbone | None = None, **changes) -> Detector:
    return detector(b or backbone(), 10, dataclasses.replace(SMALL, **changes))


def batch(count=2, size=32, empty=(), first=0):
    """Scenes and their targets; images in `empty` show objects that are not annotated."""
    images, targets = [], []
    for i in range(first, first + count):
        pixels, objects = scene(0, "train", i, size)
        objects = [] if i in empty else objects
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
        boxes = torch.tensor(
            [[x, y, x + w, y + h] for x, y, w, h in (o.box for o in objects)], dtype=torch.float32
        ).view(-1, 4)
        masks = [torch.from_numpy(o.mask) for o in objects]
        targets.append(
            {
                "boxes": boxes,
                "labels": torch.tensor([o.label + 1 for o in objects], dtype=torch.int64),
                "masks": torch.stack(masks) if masks else torch.zeros(0, size, size, dtype=torch.bool),
            }
        )
    return torch.stack(images), targets


def learn(model: Detector, images, targets) -> dict[str, torch.Tensor]:
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    return losses


def randomized(model: nn.Module) -> nn.Module:
    """Randomize all weights, as after training, so that none is zero or one."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


# --- the backbone -------------------------------------------------------------------------------------------


def reference(b: Backbone, model: Detector, images: torch.Tensor) -> torch.Tensor:
    """The last map of timm's own blocks on the full grid, with the detector's positions."""
    vit = b.vit
    x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2) + model.pyramid.vit.pos_embed
    grid = model.pyramid.vit.patch_embed.grid_size
    return vit.blocks(x).transpose(1, 2).unflatten(2, grid)


def last_map(model: Detector, images: torch.Tensor) -> torch.Tensor:
    depth = len(model.pyramid.vit.blocks)
    return model.pyramid.vit.forward_intermediates(images, indices=[depth - 1], intermediates_only=True)[0]


@pytest.mark.parametrize(
    "changes", [PLAIN_ATTENTION, {"window": 4}, {"window": 14}, {"window": 14, "preset": "benchmarking"}]
)
def test_one_window_over_the_whole_image_equals_the_plain_vit(changes):
    b, images = backbone(), torch.randn(2, 3, 32, 32)
    model = small(b, **changes).eval()
    assert any(isinstance(m, WindowAttention) for m in model.modules()) == changes.get("rel_pos", True)
    assert torch.allclose(last_map(model, images), reference(b, model, images), atol=1e-5)
    windows = small(b, window=2, rel_pos=False).eval()
    assert not torch.allclose(last_map(windows, images), reference(b, windows, images), atol=1e-3)


@PRESETS
def test_windows_are_independent_until_the_first_global_block(preset):
    model = randomized(small(size=64, preset=preset).eval())  # a grid of 8 in windows of 3, 3 and 2 per side
    vit, images = model.pyramid.vit, torch.randn(1, 3, 64, 64)
    assert [getattr(block.attn, "window", None) for block in vit.blocks] == [3, 8, 8, 3, 8, 8]
    changed = images.clone()
    changed[:, :, 8 * 4, 8 * 7] += 1  # patch (4, 7): window (1, 2)
    first, second = (
        torch.stack(vit.forward_intermediates(x, indices=[0, 1], intermediates_only=True)).transpose(0, 1)[0]
        for x in (images, changed)
    )
    moved = (first - second).abs().amax(1) > 1e-6
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[3:6, 6:8] = True
    assert torch.equal(moved[0], expected)
    assert moved[1].all()


def rows_for_columns(old):
    def positions(self, q):
        bias, side = old(self, q), self.window
        return bias if bias is None else bias.unflatten(3, (side, side)).transpose(3, 4).flatten(3)

    return positions


@catches(
    "rows and columns of relative positions are swapped",
    "rcmae.tasks.detection.windows:WindowAttention.positions",
    rows_for_columns,
)
def test_decomposed_positions_distinguish_rows_from_columns():
    """Tokens are equal in every row: a bias among rows changes nothing, one among columns does."""
    attn = small(window=4).pyramid.vit.blocks[0].attn
    x = torch.randn(1, 1, 4, 16).expand(1, 4, 4, 16).flatten(1, 2)
    before = attn(x)
    with torch.no_grad():
        nn.init.normal_(attn.rel_pos_h)
        assert torch.allclose(attn(x), before, atol=1e-5)
        nn.init.normal_(attn.rel_pos_w)
        assert not torch.allclose(attn(x), before, atol=1e-3)


def test_blocks_share_their_relative_position_tables():
    model = small(preset="benchmarking", size=64)
    assert {k: tuple(p.shape) for k, p in model.named_parameters() if "bias_table" in k} == {
        "pyramid.tables.window.relative_position_bias_table": (25, 2),
        "pyramid.tables.grid.relative_position_bias_table": (225, 2),
    }
    assert not any("rel_pos_h" in k for k in model.state_dict())
    images = torch.randn(1, 3, 64, 64)
    before = [
        m.detach()
        for m in model.pyramid.vit.forward_intermediates(images, indices=[0, 1, 2], intermediates_only=True)
    ]
    nn.init.normal_(model.pyramid.tables["grid"].relative_position_bias_table)
    after = [
        m.detach()
        for m in model.pyramid.vit.forward_intermediates(images, indices=[0, 1, 2], intermediates_only=True)
    ]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, False]


@pytest.mark.parametrize(
    "options", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}, {"no_embed_class": True}]
)
def test_positions_stay_at_their_patches(options):
    """x in channel 0 and y in channel 1 of a grid that is not square; the class token's position
    is left out."""
    vit = VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0, **options
    )
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    with torch.no_grad():
        vit.pos_embed.fill_(1e3)
        y, x = torch.meshgrid((torch.arange(4) + 0.5) / 4, (torch.arange(6) + 0.5) / 6, indexing="ij")
        vit.pos_embed[0, prefix:] = torch.stack([x.flatten(), y.flatten()] + [torch.zeros(24)] * 14, 1)
    positions = small(Backbone(vit, MEAN, STD), size=80).pyramid.vit.pos_embed
    assert positions.requires_grad
    positions = positions.detach().unflatten(1, (10, 10))[0]
    middle = (torch.arange(10) + 0.5) / 10
    for channel, expected in ((0, middle.expand(10, 10)), (1, middle.unsqueeze(1).expand(10, 10))):
        assert (positions[..., channel] - expected).abs().max() < 0.07, (
            "bicubic interpolation is not linear at the border"
        )
    assert (positions[:, 2:-2, 0] - middle[2:-2]).abs().max() < 0.02


def test_the_backbones_weights_are_copied_and_it_is_not_changed():
    b = backbone(registers=2)
    before = {k: v.clone() for k, v in b.vit.state_dict().items()}
    model = small(b)
    copied = model.pyramid.vit.state_dict()
    shared = [k for k in before if k.startswith(("blocks.", "patch_embed."))]
    assert len(shared) == 6 * 12 + 2
    assert all(torch.equal(copied[k], before[k]) for k in shared)
    learn(model, *batch())
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(torch.equal(v, before[k]) for k, v in b.vit.state_dict().items())
    assert not b.vit.pos_embed.requires_grad


def test_the_drop_path_rate_rises_linearly_with_depth():
    vit = small(drop_path=0.5).pyramid.vit
    assert [getattr(b.drop_path1, "drop_prob", 0) for b in vit.blocks] == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    )
    assert [getattr(b.drop_path2, "drop_prob", 0) for b in vit.blocks] == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    )


# --- the pyramid --------------------------------------------------------------------------------------------


@PRESETS
@pytest.mark.parametrize(
    ("changes", "sides"),
    [
        ({"size": 80}, [40, 20, 10, 5, 3]),
        ({"size": 80, "scales": (2.0, 1.0)}, [20, 10, 5]),
        ({"size": 32, **PLAIN_ATTENTION}, [16, 8, 4, 2, 1]),
        ({"size": 32, "scales": (1.0,)}, [4, 2]),
    ],
)
def test_the_shapes_of_the_pyramids_feature_maps(preset, changes, sides):
    model = small(preset=preset, **changes).eval()
    maps = model.pyramid(torch.randn(2, 3, model.size, model.size))
    assert [tuple(m.shape) for m in maps.values()] == [(2, 16, s, s) for s in sides]
    assert list(maps) == [str(i) for i in range(len(sides) - 1)] + ["pool"]


def test_benchmarking_reads_four_depths_and_vitdet_the_last():
    assert [ends(depth, 4) for depth in (24, 12, 4, 3, 1)] == [
        [5, 11, 17, 23],
        [2, 5, 8, 11],
        [0, 1, 2, 3],
        [0, 1, 2, 2],
        [0, 0, 0, 0],
    ]
    assert small(preset="benchmarking").pyramid.depths == [1, 2, 4, 5]
    assert small(preset="benchmarking", scales=(2.0, 1.0)).pyramid.depths == [2, 5]
    assert small().pyramid.depths == [5, 5, 5, 5]
    shallow = small(backbone(depth=3), preset="benchmarking")
    learn(shallow, *batch())
    assert all(p.grad is not None for p in shallow.parameters())


# --- boxes and masks ----------------------------------------------------------------------------------------


def ramp(stride: float, cells: int) -> torch.Tensor:
    """A map whose cells contain the position of their center: x, y in pixels."""
    middle = (torch.arange(cells) + 0.5) * stride
    return torch.stack([middle.expand(cells, cells), middle.unsqueeze(1).expand(cells, cells)])[None]


@catches(
    "RoIAlign is half a cell off",
    "rcmae.tasks.detection.model:roi_align",
    lambda old: lambda *args, aligned=False, **kwargs: old(*args, **kwargs),
)
def test_regions_are_pooled_at_their_exact_position():
    strides, box = [3.5, 7.0], torch.tensor([[20.0, 15.0, 41.0, 29.0]])
    maps = {"0": ramp(3.5, 18), "1": ramp(7.0, 9), "pool": torch.zeros(1, 2, 4, 4)}
    pooled = Pooler(strides, 7)(maps, [box], [(63, 63)])[0]
    middle = (torch.arange(7) + 0.5) / 7
    assert torch.allclose(pooled[0], (20 + 21 * middle).expand(7, 7), atol=1e-4)
    assert torch.allclose(pooled[1], (15 + 14 * middle).unsqueeze(1).expand(7, 7), atol=1e-4)
    torchvision_pooled = MultiScaleRoIAlign(["0"], 7, sampling_ratio=2)(
        {"0": ramp(4.0, 16)}, [box], [(64, 64)]
    )[0]
    assert torch.allclose(torchvision_pooled[0] - (20 + 21 * middle), torch.full((7, 7), 2.0), atol=1e-4), (
        "torchvision is off by half a cell"
    )


def test_a_box_is_pooled_from_the_map_of_its_size():
    strides = [4.0, 8.0, 16.0, 32.0]
    maps = {
        str(i): torch.full((2, 1, 1024 // int(s), 1024 // int(s)), float(i)) for i, s in enumerate(strides)
    }
    sides = [
        10.0,
        111.0,
        112.0,
        223.0,
        224.0,
        447.0,
        448.0,
        900.0,
    ]  # detectron2's: 4 + log2(side / 224) - 2, rounded down, from 0 to 3
    boxes = [torch.tensor([[50.0, 60.0, 50 + s, 60 + s] for s in part]) for part in (sides[:3], sides[3:])]
    assert Pooler(strides, 2)(maps, boxes, [(1024, 1024)] * 2)[:, 0, 0, 0].tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert small(proposals=7).heads.mask_roi_pool(maps, [b[:0] for b in boxes], [(1024, 1024)] * 2).shape == (
        0,
        1,
        14,
        14,
    )


def test_anchors_are_exact():
    maps = [torch.zeros(1, 1, s, s, dtype=torch.bfloat16) for s in (256, 128, 64, 32, 16)]
    images = ImageList(torch.zeros(2, 3, 1024, 1024), [(1024, 1024)] * 2)
    anchors = Anchors([4.0, 8.0, 16.0, 32.0, 64.0])(images, maps)
    expected = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)(
        images, [m.float() for m in maps]
    )
    assert len(anchors) == 2 and anchors[0].dtype == torch.float32
    assert (anchors[0] - expected[0]).abs().max() <= 0.5, "torchvision rounds to pixels"
    areas = (anchors[0][:, 2:] - anchors[0][:, :2]).prod(1)
    assert sorted({round(a) for a in areas.tolist()}) == [32**2, 64**2, 128**2, 256**2, 512**2]
    odd = Anchors([3.5])(
        ImageList(torch.zeros(1, 3, 1008, 1008), [(1008, 1008)]), [torch.zeros(1, 1, 288, 288)]
    )[0]
    assert torch.allclose(odd[-1, :2] + odd[-1, 2:], torch.tensor(2 * 3.5 * 287.0))


def test_masks_survive_cropping_to_their_boxes_and_pasting():
    ious, torchvision_ious = [], []
    for _, target in zip(range(20), batch(20, 128)[1], strict=True):
        masks, boxes = target["masks"], target["boxes"]
        cells = cut(masks, torch.arange(len(masks)), boxes)
        pasted = torch.stack([paste(mask, box, (128, 128)) for mask, box in zip(cells, boxes, strict=True)])
        torchvision_cells = project_masks_on_boxes(masks, boxes, torch.arange(len(masks)), 28)
        for result, values in (
            (pasted, ious),
            (
                paste_masks_in_image(torchvision_cells[:, None], boxes, (128, 128))[:, 0] >= 0.5,
                torchvision_ious,
            ),
        ):
            values += ((result & masks).flatten(1).sum(1) / (result | masks).flatten(1).sum(1)).tolist()
    assert sum(ious) / len(ious) > 0.99
    assert sum(torchvision_ious) / len(torchvision_ious) < 0.9, (
        "torchvision loses more, which is why it is not used"
    )


def test_a_mask_is_pasted_to_the_pixel_and_cut_at_the_border():
    boxes = torch.tensor([[2.0, 3.0, 7.0, 5.0], [-4.0, 6.4, 2.6, 30.0]])
    pasted = torch.stack([paste(torch.ones(28, 28), box, (10, 12)) for box in boxes])
    expected = torch.zeros(2, 10, 12, dtype=torch.bool)
    expected[0, 3:5, 2:7] = True
    expected[1, 6:, :3] = True  # pixel centers from 6.5 on, up to 2.5
    assert torch.equal(pasted, expected)


# --- training -----------------------------------------------------------------------------------------------


@PRESETS
@pytest.mark.parametrize("empty", [(), (1,), (0, 1)])
def test_every_weight_gets_a_gradient(preset, empty):
    model = small(preset=preset)
    losses = learn(model, *batch(2, empty=empty))
    assert list(losses) == [
        "loss_objectness",
        "loss_rpn_box_reg",
        "loss_classifier",
        "loss_box_reg",
        "loss_mask",
    ]
    assert all(v.isfinite() and v.dtype == torch.float32 for v in losses.values())
    assert (losses["loss_mask"] == 0) == (len(empty) == 2)
    assert [k for k, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    zero = [k for k, p in model.named_parameters() if not p.grad.any()]
    assert zero == [] or empty == (0, 1), "without objects, masks and box offsets have no gradient"
    assert all(b.isfinite().all() for b in model.buffers())


@PRESETS
def test_it_learns_one_image(preset):
    model, (images, targets) = small(preset=preset, size=64, **PLAIN_ATTENTION), batch(1, 64)
    s = dataclasses.replace(SMALL, layer_decay=0.9)
    optimizer = torch.optim.AdamW(groups(model, s), lr=2e-3)
    totals = []
    for _ in range(15):
        totals.append(float(sum(v.detach() for v in learn(model, images, targets).values())))
        optimizer.step()
        optimizer.zero_grad()
    assert totals[-1] < 0.6 * totals[0]


@PRESETS
def test_bf16_autocast(preset):
    model, (images, targets) = small(preset=preset, size=64), batch(2, 64)
    torch.manual_seed(0)
    expected = model.train()(images, targets)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = learn(model, images, targets)
        boxes = model.eval().detect(list(images), [(64, 64)] * 2)[0]["boxes"]
        proposals = model.rpn(ImageList(images, [(64, 64)] * 2), model.pyramid(images.float()))[0][0]
    assert {k: v.dtype for k, v in losses.items()} == dict.fromkeys(expected, torch.float32)
    assert all(
        float(losses[k].detach()) == pytest.approx(float(v.detach()), rel=0.05, abs=0.02)
        for k, v in expected.items()
    )
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for coordinates in (boxes, proposals):
        assert coordinates.dtype == torch.float32
        assert (coordinates != coordinates.bfloat16()).float().mean() > 0.5, (
            "coordinates are not rounded to bfloat16"
        )


def test_checkpointing_changes_nothing_but_memory(monkeypatch):
    gradients, calls, checkpoint = [], [], vision_transformer.checkpoint
    monkeypatch.setattr(
        vision_transformer, "checkpoint", lambda *args: calls.append(args) or checkpoint(*args)
    )
    for enable in (False, True):
        model = small(drop_path=0.5)
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        learn(model, *batch())
        gradients.append([p.grad for p in model.parameters()])
        assert len(calls) == enable * len(model.pyramid.vit.blocks)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@PRESETS
def test_learning_rates_decay_with_the_distance_from_the_head(preset):
    model = small(preset=preset, size=64)
    s = dataclasses.replace(SMALL, layer_decay=0.7, weight_decay=0.3)
    names = {p: k for k, p in model.named_parameters()}
    rates = {names[p]: (g["lr_scale"], g["weight_decay"]) for g in groups(model, s) for p in g["params"]}
    assert len(rates) == len(names) == sum(len(g["params"]) for g in groups(model, s))
    for name, (scale, decay) in rates.items():
        p, vit = model.get_parameter(name), name.removeprefix("pyramid.vit.")
        layer = 7 if vit == name else int(vit.split(".")[1]) + 1 if vit.startswith("blocks.") else 0
        assert scale == pytest.approx(0.7 ** (6 + 1 - layer)), name
        positions = "pos_embed" in name or "rel_pos" in name or "relative_position" in name
        assert decay == (0.3 if p.ndim > 1 and not positions else 0.0), name
    assert rates["pyramid.vit.pos_embed"] == (pytest.approx(0.7**7), 0.0)
    assert rates["pyramid.vit.blocks.5.mlp.fc1.weight"] == (pytest.approx(0.7), 0.3)
    if preset == "vitdet":
        assert rates["pyramid.vit.blocks.0.attn.rel_pos_h"] == (pytest.approx(0.7**6), 0.0)
    else:
        assert rates["pyramid.tables.grid.relative_position_bias_table"] == (1.0, 0.0)


def test_initial_weights_depend_on_the_seed_and_leave_global_generators_alone():
    b = backbone()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = small(b).state_dict()
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(v, one[k]) for k, v in small(b).state_dict().items())
    other = small(b, seed=1).state_dict()
    assert not torch.equal(
        other["heads.box_predictor.cls_score.weight"], one["heads.box_predictor.cls_score.weight"]
    )
    assert not torch.equal(other["pyramid.levels.0.0.weight"], one["pyramid.levels.0.0.weight"])


def test_building_a_detector_does_not_touch_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    small()  # otherwise torch warns, and reads the state of each generator


def test_settings_are_honored():
    model = small(width=8, box_width=12, box_convs=2, mask_convs=3, proposals=5)
    assert [c.out_channels for c in model.heads.box_head.modules() if isinstance(c, nn.Conv2d)] == [8, 8]
    assert [c.out_channels for c in model.heads.mask_head.modules() if isinstance(c, nn.Conv2d)] == [8, 8, 8]
    assert model.heads.box_predictor.cls_score.weight.shape == (11, 12)
    images = torch.zeros(2, 3, 32, 32)
    for mode in (True, False):
        proposals, _ = model.train(mode).rpn(
            ImageList(images, [(32, 32)] * 2), model.pyramid(images), batch()[1]
        )
        assert [len(p) for p in proposals] == [5, 5]
    for preset, norm in (("vitdet", nn.LayerNorm), ("benchmarking", nn.BatchNorm2d)):
        kinds = (nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm)
        norms = [
            m for k, m in small(preset=preset).named_modules() if isinstance(m, kinds) and "vit" not in k
        ]
        assert sum(isinstance(m, norm) for m in norms) == len(norms) - (preset == "benchmarking") > 9, (
            "all but the GroupNorm of MIMDet"
        )
        assert all(m.eps == (1e-6 if preset == "vitdet" else 1e-5) for m in norms)


@pytest.mark.parametrize("training", [True, False])
def test_duplicate_proposals_are_suppressed_before_the_limit(training, monkeypatch):
    model = small(size=64, proposals=2).train(training)

    def head(maps):
        """Ten anchors of the finest map predict the same box with the highest scores; one far away has a
        lower score."""
        logits, moves = (
            [m.new_full((1, n, *m.shape[-2:]), fill) for m in maps] for n, fill in ((3, -9.0), (12, 0.0))
        )
        for i in range(10):
            logits[0][0, 1, 8, 8 + i], moves[0][0, 4, 8, 8 + i] = 5 + i / 10, -i / ANCHOR
        logits[0][0, 1, 20, 20] = 1
        return logits, moves

    monkeypatch.setattr(model.rpn.head, "forward", head)
    images = torch.zeros(1, 3, 64, 64)
    (proposals,), _ = model.rpn(ImageList(images, [(64, 64)]), model.pyramid(images), batch(1, 64)[1])
    middles = (proposals[:, :2] + proposals[:, 2:]) / 2
    assert middles.flatten().tolist() == pytest.approx([16, 16, 40, 40]), "at cells 8 and 20 of stride 2"


@pytest.mark.slow
def test_it_finds_the_objects_it_was_trained_on():
    """End to end: boxes, classes and masks of one image, overfitted."""
    changes = {"scales": (2.0, 1.0), "width": 32, "box_width": 64, **PLAIN_ATTENTION}
    model, (images, targets) = small(backbone(depth=2), size=64, **changes), batch(1, 64, first=161)
    optimizer = torch.optim.AdamW(groups(model, dataclasses.replace(SMALL, layer_decay=1.0)))
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 150)
        learn(model, images, targets)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    detections, target = model.eval().detect(list(images), [(64, 64)])[0], targets[0]
    overlap, nearest = box_iou(target["boxes"], detections["boxes"]).max(1)
    masks, predicted = target["masks"], torch.stack(list(detections["masks"]))[nearest]
    assert len(overlap) == 3
    assert overlap.min() > 0.9
    assert torch.equal(detections["labels"][nearest], target["labels"])
    assert ((masks & predicted).flatten(1).sum(1) / (masks | predicted).flatten(1).sum(1)).min() > 0.85


# --- detection ----------------------------------------------------------------------------------------------


def test_objects_are_in_pixels_of_the_original():
    model, images = randomized(small(size=64)).eval(), batch(2, 64)[0]
    wide = [images[0], images[1][:, :40]]
    plain = model.detect(wide, [(64, 64), (40, 64)])
    large = model.detect(wide, [(192, 192), (100, 160)])
    for one, two, scale, shape in zip(plain, large, (3.0, 2.5), [(192, 192), (100, 160)], strict=True):
        assert len(one["scores"]) > 5
        assert torch.allclose(one["boxes"] * scale, two["boxes"], atol=1e-3)
        assert all(torch.equal(one[k], two[k]) for k in ("labels", "scores"))
        assert len(two["masks"]) == len(two["scores"])
        assert all(mask.dtype == torch.bool and mask.shape == shape for mask in two["masks"])
        assert (one["labels"] >= 1).all() and (one["labels"] <= 10).all()
    assert (plain[1]["boxes"][:, 3] <= 40).all()
    model.heads.score_thresh = 1.0
    nothing = model.detect(wide, [(64, 64), (40, 64)])[1]
    assert {k: tuple(nothing[k].shape) for k in ("boxes", "labels", "scores")} == {
        "boxes": (0, 4),
        "labels": (0,),
        "scores": (0,),
    }
    assert list(nothing["masks"]) == []


def test_neighbors_and_padding_do_not_matter():
    model, images = randomized(small(size=64)).eval(), batch(2, 64)[0]
    tall, wide, inputs = images[0][:, :, :30], images[1][:, :40], []
    model.pyramid.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    together = model.detect([tall, wide], [(64, 30), (40, 64)])
    for one, image, shape in zip(together, (tall, wide), [(64, 30), (40, 64)], strict=True):
        (alone,) = model.detect([image], [shape])
        assert torch.allclose(one["boxes"], alone["boxes"], atol=1e-3)
        assert torch.equal(one["labels"], alone["labels"])
    assert not inputs[0][0, :, :, 30:].any() and not inputs[0][1, :, 40:].any(), "zero is the mean color"
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    assert torch.allclose(inputs[0][1, :, :40], (wide / 255 - mean) / std, atol=1e-6)
    model.train()(images, batch(2, 64)[1])
    assert torch.allclose(inputs[-1], (images / 255 - mean) / std, atol=1e-6)


@pytest.mark.parametrize("preset", ["benchmarking", pytest.param("vitdet", marks=pytest.mark.slow)])
def test_the_exported_pyramid_gives_equal_maps(tmp_path, preset):
    model = randomized(small(backbone(depth=5), preset=preset, size=64, scales=(2.0, 1.0))).train()
    export_pyramid(model, tmp_path / "pyramid.pt2")
    assert model.pyramid.training
    model.eval()
    program = torch.export.load(tmp_path / "pyramid.pt2").module()
    for count in (1, 3):
        images = torch.rand(count, 3, 64, 64)
        expected, maps = model.pyramid((images - model.mean) / model.std), program(images)
        assert list(expected) == list(maps)
        assert all(torch.allclose(expected[k], maps[k], atol=1e-5) for k in expected)


@PRESETS
def test_a_detector_is_rebuilt_from_its_settings(preset):
    b, s = backbone(registers=1), dataclasses.replace(SMALL, preset=preset, size=64)
    model = randomized(detector(b, 10, s)).eval()
    facts = json.loads(
        json.dumps({"vit": blueprint(b.vit, architecture_of(b.vit)), "mean": MEAN, "std": STD})
    )
    again = rebuild(facts["vit"], 10, s, facts["mean"], facts["std"]).eval()
    again.load_state_dict(model.state_dict())
    images = list(batch(2, 64)[0])
    for one, two in zip(
        model.detect(images, [(64, 64)] * 2), again.detect(images, [(64, 64)] * 2), strict=True
    ):
        assert len(one["scores"]) and all(
            torch.allclose(one[k].float(), two[k].float(), atol=1e-5) for k in ("boxes", "labels", "scores")
        )
        assert all(torch.equal(*pair) for pair in zip(one["masks"], two["masks"], strict=True))


def test_impossible_settings_are_reported_in_one_line():
    class Other(VisionTransformer):
        pass

    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
    odd = VisionTransformer(**(options | {"patch_size": (8, 4)}))
    parallel = VisionTransformer(**options, block_fn=ParallelScalingBlock)
    for vit, changes, message in (
        (Other(**options), {}, "a Other is no plain VisionTransformer"),
        (parallel, {}, "a ParallelScalingBlock is not a plain block"),
        (odd, {}, "the backbone's patches of 8 x 4 px are not square"),
        (
            VisionTransformer(**options),
            {"size": 60},
            "size 60 is not a multiple of the backbone's patches of 8 px",
        ),
        (
            VisionTransformer(**options),
            {"size": 8},
            "size 8 is too small for a map of scale 0.5 of patches of 8 px; leave out the scale",
        ),
        (
            VisionTransformer(**options),
            {"size": 16, "preset": "benchmarking"},
            "size 16 is too small for a map of scale 0.5 of patches of 8 px; leave out the scale",
        ),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)) as e:
            small(Backbone(vit, MEAN, STD), **changes)
        assert "\n" not in str(e.value)


def test_recipes_are_read(tmp_path):
    assert set(shipped_recipes("detection")) == {
        "bundled",
        "vitdet-base",
        "vitdet-large",
        "benchmarking-base",
        "benchmarking-large",
    }
    for name in shipped_recipes("detection"):
        settings = load_detect(name)
        assert settings.preset == ("benchmarking" if name.startswith("bench") else "vitdet")
        (tmp_path / "x.toml").write_text(to_toml(settings))
        assert load_detect(str(tmp_path / "x.toml")) == settings
    base, large, paper = (load_detect(n) for n in ("vitdet-base", "vitdet-large", "benchmarking-base"))
    assert base == DetectionRecipe(epochs=100), "the defaults are those of ViTDet"
    assert (large.layer_decay, large.drop_path) == (0.8, 0.4)
    assert (paper.window, paper.layer_decay, paper.schedule, paper.warmup_steps) == (16, 1.0, "cosine", 461)
    (tmp_path / "x.toml").write_text("steps = 3\nscales = [2, 1, 'x']\n")
    with pytest.raises(ConfigError, match="scales must be of type float, not 'x'"):
        load_detect(str(tmp_path / "x.toml"))
