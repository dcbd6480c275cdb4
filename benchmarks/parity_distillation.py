"""The losses of self-distillation against recorded numbers; part of benchmarks/parity.py.

A file holds, a case each, NAME/CALL/...: `dino` (crop-major student and teacher logits), `ibot` (class, local class and patch logits and
the mask), `msn` (anchors, targets, prototypes), and `mocov3/...` (queries and keys of two views). Calls follow each other: the center
after one is the center of the next. Sizes are read from the tensors; what tensors do not say (temperatures, momenta) stands in the
metadata as text, and is read from it.
"""

import math
import re

import torch
from safetensors import safe_open
from torch import Tensor

from rcmae.methods.distillation import Center
from rcmae.methods.distillation_losses import (
    across_views,
    assignments,
    balanced,
    centered,
    contrast,
    entropy_gap,
    masked_patches,
    sharpened,
)

Worst = dict[str, tuple[float, str]]


def compare_distillation(path: str) -> Worst:
    """Kind of figure -> (worst relative error, where)."""
    with safe_open(path, "pt") as f:
        meta, data = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - not a dict
    worst: Worst = {}

    def note(method: str, kind: str, name: str, got: Tensor, expected: Tensor) -> None:
        scale = expected.double().norm().item() or 1.0
        error = (got.detach().double() - expected.double()).norm().item() / scale
        kind = f"{method} {kind}"
        worst[kind] = max(worst.get(kind, (0.0, "-")), (error if math.isfinite(error) else math.inf, name))

    for method, run in (("dino", dino), ("ibot", ibot), ("msn", msn), ("mocov3", mocov3)):
        part = {k.removeprefix(f"{method}/"): v for k, v in data.items() if k.startswith(f"{method}/")}
        if part:
            temperatures = {"teacher": data["dino/teacher_temp_epoch2"].item()} if "dino/teacher_temp_epoch2" in data else {}
            run(part, meta[method], temperatures, lambda *args, method=method: note(method, *args))
    return worst


def number(text: str, after: str) -> float:
    """The number that follows a word of the metadata."""
    return float(re.search(rf"{after}\D*?(\d+\.?\d*)", text)[1])


def calls(part: dict[str, Tensor]) -> list[tuple[str, dict[str, Tensor]]]:
    """The numbered cases in order."""
    found = sorted({k.split("/")[0] for k in part if k.split("/")[0].isdigit()}, key=int)
    return [(i, {k.removeprefix(f"{i}/"): v for k, v in part.items() if k.startswith(f"{i}/")}) for i in found]


def learning(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def dino(part: dict[str, Tensor], text: str, temperatures: dict[str, float], note) -> None:
    """Logits are stacked crop by crop; the two global ones first."""
    center = Center(part["0/student"].shape[1], number(text, "center momentum"))
    for i, call in calls(part):
        s, teacher_logits = learning(call["student"]), call["teacher"].unflatten(0, (2, -1))
        center.accumulate(teacher_logits)
        target = centered(teacher_logits, center.value, temperatures["teacher"])
        loss = across_views(s.unflatten(0, (-1, teacher_logits.shape[1])), target, number(text, "student_temp"))
        loss.backward()
        center.update(torch.ones(()))
        note("loss", f"call {i}", loss, call["loss"])
        note("gradient", f"call {i}", s.grad, call["grad"])
        note("center", f"call {i}", center.value, call["center_after"][0])


def ibot(part: dict[str, Tensor], text: str, temperatures: dict[str, float], note) -> None:
    """Two losses: across views on class tokens, within a view on masked patches."""
    width, momentum = part["0/student_cls"].shape[1], number(text, "center momentum")
    centers = Center(width, momentum), Center(width, momentum)
    ts = 0.1  # its metadata says: the temperatures of `dino`
    for i, call in calls(part):
        names = ("student_cls", "student_local_cls", "student_patch")
        s = {name: learning(call[name]) for name in names}
        teacher_logits, patches = (call[f"teacher_{k}"].unflatten(0, (2, -1)) for k in ("cls", "patch"))
        for center, logits in zip(centers, (teacher_logits, patches), strict=True):
            center.accumulate(logits)
        target, patch_target = (
            centered(logits, center.value, temperatures["teacher"])
            for center, logits in zip(centers, (teacher_logits, patches), strict=True)
        )
        b = teacher_logits.shape[1]
        classes = torch.cat([s["student_cls"], s["student_local_cls"]]).unflatten(0, (-1, b))
        across = across_views(classes, target, ts)
        within = masked_patches(s["student_patch"].unflatten(0, (2, b)), patch_target, call["mask"].flatten(2).bool(), ts)
        (across + within).backward()
        for center in centers:
            center.update(torch.ones(()))
        note("loss", f"call {i} class", across, call["loss_cls"])
        note("loss", f"call {i} patch", within, call["loss_patch"])
        for name in names:
            note("gradient", f"call {i} {name}", s[name].grad, call[f"grad_{name}"])
        note("center", f"call {i} class", centers[0].value, call["center_cls_after"][0])
        note("center", f"call {i} patch", centers[1].value, call["center_patch_after"][0, 0])


def msn(part: dict[str, Tensor], text: str, temperatures: dict[str, float], note) -> None:
    """The recorded loss is the agreement alone; the gradients are of both terms."""
    tau, sharpen, weight = number(text, "tau"), number(text, "sharpening T"), number(text, "me-max weight")
    for i, call in calls(part):
        anchor, prototypes = learning(call["anchor"]), learning(call["prototypes"])
        with torch.no_grad():
            target = sharpened(assignments(call["target"], prototypes, tau), sharpen)
            target = balanced(target) if call["sinkhorn"] else target
        p = assignments(anchor, prototypes, tau)
        agreement = -torch.special.xlogy(target.repeat(len(anchor) // len(target), 1), p).sum(1).mean()
        gap = entropy_gap(p)
        (agreement + weight * gap).backward()
        note("loss", f"call {i}", agreement, call["loss"])
        note("loss", f"call {i} mean entropy", gap, call["me_max"])
        note("gradient", f"call {i} anchor", anchor.grad, call["grad_anchor"])
        note("gradient", f"call {i} prototypes", prototypes.grad, call["grad_prototypes"])


def mocov3(part: dict[str, Tensor], text: str, temperatures: dict[str, float], note) -> None:
    """Queries and keys of two views."""
    q1, q2, tau = learning(part["q1"]), learning(part["q2"]), part["temperature"].item()
    loss = contrast(q1, part["k2"], tau) + contrast(q2, part["k1"], tau)
    loss.backward()
    note("loss", "-", loss, part["loss"])
    note("gradient", "q1", q1.grad, part["grad_q1"])
    note("gradient", "q2", q2.grad, part["grad_q2"])
