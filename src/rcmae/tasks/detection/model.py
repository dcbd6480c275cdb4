"""Mask R-CNN on a plain Vision Transformer, built from torchvision's modules.

Presets: `vitdet` (Li et al. 2022, arXiv:2203.16527) and `benchmarking` (Li et al. 2021, arXiv:2111.11429, as
in MIMDet, on which the RC-MAE paper builds). The references are detectron2
(configs/common/models/mask_rcnn_vitdet.py, modeling/backbone/vit.py, projects/ViTDet) and MIMDet
(configs/benchmarking, models/benchmarking.py). Changes to torchvision's modules, to agree with them:

- Regions, mask targets and pasted masks are aligned to pixel centers. torchvision's are off by half a pixel
  or more, which alone limits the masks of the bundled scenes (128 px) to a mean IoU of 0.85 with the ground
  truth; here it is 0.997.
- Boxes and losses are float32 under autocast. torchvision's anchors and decoded boxes have the dtype of the
  feature maps, and bf16 rounds a coordinate of 1000 to 4 pixels. (The logits and box deltas themselves have
  the precision of the layer that computes them.)
- Strides are exact (also for a patch size of 14), anchors are not rounded, the RPN head has two convolutions,
  and the last layers are initialized with detectron2's scale.

Remaining differences from the references:

- Boxes and mask targets are computed from rasterized and resized masks (references: from polygons), which
  matters for objects below about 32 px in a view.
- The box head's linear layer is initialized with 0.58 of detectron2's scale, as is MIMDet's upsampling, and
  their biases are not initialized to 0.
- ViTDet's position embeddings are resized once, to the training size (references: in every step); they are
  the pre-trained ones (MIMDet: sine-cosine embeddings are recomputed, transposed).
- The box loss is smooth L1 with beta 1/9 (references: L1), mask targets are fractions in 0 to 1 (references:
  thresholded at 0.5), and RPN losses are means over the sampled anchors (references: over 256 per image,
  which is the same unless there are fewer).
- Biases and decomposed relative positions have no weight decay; paths are dropped by image (MIMDet: by
  window).
- In training, regions are clipped to the square (references: to the part that the image fills), images
  without objects are used, objects below MIN_PIXELS are not, and the two offsets of a crop are drawn
  independently. MIMDet pads with gray and flips last.
- There is no soft-NMS, no cascade and no test-time augmentation.
"""

import functools
import io
import re
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from timm.models.vision_transformer import VisionTransformer
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
from .settings import DetectionRecipe

ANCHOR = 8
"""Side of a map's anchors in strides: from 32 px at stride 4 to 512 px at stride 64, as in detectron2, for
any image size."""
CELLS = 14
"""A box is pooled from the coarsest map on which its side is at least this many strides, else from the finest
(224 px at stride 16)."""
CANDIDATES = {"training": 2000, "testing": 1000}
"""Number of the best anchors of a map that are kept before NMS reduces them to `proposals`: detectron2's
values. With fewer, a single object may take all of them."""

Target = dict[str, Tensor]
'''boxes Float "n 4" (x0, y0, x1, y1 in pixels), labels Int "n" from 1, masks Bool "n s s"'''


class Detector(nn.Module):
    """Backbone and pyramid, RPN, heads. `forward` returns losses (and works through DDP), `detect` objects.

    With several CUDA ranks, the preset benchmarking needs `nn.SyncBatchNorm.convert_sync_batchnorm` (which
    does not exist on the CPU).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        pyramid: Pyramid,
        rpn: RegionProposalNetwork,
        heads: "Heads",
        size: int,
        mean: Tensor,
        std: Tensor,
    ):
        super().__init__()
        self.pyramid, self.rpn, self.heads, self.size = pyramid, rpn, heads, size
        self.register_buffer("mean", mean.detach().clone(), persistent=False)
        self.register_buffer("std", std.detach().clone(), persistent=False)

    def forward(
        self, images: UInt8[Tensor, "b c s s"], targets: list[Target]
    ) -> dict[str, Float[Tensor, ""]]:
        """The losses loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg and loss_mask, whose
        sum is minimized. Requires training mode."""
        x = (images.float() / 255 - self.mean) / self.std
        maps, shapes = self.pyramid(x), [(self.size, self.size)] * len(x)
        proposals, losses = self.rpn(ImageList(x, shapes), maps, targets)
        return losses | self.heads(maps, proposals, shapes, targets)

    @torch.no_grad()
    def detect(
        self, images: list[UInt8[Tensor, "c _ _"]], originals: list[tuple[int, int]]
    ) -> list[dict[str, Any]]:
        """Detect at most 100 objects in each image. The images are resized so that their longer side is
        `size`. Requires evaluation mode.

        `originals` are the heights and widths before resizing. Returns for each image: boxes Float "m 4" in
        pixels of the original, labels Int "m" from 1, scores Float "m" in descending order, and masks, a
        sequence of m Bool "h w" of the original size, which are computed on access.
        """
        x = self.mean.new_zeros(len(images), self.mean.shape[1], self.size, self.size)  # [b, c, s, s]
        shapes = [(image.shape[1], image.shape[2]) for image in images]
        for canvas, image, (h, w) in zip(x, images, shapes, strict=True):
            canvas[:, :h, :w] = (image.float() / 255 - self.mean[0]) / self.std[0]
        maps = self.pyramid(x)
        proposals, _ = self.rpn(ImageList(x, shapes), maps)
        detections = self.heads(maps, proposals, shapes)
        for detection, (h, w), original in zip(detections, shapes, originals, strict=True):
            height, width = original
            scale = detection["boxes"].new_tensor([width / w, height / h, width / w, height / h])
            detection["boxes"] = detection["boxes"] * scale
            pairs = list(zip(detection["masks"], detection["boxes"], strict=True))
            detection["masks"] = Masks(pairs, functools.partial(_paste_pair, shape=original))
        return detections

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Save only the inputs of the blocks, and recompute the activations in the backward pass."""
        self.pyramid.vit.set_grad_checkpointing(enable)


def _paste_pair(pair: tuple[Tensor, Tensor], shape: tuple[int, int]) -> Tensor:
    return paste(*pair, shape)


def detector(backbone: Backbone, classes: int, settings: DetectionRecipe) -> Detector:
    """A detector for `classes` classes on a copy of the backbone, with all weights trainable. New weights are
    initialized with `settings.seed`.

    Raises ConfigError if the backbone is no plain ViT or does not fit `settings.size`.
    """
    s, width = settings, settings.width
    with torch.random.fork_rng(devices=[]):  # the weights are initialized on the CPU
        torch.manual_seed(s.seed)
        pyramid = Pyramid(backbone.vit, s)
        norm = LayerNorm2d if s.preset == "vitdet" else nn.BatchNorm2d
        box_predictor, mask_predictor = (
            FastRCNNPredictor(s.box_width, classes + 1),
            MaskRCNNPredictor(width, width, classes + 1),
        )
        for layer, std in (
            (box_predictor.cls_score, 0.01),
            (box_predictor.bbox_pred, 0.001),
            (mask_predictor.mask_fcn_logits, 0.001),
        ):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        rpn = RegionProposalNetwork(
            Anchors([*pyramid.strides, 2 * pyramid.strides[-1]]),
            ProposalHead(width, 3, conv_depth=2),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=CANDIDATES,
            post_nms_top_n={"training": s.proposals, "testing": s.proposals},
            nms_thresh=0.7,
        )
        heads = Heads(
            Pooler(pyramid.strides, 7),
            FastRCNNConvFCHead((width, 7, 7), [width] * s.box_convs, [s.box_width], norm),
            box_predictor,
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=512,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            mask_roi_pool=Pooler(pyramid.strides, 14),
            mask_head=MaskRCNNHeads(width, [width] * s.mask_convs, 1, norm),
            mask_predictor=mask_predictor,
        )
    return Detector(pyramid, rpn, heads, s.size, backbone.mean, backbone.std)


def rebuild(
    architecture: dict[str, Any],
    classes: int,
    settings: DetectionRecipe,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Detector:
    """A detector to load weights into: `architecture` is the `models.blueprint.blueprint` of the
    backbone's ViT."""
    vit = timm.create_model(
        architecture["architecture"], pretrained=False, num_classes=0, **architecture["model_args"]
    )
    assert isinstance(vit, VisionTransformer)  # see check_backbone
    return detector(Backbone(vit, tuple(mean), tuple(std)), classes, settings)


def groups(model: Detector, settings: DetectionRecipe) -> list[dict[str, Any]]:
    """Parameter groups for AdamW, each with a `weight_decay` and an `lr_scale`, a factor of the learning rate
    that the caller has to apply.

    The scale is layer_decay ** (depth + 1 - layer): layer 0 consists of the ViT's patch embedding and
    position embedding; layers 1 to depth are its blocks with their relative positions; layer depth + 1 is
    everything else, including the tables that blocks share, which are newly initialized like the pyramid.
    Vectors, position embeddings and relative positions have no weight decay.
    """
    depth = len(model.pyramid.vit.blocks)
    by_layer: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        block = re.match(r"pyramid\.vit\.(?:blocks\.(\d+))?", name)
        layer = depth + 1 if block is None else int(block[1]) + 1 if block[1] else 0
        no_decay = p.ndim <= 1 or re.search("pos_embed|rel_pos|relative_position", name) is not None
        by_layer.setdefault((layer, no_decay), []).append(p)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if no_decay else settings.weight_decay,
            "lr_scale": settings.layer_decay ** (depth + 1 - layer),
        }
        for (layer, no_decay), parameters in by_layer.items()
    ]


def export_pyramid(model: Detector, path: Path) -> None:
    """Export standardization, backbone and pyramid as a program for batches of any size:
    `torch.export.load(path).module()(images)`.

    It takes pixels in 0 to 1, "b c s s", and returns the feature maps by name.
    """
    training, images = model.training, model.mean.new_zeros(2, model.mean.shape[1], model.size, model.size)
    with torch.no_grad():
        program = torch.export.export(
            _Standardized(model.eval()), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    model.train(training)
    content = io.BytesIO()
    torch.export.save(program, content)
    replace_file(path, content.getvalue())


class _Standardized(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, model: Detector):
        super().__init__()
        self.pyramid, self.mean, self.std = model.pyramid, model.mean, model.std

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.pyramid((images - self.mean) / self.std)


# --- torchvision's modules with the changes listed above ----------------------------------------------------


class Anchors(AnchorGenerator):
    """Three anchors (height to width 1:2, 1:1, 2:1) at every position of every map, centered at multiples of
    its stride, in float32."""

    def __init__(self, strides: list[float]):
        super().__init__(tuple((ANCHOR * s,) for s in strides), ((0.5, 1.0, 2.0),) * len(strides))
        self.strides = [[s, s] for s in strides]

    def generate_anchors(
        self, scales, aspect_ratios, dtype=torch.float32, device=torch.device("cpu")
    ) -> Float[Tensor, "a 4"]:
        h = torch.tensor([s * r**0.5 for r in aspect_ratios for s in scales], dtype=dtype, device=device)
        w = torch.tensor([s / r**0.5 for r in aspect_ratios for s in scales], dtype=dtype, device=device)
        return torch.stack([-w, -h, w, h], 1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Float[Tensor, "n 4"]]:
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        return [torch.cat(self.grid_anchors([m.shape[-2:] for m in feature_maps], self.strides))] * len(
            image_list.image_sizes
        )


class ProposalHead(RPNHead):
    """Logits and box deltas of the anchors, in float32 for any precision of the network."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [m.float() for m in logits], [m.float() for m in deltas]


class Pooler(MultiScaleRoIAlign):
    """Regions of the maps, sampled at pixel centers (RoIAlign with `aligned`), with a sampling density that
    adapts to the size of each region."""

    def __init__(self, strides: list[float], side: int):
        super().__init__([str(i) for i in range(len(strides))], side, sampling_ratio=0)
        self.strides = strides

    def forward(
        self, x: dict[str, Tensor], boxes: list[Float[Tensor, "_ 4"]], image_shapes: list[tuple[int, int]]
    ) -> Float[Tensor, "n width side side"]:
        """Pool the boxes of each image, in pixels, from the maps that fit their sizes."""
        regions, maps = convert_boxes_to_roi_format(boxes), [x[name] for name in self.featmap_names]
        sides = box_area(regions[:, 1:]).sqrt()
        levels = torch.bucketize(sides, sides.new_tensor([CELLS * s for s in self.strides[1:]]), right=True)
        pooled = maps[0].new_zeros(len(regions), maps[0].shape[1], *self.output_size)
        for i, (features, stride) in enumerate(zip(maps, self.strides, strict=True)):
            chosen = torch.where(levels == i)[0]
            part = roi_align(
                features, regions[chosen], self.output_size, 1 / stride, self.sampling_ratio, aligned=True
            )
            pooled[chosen] = part.to(pooled.dtype)
        return pooled


class Heads(RoIHeads):
    """torchvision's heads, with mask targets aligned to pixel centers."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> dict[str, Float[Tensor, ""]] | list[Target]:
        """With targets, return the losses; without, the boxes, labels, scores and masks (probabilities
        "m 28 28" within the box) of each image."""
        if targets is not None:
            proposals, matches, labels, delta_targets = self.select_training_samples(proposals, targets)
        pooled = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        class_logits, deltas = (x.float() for x in self.box_predictor(pooled))
        if targets is None:
            boxes, scores, labels = self.postprocess_detections(class_logits, deltas, proposals, image_shapes)
            probabilities = maskrcnn_inference(self.masks(features, boxes, image_shapes), labels)
            masks = [m.squeeze(1) for m in probabilities]
            return [
                {"boxes": b, "labels": k, "scores": s, "masks": m}
                for b, k, s, m in zip(boxes, labels, scores, masks, strict=True)
            ]
        loss_classifier, loss_box_reg = fastrcnn_loss(class_logits, deltas, labels, delta_targets)
        positive = [k > 0 for k in labels]
        boxes = [b[chosen] for b, chosen in zip(proposals, positive, strict=True)]
        if not any(map(len, boxes)):
            # Ranks that share BatchNorm statistics each need a region, so take one with zero loss.
            boxes[0] = boxes[0].new_tensor([[0, 0, image_shapes[0][1], image_shapes[0][0]]])
            zero = 0 * self.masks(features, boxes, image_shapes).sum()
            return {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg, "loss_mask": zero}
        mask_logits = self.masks(features, boxes, image_shapes)  # [n, classes + 1, 28, 28]
        rows = torch.arange(len(mask_logits), device=mask_logits.device)
        mask_logits = mask_logits[rows, torch.cat([k[k > 0] for k in labels])]  # [n, 28, 28]
        mask_targets = [
            cut(t["masks"], m[chosen], b)
            for t, m, chosen, b in zip(targets, matches, positive, boxes, strict=True)
        ]
        loss_mask = (
            F.binary_cross_entropy_with_logits(mask_logits, torch.cat(mask_targets), reduction="sum")
            / mask_logits.numel()
        )
        return {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg, "loss_mask": loss_mask}

    def masks(
        self, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]
    ) -> Float[Tensor, "n k 28 28"]:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, shapes))).float()


def cut(
    masks: Bool[Tensor, "n h w"], which: Int[Tensor, " m"], boxes: Float[Tensor, "m 4"], side: int = 28
) -> Float[Tensor, "m {side} {side}"]:
    """The fraction that the object `which` covers of each cell in a grid over its box."""
    used, index = which.unique(return_inverse=True)  # only used masks, since float takes 4 times the memory
    regions = torch.cat([index[:, None].to(boxes.dtype), boxes], 1)  # [m, 5]
    return roi_align(masks[used, None].float(), regions, side, aligned=True)[:, 0]


def paste(mask: Float[Tensor, "g g"], box: Float[Tensor, "4"], shape: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """The reverse of `cut` for one object: the pixels at whose centers the interpolated probability is 0.5 or
    more."""
    canvas = mask.new_zeros(shape, dtype=torch.bool)
    left, top = box[:2].floor().clamp(min=0).int().tolist()
    right, bottom = box[2:].ceil().minimum(box.new_tensor(shape[::-1])).int().tolist()
    x, y = (
        (torch.arange(a, b, device=box.device) + 0.5 - box[i]) / (box[i + 2] - box[i]) * 2 - 1
        for i, a, b in ((0, left, right), (1, top, bottom))
    )
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), 2)
    canvas[top:bottom, left:right] = (
        F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= 0.5
    )
    return canvas
