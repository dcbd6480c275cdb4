"""Losses of self-distillation compared with recorded numbers; part of benchmarks/parity.py.

A file holds METHOD/CALL/... with the inputs of each call: `dino` (crop-major student and teacher logits),
`ibot` (class, local class and patch logits and the mask), `msn` (anchors, targets, prototypes), and
`mocov3/...` (queries and keys of two views). Calls are consecutive: the center after one is the center of the
next. Sizes are those of the tensors; temperatures and momenta are parsed from the text of the metadata.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rcmae.methods.distillation import Center
from rcmae.methods.distillation_losses import (
    assignments,
    centered_softmax,
    cross_view_loss,
    info_nce,
    masked_patch_loss,
    me_max,
    sharpen,
    sinkhorn_knopp,
)

Errors = dict[str, tuple[float, str]]
"Kind of quantity -> (largest relative error, name of the quantity)."

Note = Callable[[str, str, Tensor | None, Tensor], None]
"Records the error of a kind and name, from our value and the expected one."


def compare_distillation(path: str) -> Errors:
    """The largest relative error of each kind of quantity."""
    with safe_open(path, "pt") as f:
        meta, data = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - not a dict
    errors: Errors = {}

    def note(method: str, kind: str, name: str, value: Tensor | None, expected: Tensor) -> None:
        assert value is not None, f"{method} has no {kind} {name}"
        scale = expected.double().norm().item() or 1.0
        error = (value.detach().double() - expected.double()).norm().item() / scale
        kind = f"{method} {kind}"
        errors[kind] = max(errors.get(kind, (0.0, "-")), (error if math.isfinite(error) else math.inf, name))

    temperature = data.get("dino/teacher_temp_epoch2", torch.tensor(math.nan)).item()
    for method, run in (("dino", dino), ("ibot", ibot), ("msn", msn), ("mocov3", mocov3)):
        part = {k.removeprefix(f"{method}/"): v for k, v in data.items() if k.startswith(f"{method}/")}
        if part:
            run(part, meta[method], temperature, partial(note, method))
    return errors


def number(text: str, after: str) -> float:
    """The number after a word of the metadata."""
    match = re.search(rf"{after}\D*?(\d+\.?\d*)", text)
    assert match, f"the metadata gives no {after}"
    return float(match[1])


def calls(part: dict[str, Tensor]) -> list[tuple[str, dict[str, Tensor]]]:
    """The numbered calls in order."""
    numbers = sorted({k.split("/")[0] for k in part if k.split("/")[0].isdigit()}, key=int)
    return [
        (i, {k.removeprefix(f"{i}/"): v for k, v in part.items() if k.startswith(f"{i}/")}) for i in numbers
    ]


def leaf(tensor: Tensor) -> Tensor:
    """A copy with a gradient."""
    return tensor.clone().requires_grad_()


def dino(part: dict[str, Tensor], text: str, temperature: float, note: Note) -> None:
    """Logits are stacked crop by crop, the two global crops first."""
    center: Any = Center(part["0/student"].shape[1], number(text, "center momentum"))
    for i, call in calls(part):
        s, teacher_logits = leaf(call["student"]), call["teacher"].unflatten(0, (2, -1))
        center.accumulate(teacher_logits)
        target = centered_softmax(teacher_logits, center.value, temperature)
        loss = cross_view_loss(
            s.unflatten(0, (-1, teacher_logits.shape[1])), target, number(text, "student_temp")
        )
        loss.backward()
        center.update(torch.ones(()))
        note("loss", f"call {i}", loss, call["loss"])
        note("gradient", f"call {i}", s.grad, call["grad"])
        note("center", f"call {i}", center.value, call["center_after"][0])


def ibot(part: dict[str, Tensor], text: str, temperature: float, note: Note) -> None:
    """Two losses: across views on class tokens, within a view on masked patches."""
    width, momentum = part["0/student_cls"].shape[1], number(text, "center momentum")
    centers: Any = Center(width, momentum), Center(width, momentum)
    student_temperature = 0.1  # that of `dino`, by its metadata
    for i, call in calls(part):
        names = ("student_cls", "student_local_cls", "student_patch")
        s = {name: leaf(call[name]) for name in names}
        teacher_logits, patches = (call[f"teacher_{k}"].unflatten(0, (2, -1)) for k in ("cls", "patch"))
        for center, logits in zip(centers, (teacher_logits, patches), strict=True):
            center.accumulate(logits)
        target, patch_target = (
            centered_softmax(logits, center.value, temperature)
            for center, logits in zip(centers, (teacher_logits, patches), strict=True)
        )
        b = teacher_logits.shape[1]
        classes = torch.cat([s["student_cls"], s["student_local_cls"]]).unflatten(0, (-1, b))
        across = cross_view_loss(classes, target, student_temperature)
        within = masked_patch_loss(
            s["student_patch"].unflatten(0, (2, b)),
            patch_target,
            call["mask"].flatten(2).bool(),
            student_temperature,
        )
        (across + within).backward()
        for center in centers:
            center.update(torch.ones(()))
        note("loss", f"call {i} class", across, call["loss_cls"])
        note("loss", f"call {i} patch", within, call["loss_patch"])
        for name in names:
            note("gradient", f"call {i} {name}", s[name].grad, call[f"grad_{name}"])
        note("center", f"call {i} class", centers[0].value, call["center_cls_after"][0])
        note("center", f"call {i} patch", centers[1].value, call["center_patch_after"][0, 0])


def msn(part: dict[str, Tensor], text: str, temperature: float, note: Note) -> None:
    """The recorded loss is the cross-entropy alone; the gradients are those of both terms."""
    tau, sharpening, weight = number(text, "tau"), number(text, "sharpening T"), number(text, "me-max weight")
    for i, call in calls(part):
        anchor, prototypes = leaf(call["anchor"]), leaf(call["prototypes"])
        with torch.no_grad():
            target = sharpen(assignments(call["target"], prototypes, tau), sharpening)
            target = sinkhorn_knopp(target) if call["sinkhorn"] else target
        p = assignments(anchor, prototypes, tau)
        cross_entropy = -torch.special.xlogy(target.repeat(len(anchor) // len(target), 1), p).sum(1).mean()
        regularizer = me_max(p)
        (cross_entropy + weight * regularizer).backward()
        note("loss", f"call {i}", cross_entropy, call["loss"])
        note("loss", f"call {i} mean entropy", regularizer, call["me_max"])
        note("gradient", f"call {i} anchor", anchor.grad, call["grad_anchor"])
        note("gradient", f"call {i} prototypes", prototypes.grad, call["grad_prototypes"])


def mocov3(part: dict[str, Tensor], text: str, temperature: float, note: Note) -> None:
    """Queries and keys of two views."""
    q1, q2, tau = leaf(part["q1"]), leaf(part["q2"]), part["temperature"].item()
    loss = info_nce(q1, part["k2"], tau) + info_nce(q2, part["k1"], tau)
    loss.backward()
    note("loss", "-", loss, part["loss"])
    note("gradient", "q1", q1.grad, part["grad_q1"])
    note("gradient", "q2", q2.grad, part["grad_q2"])
