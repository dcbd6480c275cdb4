"""Compare this package with numbers recorded from the official codes: `python -m benchmarks.parity FILE`.

FILE is a safetensors file in the layout of tests/golden/self_distillation_reference.safetensors (inputs,
losses, gradients and centers of DINO, iBOT, MSN and MoCo v3; see benchmarks/parity_distillation.py), or of
tests/golden/rcmae_reference.safetensors, whose metadata holds the configuration: sizes, mask ratio, gamma,
momentum and target. Prints the largest error of each kind; exits with 0 only if losses, predictions and
gradients agree to 1e-5 relative in float32 and the final weights to 1e-4, else with 1. Errors are norms over
a tensor.

The bias of an attention's keys is compared otherwise: it shifts all scores of a query alike, which softmax
ignores, so its gradient is zero except for rounding, and AdamW turns this rounding into steps in random
directions, in the official run too. Its difference is given in units of the distance that AdamW can move a
weight, lr * steps.
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
from rcmae.interop.official import load_official, our_name
from rcmae.methods.rcmae import RCMAE, Batch, RCMAERecipe
from rcmae.models.autoencoder import AutoencoderNetwork

LIMITS = {
    "prediction": 1e-5,
    "mask": 0.0,
    "loss": 1e-5,
    "gradient": 1e-5,
    "final weight": 1e-4,
    "key bias": 1.0,
}


def main(path: str) -> int:
    """Compare with one file, print a line for each kind of quantity, return the exit code."""
    if not Path(path).is_file():
        print(f"parity: error: {path} does not exist", file=sys.stderr)
        return 2
    with safe_open(path, "pt") as f:
        distillation = not any(k.startswith("losses/") for k in f.keys())  # noqa: SIM118 - not a dict
    errors = compare_distillation(path) if distillation else compare(path)
    limits = dict.fromkeys(errors, 1e-5) if distillation else LIMITS
    for kind, limit in limits.items():
        error, name = errors[kind]
        verdict = "ok  " if error <= limit else "MISS"
        print(f"{verdict} {kind:13s} largest relative error {error:.2e} (limit {limit:.0e}) at {name}")
    return int(not errors or any(errors[kind][0] > limit for kind, limit in limits.items()))


def compare(path: str) -> dict[str, tuple[float, str]]:
    """The largest relative error of each kind of quantity, and the name of the quantity."""
    with safe_open(path, "pt") as f:
        meta, data = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - not a dict
    method = build(meta)
    load_official(method.student, part(data, "student/"))
    load_official(method.teacher.model, part(data, "teacher/"))
    for model in (method.student, method.teacher.model):
        model.double() if data["images"].dtype == torch.float64 else model.float()
    beta1, beta2 = (float(beta) for beta in meta["betas"].split(","))
    settings = Optim(weight_decay=float(meta["weight_decay"].split()[0]), betas=(beta1, beta2))
    optimizer = adamw(method.student, settings, float(meta["lr"]))
    errors: dict[str, tuple[float, str]] = {}

    def note(kind: str, name: str, got: Tensor, expected: Tensor) -> None:
        scale = expected.double().norm().item() or 1.0
        error = (got.double() - expected.double()).norm().item() / scale
        errors[kind] = max(errors.get(kind, (0.0, "-")), (error if math.isfinite(error) else math.inf, name))

    steps, applied = len(data["images"]), torch.ones(())
    for step in range(steps):
        t = Progress(step, steps, steps)
        batch: Batch = {"image": data["images"][step], "order": data["ids_shuffle"][step]}
        if step == 0:
            hidden = batch["order"][:, method.visible :]
            mask = torch.zeros_like(data["step0/mask"]).scatter_(1, hidden, 1.0)
            note("mask", "step 0", mask, data["step0/mask"])
            predictions, _ = method.snapshot(batch)
            for network in ("student", "teacher"):
                prediction = predictions[network]  # [b, m, p]
                index = hidden.unsqueeze(2).expand_as(prediction)
                note(
                    "prediction",
                    f"step 0 {network}",
                    prediction,
                    data[f"step0/{network}_pred"].gather(1, index),
                )
        losses = method(batch, t)
        for name, official in (
            ("reconstruction", "reconstruction"),
            ("consistency", "consistency"),
            ("loss", "total"),
        ):
            note("loss", f"step {step} {official}", losses[name], data[f"losses/{official}"][step])
        losses["loss"].backward()
        if step == 0:
            gradients = {n: p.grad for n, p in method.student.named_parameters() if p.grad is not None}
            official_gradients = {our_name(name): g for name, g in part(data, "step0/grad/").items()}
            if different := gradients.keys() ^ official_gradients.keys():
                errors["gradient"] = (math.inf, f"names {sorted(different)}")
            for name in gradients.keys() & official_gradients.keys():
                note("gradient", name, gradients[name], official_gradients[name])
        method.before_step(t, applied)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(t, applied)
    for network, model in (("student", method.student), ("teacher", method.teacher.model)):
        weights = model.state_dict()
        for name, value in part(data, f"final/{network}/").items():
            if name == "decoder_pos_embed":
                continue
            weight = weights[our_name(name)]
            if name.endswith("attn.qkv.bias"):
                keys = slice(len(value) // 3, 2 * len(value) // 3)
                gap = (weight[keys] - value[keys]).abs().max().item() / (float(meta["lr"]) * steps)
                errors["key bias"] = max(errors.get("key bias", (0.0, "-")), (gap, f"{network} {name}"))
                weight, value = weight.clone(), value.clone()
                weight[keys] = value[keys] = 0
            note("final weight", f"{network} {name}", weight, value)
    return errors


def build(meta: dict[str, str]) -> RCMAE:
    """The method with the recorded configuration, for images that are already standardized."""
    number = {k: int(v) for k, v in meta.items() if v.isdigit()}
    channels = number.get("in_chans", 3)
    recipe = RCMAERecipe(
        images=Images(size=number["img_size"], channels=channels),
        network=AutoencoderNetwork(
            patch=number["patch_size"],
            width=number["embed_dim"],
            depth=number["depth"],
            heads=number["num_heads"],
            decoder_width=number["decoder_embed_dim"],
            decoder_depth=number["decoder_depth"],
            decoder_heads=number["decoder_num_heads"],
        ),
    )
    recipe = changed(
        recipe,
        mask_ratio=float(meta["mask_ratio"]),
        target="normalized" if meta["norm_pix_loss"] == "True" else "pixels",
        gamma=float(meta["gamma"]),
        schedule="constant",
        momentum=float(meta["momentum"]),
    )
    # Standardizing with mean 0 and standard deviation 1/255 leaves recorded images as they are.
    return RCMAE(recipe, (0.0,) * channels, (1 / 255,) * channels)


def part(data: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.parity FILE")
    sys.exit(main(sys.argv[1]))
