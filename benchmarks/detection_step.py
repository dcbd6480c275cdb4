"""Speed and memory of a training step of detection: `python -m benchmarks.detection_step [--side 512]
[--batch 1] [--rounds 5]`.

Both presets on a ViT and torchvision's maskrcnn_resnet50_fpn_v2, on the same fixed images with eight objects
each: losses, backward pass, AdamW. Each implementation has its own process and makes one step per round,
strictly in turn. A ratio is the median over rounds of torchvision's time divided by ours, with the smallest
and the largest. Memory is the peak of the process (CPU) or of the allocator (CUDA). Writes
results/detection_step.json (on a GPU detection_step_cuda.json).
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

from benchmarks import ROOT, markdown
from benchmarks.step import Implementations, measure
from rcmae.engine.distributed import pick_device, pick_precision
from rcmae.engine.run import describe_machine, write_json
from rcmae.models.backbone import IMAGENET, Backbone
from rcmae.tasks.detection.model import detector, groups
from rcmae.tasks.detection.settings import load_detect

CLASSES, OBJECTS = 80, 8
REFERENCE = "torchvision maskrcnn_resnet50_fpn_v2"


def batch_of(side: int, batch: int, device: torch.device) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Noise images, with boxes from a fortieth to a half of the side, each filled by its mask."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=draws).to(device)
    targets = []
    for _ in range(batch):
        sides = side * 0.5 * 20 ** -torch.rand(OBJECTS, 2, generator=draws)
        first = (side - sides) * torch.rand(OBJECTS, 2, generator=draws)
        boxes = torch.cat([first, first + sides], 1)
        masks = torch.zeros(OBJECTS, side, side, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.round().int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        labels = torch.randint(1, CLASSES + 1, (OBJECTS,), generator=draws)
        targets.append({k: v.to(device) for k, v in (("boxes", boxes), ("labels", labels), ("masks", masks))})
    return images, targets


def stepper(
    losses: Callable[[], dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    precision: str,
    device: torch.device,
) -> Callable[[], None]:
    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = cast(Tensor, sum(losses().values()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(
    side: str, recipe: str, model: str, precision: str, batch: int, device: torch.device
) -> Callable[[], None]:
    vit = cast(VisionTransformer, timm.create_model(model, num_classes=0))
    settings = replace(load_detect(recipe), size=int(side))
    net = detector(Backbone(vit, *IMAGENET), CLASSES, settings).to(device).train()
    images, targets = batch_of(int(side), batch, device)
    optimizer = torch.optim.AdamW(groups(net, settings), lr=1e-5, fused=True)
    return stepper(lambda: net(images, targets), optimizer, precision, device)


def torchvisions(side: str, precision: str, batch: int, device: torch.device) -> Callable[[], None]:
    size = int(side)
    net = maskrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=CLASSES + 1, min_size=size, max_size=size
    )
    net.to(device).train()
    images, targets = batch_of(size, batch, device)
    targets = [t | {"masks": t["masks"].to(torch.uint8)} for t in targets]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    return stepper(lambda: net(list(images.float() / 255), targets), optimizer, precision, device)


def implementations(model: str, precision: str) -> Implementations:
    """torchvision's detector and our presets."""
    makers: dict[str, Any] = {f"{REFERENCE} {precision}": (torchvisions, (precision,))}
    name = model.removesuffix("_224")
    return makers | {
        f"{preset} {name} {precision}": (ours, (f"{preset}-base", model, precision))
        for preset in ("vitdet", "benchmarking")
    }


def table(*results: dict[str, Any]) -> str:
    """One table per device."""
    tables = []
    for result in results:
        about = result["conditions"]
        rows = [
            [
                row["name"],
                f"{row['images_per_s']:.2f}",
                f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})",
                f"{row['peak_mib']:,.0f}",
            ]
            for row in result["rows"]
        ]
        note = (
            f"{about['side']} px, {result['rows'][0]['batch']} images per step, {about['rounds']} rounds; "
            f"{markdown.device_name(about)}, {about['threads']} threads, torch {about['torch']}."
        )
        head = ["", "images/s", "speed relative to torchvision", "peak memory, MiB"]
        tables.append(markdown.table(head, rows, note))
    return "\n\n".join(tables)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--models", default="vit_small_patch16_224,vit_base_patch16_224")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = pick_device(options.device)
    precision, load = pick_precision("auto", device), os.getloadavg()[0]
    makers: Implementations = {}
    for model in options.models.split(","):
        makers |= implementations(model, precision)
    rows = measure(
        str(options.side), options.batch, makers, f"{REFERENCE} {precision}", options.rounds, device
    )
    conditions = describe_machine(device, precision) | {
        "rounds": options.rounds,
        "load_before": load,
        "side": options.side,
    }
    if len(rows) < len(makers):
        raise SystemExit("not all implementations fit into memory, nothing is written; try a smaller --batch")
    print(f"{'implementation':45s} {'images/s':>9s} {'speed against torchvision':>26s} {'peak MiB':>9s}")
    for row in rows:
        ratio = f"{row['ratio']:.2f}x [{row['lowest']:.2f}-{row['highest']:.2f}]"
        print(f"{row['name']:45s} {row['images_per_s']:9.2f} {ratio:>26s} {row['peak_mib']:9.0f}")
    suffix = "_cuda" if device.type == "cuda" else ""
    write_json(ROOT / "results" / f"detection_step{suffix}.json", {"conditions": conditions, "rows": rows})


if __name__ == "__main__":
    main()
