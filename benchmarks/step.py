"""Speed and memory of a training step: `python -m benchmarks.step [--sizes tiny,ti,s,b] [--rounds N] [--out
FILE]`.

Forward, backward, AdamW and the teacher's update on fixed random images: ours (`Pretraining.update`) in
float32 and in bf16, RC-MAE and MAE; the plain float32 reference of benchmarks/reference.py; and two other
packages, if installed (Hugging Face's ViTMAEForPreTraining, lightly's MAE modules; both are MAE, without a
teacher).

Each implementation has its own process and makes one step per round, strictly in turn. A ratio is the median
over rounds of the reference's time divided by the implementation's, with the smallest and the largest. Memory
is the peak of the process (CPU) or of the allocator (CUDA).
"""

import argparse
import importlib.util
import itertools
import json
import multiprocessing as mp
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import markdown
from benchmarks.reference import PlainStep
from rcmae.config import Images, Optim, Recipe, RuntimeConfig
from rcmae.engine.distributed import World, pick_device, pick_precision
from rcmae.engine.optim import adamw
from rcmae.engine.run import describe_machine, keep_freed_memory
from rcmae.engine.schedules import Progress
from rcmae.engine.step import LogWindow
from rcmae.methods import METHODS
from rcmae.methods.recipes import recipe_type
from rcmae.models.autoencoder import AutoencoderNetwork
from rcmae.models.backbone import IMAGENET
from rcmae.pretraining import Pretraining


class Size(NamedTuple):
    """A model, its images, and batches that use the device well."""

    label: str
    model: str
    side: int
    cpu_batch: int
    gpu_batch: int


SIZES = {
    "tiny": Size("128 wide, 32 px", "vit_tiny_small_images", 32, 128, 2048),
    "ti": Size("ViT-Ti/16", "vit_tiny_patch16", 224, 64, 1024),
    "s": Size("ViT-S/16", "vit_small_patch16", 224, 32, 512),
    "b": Size("ViT-B/16", "vit_base_patch16", 224, 8, 256),
}
REFERENCE = "plain RC-MAE fp32"


GOALS = {"fp32": 1.15, "bf16": 2.3}
"Least ratio of our RC-MAE by precision; peak memory should not exceed the reference's."


def recipe_of(size: str, method: str, batch: int) -> Recipe:
    """A method's default recipe at a size."""
    model, side = SIZES[size].model, SIZES[size].side
    return recipe_type(method)(
        images=Images(size=side), network=AutoencoderNetwork(model=model), optim=Optim(batch_size=batch)
    )


def method_of(size: str, name: str, batch: int) -> Any:
    """A method at a size."""
    return METHODS[name](recipe_of(size, name, batch), *IMAGENET)


def batch_of(method: Any, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random images and orders of their patches."""
    side = method.recipe.images.size
    order = torch.stack([torch.randperm(method.patches) for _ in range(batch)])
    return {
        "image": torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8).to(device),
        "order": order.to(device),
    }


def ours(size: str, name: str, precision: str, batch: int, device: torch.device) -> Callable[[], object]:
    """The step of `Pretraining`, with only those attributes that it needs."""
    method = method_of(size, name, batch).to(device)
    run: Any = Pretraining.__new__(Pretraining)
    run.recipe, run.runtime, run.world = method.recipe, RuntimeConfig(), World()
    run.device, run.precision = device, precision
    run.method = run.net = method
    run.optimizer = adamw(method.student, method.recipe.optim, 1e-3)
    run.batch_size, run.window = batch, LogWindow(device)
    run.batches, run.recorder, run.logs = itertools.repeat(batch_of(method, batch, device)), None, False
    return lambda: run.update(Progress(5, 100, 10))


def plain(size: str, batch: int, device: torch.device) -> Callable[[], object]:
    """The reference."""
    method = method_of(size, "mae", batch)
    step = PlainStep(method.student, method.visible)
    for model in (step.student, step.teacher):
        model.to(device)
        model.positions, model.dpositions = model.positions.to(device), model.dpositions.to(device)
    data = batch_of(method, batch, device)
    images = (data["image"].float() - method.mean.to(device)) / method.std.to(device)
    return lambda: step(images, data["order"])


def hugging_face(size: str, batch: int, device: torch.device) -> Callable[[], object]:
    """MAE of transformers."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    method = method_of(size, "mae", batch)
    vit, decoder, side = method.student.encoder.vit, method.student.decoder, SIZES[size].side
    config = ViTMAEConfig(
        hidden_size=vit.embed_dim,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=vit.blocks[0].attn.num_heads,
        intermediate_size=4 * vit.embed_dim,
        image_size=side,
        patch_size=method.patch,
        norm_pix_loss=True,
        decoder_hidden_size=decoder.embed.out_features,
        decoder_num_hidden_layers=len(decoder.blocks),
        decoder_num_attention_heads=decoder.blocks[0].attn.num_heads,
        decoder_intermediate_size=4 * decoder.embed.out_features,
    )
    network: Any = ViTMAEForPreTraining(config)
    model = network.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    images = torch.randn(batch, 3, side, side, device=device)

    def step() -> None:
        model(images).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def lightly(size: str, batch: int, device: torch.device) -> Callable[[], object]:
    """MAE of lightly, after its example."""
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    method = method_of(size, "mae", batch)
    ours, decoder, side = method.student.encoder.vit, method.student.decoder, SIZES[size].side
    vit = VisionTransformer(
        img_size=side,
        patch_size=method.patch,
        embed_dim=ours.embed_dim,
        depth=len(ours.blocks),
        num_heads=ours.blocks[0].attn.num_heads,
        num_classes=0,
    )
    backbone = MaskedVisionTransformerTIMM(vit=vit)
    head = MAEDecoderTIMM(
        num_patches=method.patches,
        patch_size=method.patch,
        embed_dim=ours.embed_dim,
        decoder_embed_dim=decoder.embed.out_features,
        decoder_depth=len(decoder.blocks),
        decoder_num_heads=decoder.blocks[0].attn.num_heads,
        mlp_ratio=4.0,
    )
    model = torch.nn.ModuleList([backbone, head]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    images, length = torch.randn(batch, 3, side, side, device=device), method.patches + 1

    def step() -> None:
        keep, mask = utils.random_token_mask((batch, length), mask_ratio=0.75, device=device)
        encoded = backbone.encode(images=images, idx_keep=keep)
        x = utils.repeat_token(head.mask_token, (batch, length))
        x = head.decode(utils.set_at_index(x, keep, head.embed(encoded).type_as(x)))
        prediction = head.predict(utils.get_at_index(x, mask))
        patches = utils.get_at_index(utils.patchify(images, method.patch), mask - 1)
        target = utils.normalize_mean_var(patches, dim=-1)
        torch.nn.functional.mse_loss(prediction, target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


Implementations = dict[str, tuple[Callable[..., Callable[[], object]], tuple[Any, ...]]]
"Name -> (maker, its arguments after the size); a maker returns the step."


def implementations(precision: str) -> Implementations:
    """The reference, ours, and the other packages that are installed."""
    makers: Implementations = {REFERENCE: (plain, ())}
    for method, label in (("rcmae", "RC-MAE"), ("mae", "MAE")):
        for p in ("fp32", "bf16") if precision == "bf16" else ("fp32",):
            makers[f"ours {label} {p}"] = (ours, (method, p))
    for module, label, maker in (
        ("transformers", "Hugging Face MAE fp32", hugging_face),
        ("lightly", "lightly MAE fp32", lightly),
    ):
        if importlib.util.find_spec(module):
            makers[label] = (maker, ())
        else:
            print(f"{label}: {module} is not installed, left out")
    return makers


def resident() -> tuple[float, float]:
    """Resident memory of this process in MiB: now, and at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":") for line in lines if ":" in line)
    now, peak = (int(values[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
    return now, peak


def serve(
    pipe: Connection,
    maker: Callable[..., Callable[[], object]],
    size: str,
    args: tuple[Any, ...],
    batch: int,
    device_name: str,
    threads: int,
) -> None:
    """The process of an implementation: a step for every message "step", until "done"."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = pick_device(device_name)
    if device.type == "cpu" and maker is ours:  # as `rcmae pretrain` does, and a plain script does not
        keep_freed_memory()
    before = resident()[0]
    step = maker(size, *args, batch, device)
    for _ in range(2):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    pipe.send("ready")
    while pipe.recv() == "step":
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else resident()[1] - before
    pipe.send(peak)


def measure(
    size: str, batch: int, makers: Implementations, reference: str, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each implementation, whose maker is called with (size, *arguments, batch, device)."""
    context = mp.get_context("spawn")
    pipes = {}
    for name, (maker, args) in makers.items():
        pipe, end = context.Pipe()
        arguments = (end, maker, size, args, batch, str(device), torch.get_num_threads())
        context.Process(target=serve, args=arguments, daemon=True).start()
        end.close()
        try:
            pipe.recv()
            pipes[name] = pipe
        except EOFError:
            print(f"{name} at {size} failed to start, left out")
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send("step")
            times[name].append(pipe.recv())
    rows = []
    for name, pipe in pipes.items():
        pipe.send("done")
        ratios = [a / b for a, b in zip(times[reference], times[name], strict=True)]
        rows.append(
            {
                "size": size,
                "name": name,
                "batch": batch,
                "images_per_s": batch / statistics.median(times[name]),
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "peak_mib": pipe.recv(),
            }
        )
    return rows


def utilization(rows: list[dict[str, Any]], device: torch.device) -> float:
    """The bf16 rate of matrix products of a CUDA device in FLOP/s; adds to our rows the fraction of it that
    the step reaches."""
    from torch.utils.flop_counter import FlopCounterMode

    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ a
    torch.cuda.synchronize()
    rate = 10 * 2 * 8192**3 / (time.perf_counter() - start)
    for row in rows:
        if row["name"].startswith("ours"):
            step = ours(row["size"], "mae" if " MAE" in row["name"] else "rcmae", "bf16", 8, device)
            with FlopCounterMode(display=False) as counter:
                step()
            row["utilization"] = counter.get_total_flops() / 8 * row["images_per_s"] / rate
    return rate


def table(results: dict[str, Any]) -> str:
    """The ratio of each implementation and size, and the goals that were missed."""
    by_name: dict[str, list[str]] = {}
    for row in results["rows"]:
        if row["name"] != REFERENCE:
            ratio = f"{row['ratio']:.2f}x [{row['lowest']:.2f}-{row['highest']:.2f}]"
            by_name.setdefault(row["name"], []).append(ratio)
    sizes = dict.fromkeys(row["size"] for row in results["rows"])
    about = results["conditions"]
    return markdown.table(
        ["", *(SIZES[size].label for size in sizes)],
        [[name, *ratios] for name, ratios in by_name.items()],
        f"Median and range of {about['rounds']} interleaved rounds; {about['cpu']}, {about['threads']} "
        f"threads, torch {about['torch']}.\n{_missed(results['rows'])}",
    )


def _missed(rows: list[dict[str, Any]]) -> str:
    by_key = {(row["size"], row["name"]): row for row in rows}
    missed = []
    for size, (label, *_) in SIZES.items():
        limit = by_key[size, REFERENCE]["peak_mib"]
        for precision, goal in GOALS.items():
            row = by_key[size, f"ours RC-MAE {precision}"]
            if row["ratio"] < goal:
                missed.append(f"{precision} at {label} is {row['ratio']:.2f}x")
            if row["peak_mib"] > limit:
                text = f"{row['peak_mib']:,.0f} MiB, the plain step {limit:,.0f}"
                missed.append(f"{precision} at {label} takes {text}")
    goals = ", ".join(f"{goal}x in {precision}" for precision, goal in GOALS.items())
    return f"Goals: {goals}, and no more peak memory. Missed: {'; '.join(missed) or 'none'}."


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="tiny,ti,s,b")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = pick_device(options.device)
    precision = pick_precision("auto", device)
    if precision == "fp32":
        print(f"{device.type} has no fast bf16 on this machine: float32 only")
    load = os.getloadavg()[0]
    makers, rows = implementations(precision), []
    for name in options.sizes.split(","):
        batch = SIZES[name].gpu_batch if device.type == "cuda" else SIZES[name].cpu_batch
        rows += measure(name, batch, makers, REFERENCE, options.rounds, device)
    conditions = describe_machine(device, precision) | {"rounds": options.rounds, "load_before": load}
    if device.type == "cuda":
        conditions["matrix_rate_tflops"] = utilization(rows, device) / 1e12
    print(
        f"{'size':5s} {'implementation':24s} {'batch':>5s} {'images/s':>9s} "
        f"{'speed against plain fp32':>26s} {'peak MiB':>9s}"
    )
    for row in rows:
        ratio = f"{row['ratio']:.2f}x [{row['lowest']:.2f}-{row['highest']:.2f}]"
        fraction = f"  {row['utilization']:.0%} of the device's bf16 rate" if "utilization" in row else ""
        print(
            f"{row['size']:5s} {row['name']:24s} {row['batch']:5d} {row['images_per_s']:9.1f} {ratio:>26s} "
            f"{row['peak_mib']:9.0f}{fraction}"
        )
    if options.out:
        options.out.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
