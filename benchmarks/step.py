"""How fast is a training step? `python -m benchmarks.step [--sizes tiny,ti,s,b] [--rounds N] [--out FILE]`

Forward, backward, AdamW and the teacher's update on fixed random images: ours (the loop's own `Run.update`) in float32 and in
bf16, RC-MAE and MAE; the plain float32 reference of benchmarks/reference.py; and peers that pip installs, where they are
installed (Hugging Face's ViTMAEForPreTraining, lightly's MAE parts; both are MAE, without a teacher).

One process an implementation, one step each a round, strictly in turn: a ratio is the median over rounds of reference time
over own time, with the smallest and the largest. Memory is the process's peak (CPU) or the allocator's (CUDA).
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
from typing import Any

import torch

from rcmae.config import Images, Machine, Optim, Recipe
from rcmae.engine.distributed import World, pick_device, pick_precision
from rcmae.engine.optim import adamw
from rcmae.engine.run import describe_machine, keep_freed_memory
from rcmae.engine.schedules import Progress
from rcmae.methods import METHODS
from rcmae.methods.recipes import recipe_type
from rcmae.models.autoencoder import AutoencoderNetwork
from rcmae.models.backbone import IMAGENET
from rcmae.pretraining import LogWindow, Pretraining

# name: (model, side of the image, batch on a CPU, batch on a GPU)
SIZES = {
    "tiny": ("vit_tiny_small_images", 32, 128, 2048),
    "ti": ("vit_tiny_patch16", 224, 64, 1024),
    "s": ("vit_small_patch16", 224, 32, 512),
    "b": ("vit_base_patch16", 224, 8, 256),
}
REFERENCE = "plain RC-MAE fp32"


def recipe_of(size: str, method: str, batch: int) -> Recipe:
    model, side, *_ = SIZES[size]
    return recipe_type(method)(images=Images(size=side), network=AutoencoderNetwork(model=model), optim=Optim(batch_size=batch))


def batch_of(method: Any, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    side = method.recipe.images.size
    order = torch.stack([torch.randperm(method.patches) for _ in range(batch)])
    return {"image": torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8).to(device), "order": order.to(device)}


def ours(size: str, name: str, precision: str, batch: int, device: torch.device) -> Callable[[], None]:
    """The product's own step, called on the few things it needs of a run."""
    recipe = recipe_of(size, name, batch)
    method = METHODS[name](recipe, *IMAGENET).to(device)
    run = Pretraining.__new__(Pretraining)
    run.recipe, run.machine, run.device, run.world, run.precision = recipe, Machine(), device, World(), precision
    run.method = run.net = method
    run.optimizer, run.batch_size, run.window = adamw(method.student, recipe.optim, 1e-3), batch, LogWindow(device)
    run.batches, run.watch, run.logs = itertools.repeat(batch_of(method, batch, device)), None, False
    return lambda: run.update(Progress(5, 100, 10)) and None


def plain(size: str, batch: int, device: torch.device) -> Callable[[], None]:
    from benchmarks.reference import PlainStep

    method = METHODS["mae"](recipe_of(size, "mae", batch), *IMAGENET)
    step = PlainStep(method.student, method.visible)
    for model in (step.student, step.teacher):
        model.to(device)
        model.positions, model.dpositions = model.positions.to(device), model.dpositions.to(device)
    data = batch_of(method, batch, device)
    images = (data["image"].float() - method.mean.to(device)) / method.std.to(device)
    return lambda: step(images, data["order"]) and None


def hugging_face(size: str, batch: int, device: torch.device) -> Callable[[], None]:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    method = METHODS["mae"](recipe_of(size, "mae", batch), *IMAGENET)
    vit, decoder = method.student.encoder.vit, method.student.decoder
    config = ViTMAEConfig(
        hidden_size=vit.embed_dim, num_hidden_layers=len(vit.blocks), num_attention_heads=vit.blocks[0].attn.num_heads,
        intermediate_size=4 * vit.embed_dim, image_size=SIZES[size][1], patch_size=method.patch, norm_pix_loss=True,
        decoder_hidden_size=decoder.embed.out_features, decoder_num_hidden_layers=len(decoder.blocks),
        decoder_num_attention_heads=decoder.blocks[0].attn.num_heads, decoder_intermediate_size=4 * decoder.embed.out_features,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    images = torch.randn(batch, 3, SIZES[size][1], SIZES[size][1], device=device)

    def step() -> None:
        model(images).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def lightly(size: str, batch: int, device: torch.device) -> Callable[[], None]:
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    method = METHODS["mae"](recipe_of(size, "mae", batch), *IMAGENET)
    own, dec, side = method.student.encoder.vit, method.student.decoder, SIZES[size][1]
    vit = VisionTransformer(
        img_size=side, patch_size=method.patch, embed_dim=own.embed_dim, depth=len(own.blocks), num_heads=own.blocks[0].attn.num_heads,
        num_classes=0,
    )  # fmt: skip
    backbone = MaskedVisionTransformerTIMM(vit=vit)
    decoder = MAEDecoderTIMM(
        num_patches=method.patches, patch_size=method.patch, embed_dim=own.embed_dim, decoder_embed_dim=dec.embed.out_features,
        decoder_depth=len(dec.blocks), decoder_num_heads=dec.blocks[0].attn.num_heads, mlp_ratio=4.0,
    )  # fmt: skip
    model = torch.nn.ModuleList([backbone, decoder]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    images, length = torch.randn(batch, 3, side, side, device=device), method.patches + 1

    def step() -> None:
        keep, mask = utils.random_token_mask((batch, length), mask_ratio=0.75, device=device)
        encoded = backbone.encode(images=images, idx_keep=keep)
        x = utils.repeat_token(decoder.mask_token, (batch, length))
        x = decoder.decode(utils.set_at_index(x, keep, decoder.embed(encoded).type_as(x)))
        prediction = decoder.predict(utils.get_at_index(x, mask))
        target = utils.normalize_mean_var(utils.get_at_index(utils.patchify(images, method.patch), mask - 1), dim=-1)
        torch.nn.functional.mse_loss(prediction, target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def contestants(precision: str) -> "Contestants":
    """What is not installed is said and left out."""
    found: dict[str, Any] = {REFERENCE: (plain, ())}
    for method, label in (("rcmae", "RC-MAE"), ("mae", "MAE")):
        for p in ("fp32", "bf16") if precision == "bf16" else ("fp32",):
            found[f"ours {label} {p}"] = (ours, (method, p))
    for module, label, maker in (("transformers", "Hugging Face MAE fp32", hugging_face), ("lightly", "lightly MAE fp32", lightly)):
        if importlib.util.find_spec(module):
            found[label] = (maker, ())
        else:
            print(f"{label}: {module} is not installed, left out")
    return found


def resident() -> tuple[float, float]:
    """Resident memory of this process in MiB: now, and at its peak."""
    values = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return tuple(int(values[k].split()[0]) / 1024 for k in ("VmRSS", "VmHWM"))


def serve(
    pipe: Connection, maker: Callable[..., Callable[[], None]], size: str, args: tuple, batch: int, device_name: str, threads: int
) -> None:
    """One implementation: a step for every message, until "done"."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = pick_device(device_name)
    if device.type == "cpu" and maker is ours:  # as the loop does; a plain script would not
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


Contestants = dict[str, tuple[Callable[..., Callable[[], None]], tuple]]
"Name -> (maker, its first arguments)."


def measure(size: str, batch: int, makers: Contestants, reference: str, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """A row an implementation; a maker makes a step of (size, *its arguments, batch, device)."""
    context = mp.get_context("spawn")
    pipes = {}
    for name, (maker, args) in makers.items():
        mine, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, maker, size, args, batch, str(device), torch.get_num_threads()), daemon=True).start()
        theirs.close()
        try:
            mine.recv()
            pipes[name] = mine
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
        rows.append({
            "size": size, "name": name, "batch": batch, "images_per_s": batch / statistics.median(times[name]),
            "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios), "peak_mib": pipe.recv(),
        })  # fmt: skip
    return rows


def utilisation(rows: list[dict[str, Any]], device: torch.device) -> float:
    """Measured bf16 matrix rate of a CUDA card in FLOP/s; adds to each of our rows the share of it that the step's FLOPs reach."""
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
            row["utilisation"] = counter.get_total_flops() / 8 * row["images_per_s"] / rate
    return rate


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,ti,s,b")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = pick_device(options.device)
    precision = pick_precision("auto", device)
    if precision == "fp32":
        print(f"{device.type} has no fast bf16 here (no AMX, no such GPU): float32 only")
    load = os.getloadavg()[0]
    makers, batch = contestants(precision), 3 if device.type == "cuda" else 2
    sizes = options.sizes.split(",")
    rows = [row for size in sizes for row in measure(size, SIZES[size][batch], makers, REFERENCE, options.rounds, device)]
    conditions = describe_machine(device, precision) | {"rounds": options.rounds, "load_before": load}
    if device.type == "cuda":
        conditions["matrix_rate_tflops"] = utilisation(rows, device) / 1e12
    print(f"{'size':5s} {'implementation':24s} {'batch':>5s} {'images/s':>9s} {'speed against plain fp32':>26s} {'peak MiB':>9s}")
    for row in rows:
        ratio = f"{row['ratio']:.2f}x [{row['lowest']:.2f}-{row['highest']:.2f}]"
        share = f"  {row['utilisation']:.0%} of the card's bf16 rate" if "utilisation" in row else ""
        print(f"{row['size']:5s} {row['name']:24s} {row['batch']:5d} {row['images_per_s']:9.1f} {ratio:>26s} {row['peak_mib']:9.0f}{share}")
    if options.out:
        options.out.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
