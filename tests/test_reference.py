"""The optimized code computes the same function as a plain reference."""

import pytest
import torch

from benchmarks.reference import PlainStep
from rcmae.engine.schedules import Progress
from tests.conftest import batch_for, method_for, small


@pytest.mark.parametrize(
    "changes",
    [{}, {"height": 8, "channels": 4, "mask_ratio": 0.5}, {"patch": 8, "decoder_depth": 1, "gamma": 0.3}],
)
def test_losses_and_gradients_are_those_of_the_reference(changes):
    method = method_for(small(**changes))
    with torch.no_grad():
        for p in method.student.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    plain = PlainStep(
        method.student, method.visible, method.recipe.rcmae.gamma, eps=method.recipe.mae.target_eps
    )
    with torch.no_grad():  # a teacher that differs from the student
        other = dict(method.teacher.model.named_parameters())
        names = plain.teacher.names()
        for name, p in plain.teacher.named_parameters():
            p.copy_(other[names[name]])
    batch = batch_for(method)
    losses = method(batch, Progress(0, 9, 3))
    losses["loss"].backward()
    expected = plain.loss((batch["image"].float() - method.mean) / method.std, batch["order"])
    expected[0].backward()
    for got, want in zip(
        (losses["loss"], losses["reconstruction"], losses["consistency"]), expected, strict=True
    ):
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert losses["consistency"] > 1e-3
    weights = dict(method.student.named_parameters())
    for name, p in plain.student.named_parameters():
        gradient = weights[plain.student.names()[name]].grad
        assert (gradient - p.grad).norm() <= 1e-5 * p.grad.norm() + 1e-9, name
