"""Compare this package with numbers recorded from the official codes: `python -m benchmarks.parity FILE`.

FILE is a safetensors file in the layout of tests/golden/self_distillation_reference.safetensors (inputs, losses, gradients and
centres of DINO, iBOT, MSN and MoCo v3; see benchmarks/parity_distillation.py), or in that of
tests/golden/rcmae_reference.safetensors, whose metadata is the configuration; sizes, mask ratio, gamma, momentum and target are
read from it. Prints the worst figure of each kind and exits 0 only if
losses, predictions and gradients agree to 1e-5 relative in float32 and the final weights to 1e-4, else 1. Errors are norms
over a tensor. One kind of weight is compared otherwise: the bias of an attention's keys shifts every score of a query alike,
softmax ignores that, so its gradient is zero but for rounding, and AdamW turns that rounding into steps whose direction is
noise in the official run too. For it the gap is given in units of what AdamW can move a weight, lr * steps.
"""

import math
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.parity_distillation import compare_distillation
from rcmae.config import Images, Optim, changed
from rcmae.engine.optim import adamw
from rcmae.engine.schedules import Progress
from rcmae.interop.official import load_official, ours
from rcmae.methods.rcmae import RCMAE, RCMAERecipe
from rcmae.models.autoencoder import AutoencoderNetwork

LIMITS = {"prediction": 1e-5, "mask": 0.0, "loss": 1e-5, "gradient": 1e-5, "final weight": 1e-4, "key bias": 1.0}


def main(path: str) -> int:
    """Run the comparison for one file, print a line for each kind of figure, return the exit code."""
    if not Path(path).is_file():
        print(f"parity: error: {path} does not exist", file=sys.stderr)
        return 2
    with safe_open(path, "pt") as f:
        distillation = not any(k.startswith("losses/") for k in f.keys())  # noqa: SIM118 - not a dict
    worst = compare_distillation(path) if distillation else compare(path)
    limits = dict.fromkeys(worst, 1e-5) if distillation else LIMITS
    for kind, limit in limits.items():
        error, name = worst[kind]
        verdict = "ok  " if error <= limit else "MISS"
        print(f"{verdict} {kind:13s} worst relative error {error:.2e} (limit {limit:.0e}) at {name}")
    return int(not worst or any(worst[kind][0] > limit for kind, limit in limits.items()))


def compare(path: str) -> dict[str, tuple[float, str]]:
    """Kind of figure -> (worst relative error, where)."""
    with safe_open(path, "pt") as f:
        meta, data = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - not a dict
    method = build(meta)
    load_official(method.student, part(data, "student/"))
    load_official(method.teacher.model, part(data, "teacher/"))
    for model in (method.student, method.teacher.model):
        model.double() if data["images"].dtype == torch.float64 else model.float()
    betas = tuple(float(b) for b in meta["betas"].split(","))
    optimizer = adamw(method.student, Optim(weight_decay=float(meta["weight_decay"].split()[0]), betas=betas), float(meta["lr"]))
    worst: dict[str, tuple[float, str]] = {}

    def note(kind: str, name: str, got: Tensor, expected: Tensor) -> None:
        scale = expected.double().norm().item() or 1.0
        error = (got.double() - expected.double()).norm().item() / scale
        worst[kind] = max(worst.get(kind, (0.0, "-")), (error if math.isfinite(error) else math.inf, name))

    steps, one = len(data["images"]), torch.ones(())
    for step in range(steps):
        t = Progress(step, steps, steps)
        batch = {"image": data["images"][step], "order": data["ids_shuffle"][step]}
        if step == 0:
            hidden = batch["order"][:, method.visible :]
            mask = torch.zeros_like(data["step0/mask"]).scatter_(1, hidden, 1.0)
            note("mask", "step 0", mask, data["step0/mask"])
            shots, _ = method.snapshot(batch)
            for who in ("student", "teacher"):
                expected = data[f"step0/{who}_pred"].gather(1, hidden.unsqueeze(2).expand(-1, -1, shots[who].shape[2]))
                note("prediction", f"step 0 {who}", shots[who], expected)
        losses = method(batch, t)
        for ours_name, theirs in (("reconstruction", "reconstruction"), ("consistency", "consistency"), ("loss", "total")):
            note("loss", f"step {step} {theirs}", losses[ours_name], data[f"losses/{theirs}"][step])
        losses["loss"].backward()
        if step == 0:
            gradients = {name: p.grad for name, p in method.student.named_parameters() if p.requires_grad}
            expected = {ours(name): g for name, g in part(data, "step0/grad/").items()}
            if gradients.keys() != expected.keys():
                worst["gradient"] = (float("inf"), f"names {sorted(gradients.keys() ^ expected.keys())}")
            for name in gradients.keys() & expected.keys():
                note("gradient", name, gradients[name], expected[name])
        method.before_step(t, one)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(t, one)
    for who, model in (("student", method.student), ("teacher", method.teacher.model)):
        own = model.state_dict()
        for name, value in part(data, f"final/{who}/").items():
            if name == "decoder_pos_embed":
                continue
            got = own[ours(name)]
            if name.endswith("attn.qkv.bias"):
                keys = slice(len(value) // 3, 2 * len(value) // 3)
                gap = (got[keys] - value[keys]).abs().max().item() / (float(meta["lr"]) * steps)
                worst["key bias"] = max(worst.get("key bias", (0.0, "-")), (gap, f"{who} {name}"))
                got, value = got.clone(), value.clone()
                got[keys] = value[keys] = 0
            note("final weight", f"{who} {name}", got, value)
    return worst


def build(meta: dict[str, str]) -> RCMAE:
    """The method that the recorded configuration describes; its images are already standardised."""
    number = {k: int(v) for k, v in meta.items() if v.isdigit()}
    channels = number.get("in_chans", 3)
    recipe = RCMAERecipe(
        images=Images(size=number["img_size"], channels=channels),
        network=AutoencoderNetwork(
            patch=number["patch_size"], width=number["embed_dim"], depth=number["depth"], heads=number["num_heads"],
            decoder_width=number["decoder_embed_dim"], decoder_depth=number["decoder_depth"],
            decoder_heads=number["decoder_num_heads"],
        ),
    )  # fmt: skip
    recipe = changed(
        recipe, mask_ratio=float(meta["mask_ratio"]), target="normalised" if meta["norm_pix_loss"] == "True" else "pixels",
        gamma=float(meta["gamma"]), schedule="constant", momentum=float(meta["momentum"]),
    )  # fmt: skip
    # Standardising with mean 0 and deviation 1/255 leaves recorded images as they are.
    return RCMAE(recipe, (0.0,) * channels, (1 / 255,) * channels)


def part(data: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.parity FILE")
    sys.exit(main(sys.argv[1]))
