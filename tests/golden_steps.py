"""The golden step of every method: `make golden` writes tests/golden/steps.json, tests/test_golden.py
compares."""

import json
import sys

import torch

from rcmae.engine.optim import adamw
from rcmae.engine.schedules import Progress
from rcmae.methods import METHODS
from tests.conftest import GOLDEN, batch_for, method_for, small

FILE = GOLDEN / "steps.json"


LAST = 3
"""Rounding, which differs with the CPU's instructions, grows from step to step: here it is below half the
tolerance, at step 10 it is not."""

EPS = 1e-4
"""AdamW's, far above gradients that are nothing but rounding: with the usual 1e-8 these become steps as
large as any."""

BATCH = 8
"Images. BatchNorm over three that are nearly alike would make numbers of their rounding."


def rms(tensors) -> float:
    """Root mean square over all values of several tensors."""
    tensors = list(tensors)
    return (sum(t.double().square().sum() for t in tensors) / sum(t.numel() for t in tensors)).sqrt().item()


def steps(name: str) -> dict[str, float]:
    """Loss, gradient, update and weights after the first and the last step, float32, from fixed weights and
    batches."""
    torch.manual_seed(0)
    method = method_for(small(name))
    optimizer = adamw(method.student, method.recipe.optim, 1e-3)
    for group in optimizer.param_groups:
        group["eps"] = EPS
    trained = [p for p in method.student.parameters() if p.requires_grad]
    values = {}
    for step in range(1, LAST + 1):
        before = [p.detach().clone() for p in trained]
        t = Progress(step - 1, 10, 5)
        losses = method(batch_for(method, BATCH, seed=step), t)
        losses["loss"].backward()
        gradient = rms(p.grad for p in trained)
        method.before_step(t, torch.ones(()))
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(t, torch.ones(()))
        if step in (1, LAST):
            update = rms(p.detach() - b for p, b in zip(trained, before, strict=True))
            values |= {f"step {step} {k}": v.item() for k, v in losses.items()}
            values |= {
                f"step {step} gradient": gradient,
                f"step {step} update": update,
                f"step {step} weights": rms(method.parameters()),
            }
    return values


def all_methods() -> dict[str, dict[str, float]]:
    return {name: steps(name) for name in METHODS}


if __name__ == "__main__":
    torch.set_num_threads(1)
    new = all_methods()
    old = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name, values in new.items():
        for key, value in values.items():
            was = old.get(name, {}).get(key)
            if was != value:
                print(f"{name} {key}: {was} -> {value}")
    if "--write" in sys.argv:
        FILE.write_text(json.dumps(new, indent=1) + "\n")
