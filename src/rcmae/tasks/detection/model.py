"""Mask R-CNN on a plain Vision Transformer, from torchvision's parts.

Presets: `vitdet` (Li et al. 2022, arXiv:2203.16527) and `benchmarking` (Li et al. 2021, arXiv:2111.11429, as in MIMDet, on which the RC-MAE
paper builds). The facts are detectron2's (configs/common/models/mask_rcnn_vitdet.py, modeling/backbone/vit.py, projects/ViTDet) and
MIMDet's (configs/benchmarking, models/benchmarking.py). What is not torchvision's, to agree with them:

- Regions, mask targets and pasted masks keep to pixel centres. torchvision's are half a pixel or more off, which alone holds the masks of
  the embedded scenes (128 px) at a mean IoU of 0.85 with the truth; here it is 0.997.
- Boxes and losses are float32 under autocast. torchvision's anchors and decoded boxes take the type of the maps, and bf16 rounds a
  coordinate of 1000 to 4 pixels. (The logits and moves that enter have the precision of the layer that makes them.)
- Strides are exact (those of a patch of 14 too), anchors not rounded, the proposals' head has two convolutions, and the last layers start
  at detectron2's scale.

What still differs from them: boxes and mask targets are those of masks drawn in pixels and resized (theirs: of the polygons themselves),
which tells below some 32 px of a view; the box head's linear layer starts at 0.58 of detectron2's scale, MIMDet's upsampling likewise,
biases of both not at 0; ViTDet's positions are resized once, to the size of training (theirs: in every step); smooth L1 with beta 1/9 for
boxes (theirs: L1); mask targets between 0 and 1 (theirs: cut at 0.5); the proposals' losses are means over the anchors drawn (theirs: over
256 an image, the same unless there are fewer); biases and decomposed relative positions have no weight decay; positions are the pre-trained
ones (MIMDet: sines and cosines made anew, transposed); paths are dropped by image (MIMDet: by window). In training, regions are cut to the
square (theirs: to what the image fills of it), images without objects take part, and objects below LEAST pixels do not; the two offsets of
a crop are drawn apart. MIMDet pads with grey and flips last. Soft-NMS, cascades and augmentation in testing are not here.
"""

import io
import re
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, box_area, roi_align
from torchvision.ops._utils import convert_boxes_to_roi_format

from ...engine.checkpoint import replace_file
from ...models.backbone import Backbone
from .masks import Masks
from .pyramid import LayerNorm2d, Pyramid
from .settings import Detect

ANCHOR = 8
"Side of a map's anchors in strides: 32 px at stride 4 to 512 px at 64, as in detectron2, at any size of image."
CELLS = 14
"A box is pooled from the coarsest map on which its side is this many strides or more, else from the finest (224 px at stride 16)."
CANDIDATES = {"training": 2000, "testing": 1000}
"The best anchors of a map, before those that overlap go and `proposals` stay: detectron2's numbers. Of fewer, one object may have all."

Target = dict[str, Tensor]
'''boxes Float "n 4" (x0, y0, x1, y1 in pixels), labels Int "n" from 1, masks Bool "n s s"'''


class Detector(nn.Module):
    """Backbone and pyramid, proposals, heads. Losses by `forward` (through DDP), objects by `detect`.

    Several CUDA ranks want `nn.SyncBatchNorm.convert_sync_batchnorm` of the preset benchmarking (the CPU has no such thing).
    """

    def __init__(self, pyramid: Pyramid, rpn: RegionProposalNetwork, heads: "Heads", size: int, mean: Tensor, std: Tensor):
        super().__init__()
        self.pyramid, self.rpn, self.heads, self.size = pyramid, rpn, heads, size
        self.register_buffer("mean", mean.detach().clone(), persistent=False)
        self.register_buffer("std", std.detach().clone(), persistent=False)

    def forward(self, images: UInt8[Tensor, "b c s s"], targets: list[Target]) -> dict[str, Float[Tensor, ""]]:
        """loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg, loss_mask; their sum is learned from. In training mode."""
        x = (images.float() / 255 - self.mean) / self.std
        maps, shapes = self.pyramid(x), [(self.size, self.size)] * len(x)
        proposals, losses = self.rpn(ImageList(x, shapes), maps, targets)
        return losses | self.heads(maps, proposals, shapes, targets)

    @torch.no_grad()
    def detect(self, images: list[UInt8[Tensor, "c _ _"]], originals: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """Objects of images that were resized until their longer side is `size`. In evaluation mode.

        `originals` are the heights and widths they had before. Returns, for each image, boxes Float "m 4" in pixels of the original, labels
        Int "m" from 1, scores Float "m" (falling), and as masks a sequence of m Bool "h w" as large as the original, each of which is made
        when it is asked for; at most 100 objects.
        """
        x = self.mean.new_zeros(len(images), self.mean.shape[1], self.size, self.size)
        shapes = [(image.shape[1], image.shape[2]) for image in images]
        for place, image, (h, w) in zip(x, images, shapes, strict=True):
            place[:, :h, :w] = (image.float() / 255 - self.mean[0]) / self.std[0]
        maps = self.pyramid(x)
        proposals, _ = self.rpn(ImageList(x, shapes), maps)
        found = self.heads(maps, proposals, shapes)
        for target, (h, w), (height, width) in zip(found, shapes, originals, strict=True):
            target["boxes"] = target["boxes"] * target["boxes"].new_tensor([width / w, height / h, width / w, height / h])
            pairs = list(zip(target["masks"], target["boxes"], strict=True))
            target["masks"] = Masks(pairs, lambda pair, shape=(height, width): paste(*pair, shape))
        return found

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep a block's input only, and compute the rest again in the backward pass."""
        self.pyramid.vit.set_grad_checkpointing(enable)


def detector(backbone: Backbone, classes: int, settings: Detect) -> Detector:
    """A detector of `classes` kinds of objects on a copy of the backbone, all of it trainable. New weights are those of `settings.seed`.

    Raises ConfigError when the backbone is no plain ViT or does not fit `settings.size`.
    """
    s, width = settings, settings.width
    with torch.random.fork_rng(devices=[]):  # it is built on the CPU
        torch.manual_seed(s.seed)
        pyramid = Pyramid(backbone.vit, s)
        norm = LayerNorm2d if s.preset == "vitdet" else nn.BatchNorm2d
        box_predictor, mask_predictor = FastRCNNPredictor(s.box_width, classes + 1), MaskRCNNPredictor(width, width, classes + 1)
        for layer, std in ((box_predictor.cls_score, 0.01), (box_predictor.bbox_pred, 0.001), (mask_predictor.mask_fcn_logits, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        rpn = RegionProposalNetwork(
            Anchors([*pyramid.strides, 2 * pyramid.strides[-1]]), ProposalHead(width, 3, conv_depth=2),
            fg_iou_thresh=0.7, bg_iou_thresh=0.3, batch_size_per_image=256, positive_fraction=0.5,
            pre_nms_top_n=CANDIDATES,
            post_nms_top_n={"training": s.proposals, "testing": s.proposals}, nms_thresh=0.7,
        )  # fmt: skip
        heads = Heads(
            Pooler(pyramid.strides, 7), FastRCNNConvFCHead((width, 7, 7), [width] * s.box_convs, [s.box_width], norm), box_predictor,
            fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=512, positive_fraction=0.25, bbox_reg_weights=None,
            score_thresh=0.05, nms_thresh=0.5, detections_per_img=100, mask_roi_pool=Pooler(pyramid.strides, 14),
            mask_head=MaskRCNNHeads(width, [width] * s.mask_convs, 1, norm), mask_predictor=mask_predictor,
        )  # fmt: skip
    return Detector(pyramid, rpn, heads, s.size, backbone.mean, backbone.std)


def rebuild(architecture: dict[str, Any], classes: int, settings: Detect, mean: tuple[float, ...], std: tuple[float, ...]) -> Detector:
    """The detector whose weights are to be loaded: `architecture` is the `interop.timm_export.blueprint` of the backbone's ViT."""
    vit = timm.create_model(architecture["architecture"], pretrained=False, num_classes=0, **architecture["model_args"])
    return detector(Backbone(vit, tuple(mean), tuple(std)), classes, settings)


def groups(model: Detector, settings: Detect) -> list[dict[str, Any]]:
    """Groups for AdamW, each with a `weight_decay` and an `lr_scale` by which whoever sets `lr` must multiply it.

    The scale is layer_decay ** (depth + 1 - layer): layer 0 are the ViT's patch embedding and positions, 1 to depth its blocks with their
    relative positions, depth + 1 all else, tables that blocks share among it: they are as new as the pyramid. No weight decay for
    vectors, positions and relative positions.
    """
    depth, found = len(model.pyramid.vit.blocks), {}
    for name, p in model.named_parameters():
        block = re.match(r"pyramid\.vit\.(?:blocks\.(\d+))?", name)
        layer = depth + 1 if block is None else int(block[1]) + 1 if block[1] else 0
        plain = p.ndim <= 1 or re.search("pos_embed|rel_pos|relative_position", name) is not None
        found.setdefault((layer, plain), []).append(p)
    return [
        {"params": ps, "weight_decay": 0.0 if plain else settings.weight_decay, "lr_scale": settings.layer_decay ** (depth + 1 - layer)}
        for (layer, plain), ps in found.items()
    ]


def export_pyramid(model: Detector, path: Path) -> None:
    """Write standardisation, backbone and pyramid as a program: `torch.export.load(path).module()(images)`, for batches of any size.

    It takes pixels in 0 to 1, "b c s s", and returns the maps by name.
    """
    training, images = model.training, model.mean.new_zeros(2, model.mean.shape[1], model.size, model.size)
    with torch.no_grad():
        program = torch.export.export(_Standardised(model.eval()), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    model.train(training)
    content = io.BytesIO()
    torch.export.save(program, content)
    replace_file(path, content.getvalue())


class _Standardised(nn.Module):
    def __init__(self, model: Detector):
        super().__init__()
        self.pyramid, self.mean, self.std = model.pyramid, model.mean, model.std

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.pyramid((images - self.mean) / self.std)


# --- torchvision's parts, made exact ----------------------------------------------------------------------------------


class Anchors(AnchorGenerator):
    """Three anchors (height to width 1:2, 1:1, 2:1) at every place of every map, centred at multiples of its stride, float32."""

    def __init__(self, strides: list[float]):
        super().__init__(tuple((ANCHOR * s,) for s in strides), ((0.5, 1.0, 2.0),) * len(strides))
        self.strides = [[s, s] for s in strides]

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device=torch.device("cpu")) -> Float[Tensor, "a 4"]:
        h = torch.tensor([s * r**0.5 for r in aspect_ratios for s in scales], dtype=dtype, device=device)
        w = torch.tensor([s / r**0.5 for r in aspect_ratios for s in scales], dtype=dtype, device=device)
        return torch.stack([-w, -h, w, h], 1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Float[Tensor, "n 4"]]:
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        return [torch.cat(self.grid_anchors([m.shape[-2:] for m in feature_maps], self.strides))] * len(image_list.image_sizes)


class ProposalHead(RPNHead):
    """Logits and moves of the anchors, float32 whatever the precision of the network."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, moves = super().forward(x)
        return [m.float() for m in logits], [m.float() for m in moves]


class Pooler(MultiScaleRoIAlign):
    """Regions of the maps, sampled at pixel centres (RoIAlign with `aligned`), as densely as each region is large."""

    def __init__(self, strides: list[float], side: int):
        super().__init__([str(i) for i in range(len(strides))], side, sampling_ratio=0)
        self.strides = strides

    def forward(
        self, x: dict[str, Tensor], boxes: list[Float[Tensor, "_ 4"]], image_shapes: list[tuple[int, int]]
    ) -> Float[Tensor, "n width side side"]:
        """Boxes of each image, in pixels, from the map that fits their size."""
        regions, maps = convert_boxes_to_roi_format(boxes), [x[name] for name in self.featmap_names]
        sides = box_area(regions[:, 1:]).sqrt()
        levels = torch.bucketize(sides, sides.new_tensor([CELLS * s for s in self.strides[1:]]), right=True)
        pooled = maps[0].new_zeros(len(regions), maps[0].shape[1], *self.output_size)
        for i, (features, stride) in enumerate(zip(maps, self.strides, strict=True)):
            own = torch.where(levels == i)[0]
            part = roi_align(features, regions[own], self.output_size, 1 / stride, self.sampling_ratio, aligned=True)
            pooled[own] = part.to(pooled.dtype)
        return pooled


class Heads(RoIHeads):
    """torchvision's heads, with mask targets that keep to pixel centres."""

    def forward(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]], targets: list[Target] | None = None
    ) -> dict[str, Float[Tensor, ""]] | list[Target]:
        """With targets, the losses; without, boxes, labels, scores and masks (probabilities "m 28 28" within the box) of each image."""
        if targets is not None:
            proposals, matches, labels, moves = self.select_training_samples(proposals, targets)
        pooled = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, predicted = (x.float() for x in self.box_predictor(pooled))
        if targets is None:
            boxes, scores, labels = self.postprocess_detections(logits, predicted, proposals, image_shapes)
            masks = [m.squeeze(1) for m in maskrcnn_inference(self.masks(features, boxes, image_shapes), labels)]
            found = zip(boxes, labels, scores, masks, strict=True)
            return [dict(zip(("boxes", "labels", "scores", "masks"), one, strict=True)) for one in found]
        loss_classifier, loss_box_reg = fastrcnn_loss(logits, predicted, labels, moves)
        chosen = [own > 0 for own in labels]
        boxes = [b[own] for b, own in zip(proposals, chosen, strict=True)]
        if not any(map(len, boxes)):  # where ranks share BatchNorm's statistics, each must have a region: one that teaches nothing
            boxes[0] = boxes[0].new_tensor([[0, 0, image_shapes[0][1], image_shapes[0][0]]])
            nothing = 0 * self.masks(features, boxes, image_shapes).sum()
            return {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg, "loss_mask": nothing}
        logits = self.masks(features, boxes, image_shapes)
        logits = logits[torch.arange(len(logits), device=logits.device), torch.cat([own[own > 0] for own in labels])]
        wanted = [cut(t["masks"], m[own], b) for t, m, own, b in zip(targets, matches, chosen, boxes, strict=True)]
        loss_mask = F.binary_cross_entropy_with_logits(logits, torch.cat(wanted), reduction="sum") / logits.numel()
        return {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg, "loss_mask": loss_mask}

    def masks(self, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]) -> Float[Tensor, "n k 28 28"]:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, shapes))).float()


def cut(
    masks: Bool[Tensor, "n h w"], which: Int[Tensor, " m"], boxes: Float[Tensor, "m 4"], side: int = 28
) -> Float[Tensor, "m {side} {side}"]:
    """The share of the object `which` in each cell of a grid over its box."""
    used, places = which.unique(return_inverse=True)  # as numbers a mask takes four times as much
    regions = torch.cat([places[:, None].to(boxes.dtype), boxes], 1)
    return roi_align(masks[used, None].float(), regions, side, aligned=True)[:, 0]


def paste(mask: Float[Tensor, "g g"], box: Float[Tensor, "4"], shape: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """The reverse, of one object: where the probability, interpolated at pixel centres, is 0.5 or more."""
    canvas = mask.new_zeros(shape, dtype=torch.bool)
    left, top = box[:2].floor().clamp(min=0).int().tolist()
    right, bottom = box[2:].ceil().minimum(box.new_tensor(shape[::-1])).int().tolist()
    x, y = ((torch.arange(a, b, device=box.device) + 0.5 - box[i]) / (box[i + 2] - box[i]) * 2 - 1
            for i, a, b in ((0, left, right), (1, top, bottom)))  # fmt: skip
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), 2)
    canvas[top:bottom, left:right] = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= 0.5
    return canvas
