"""What holds for the teacher of every method with one, over a run: one update per optimizer step, evaluation
mode, and no state of the student that it misses."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import rcmae.pretraining as pretraining
from rcmae.config import RuntimeConfig
from rcmae.data.digits import DigitsSource
from rcmae.engine.metrics import read_metrics
from rcmae.engine.optim import adamw
from rcmae.methods import METHODS
from rcmae.methods.mean_teacher import MeanTeacher
from rcmae.models.teacher import Teacher
from tests.conftest import small
from tests.mutations import catches

NAMES = [name for name, method in METHODS.items() if issubclass(method, MeanTeacher)]


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in module.named_buffers() if b.is_floating_point()}


def update_per_micro_batch(old):
    """As in the official code: the first of two updates in a step uses the student before the step."""
    return lambda self, t, applied: self.teacher.update(self.ema_source, self.momentum(t), applied)


def in_training_mode(old):
    def init(self, student):
        old(self, student)
        self.model.train()

    return init


class TokenNorm(nn.BatchNorm1d):
    """A norm with running statistics, for tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)  # [b, n, d]


def running_statistics(old):
    def init(self, **sizes):
        old(self, **sizes)
        self.norm = TokenNorm(sizes["width"])

    return init


@catches(
    "the teacher is updated with every micro-batch",
    "rcmae.methods.mean_teacher:MeanTeacher.before_step",
    update_per_micro_batch,
)
@catches(
    "the teacher is never updated",
    "rcmae.models.teacher:Teacher.update",
    lambda old: lambda self, student, momentum, applied=None: None,
)
@catches("the teacher is in training mode", "rcmae.models.teacher:Teacher.__init__", in_training_mode)
@catches("a buffer is not averaged", "rcmae.models.decoder:Decoder.__init__", running_statistics)
@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_follows_the_whole_student(name, tmp_path, monkeypatch):
    runs, first = [], {}
    train = pretraining.Pretraining.train

    def observed(run):
        runs.append(run)
        first.update(buffers(run.method.ema_source))
        return train(run)

    monkeypatch.setattr(pretraining, "open_source", lambda *args, **options: DigitsSource(count=64, size=16))
    monkeypatch.setattr(pretraining.Pretraining, "train", observed)
    runtime = RuntimeConfig(
        out=tmp_path, device="cpu", precision="fp32", workers=0, accumulate=2, log_every=1
    )
    pretraining.pretrain(small(name, schedule="constant", momentum=0.7), runtime)
    method = runs[0].method

    lines = [line for line in read_metrics(tmp_path) if "measured_momentum" in line]
    measured, expected = ([line[f"{kind}_momentum"] for line in lines] for kind in ("measured", "expected"))
    assert len(lines) >= 4  # of six: in the warm-up, the student hardly moves
    # A second update, or none, would be off by 0.2 at this momentum.
    assert measured == pytest.approx(expected, abs=0.02)
    assert expected == pytest.approx([0.7] * len(expected))

    assert not any(module.training for module in method.teacher.model.modules())

    for key, value in buffers(method.teacher.model).items():
        now = dict(method.ema_source.named_buffers())[key]
        assert torch.equal(now, first[key]) or torch.equal(now, value), key


@catches(
    "all micro-batches see the same teacher",
    "rcmae.models.teacher:Teacher.look_ahead",
    lambda old: lambda self, student, momentum: None,
)
@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_see_the_moved_teacher_as_in_the_official_code(tmp_path, monkeypatch, accumulate):
    """The rule of RC-MAE's code for two micro-batches, written down plainly: the teacher moves after each,
    and the student after the second. Halves of a micro-batch see the same teacher."""
    start, steps = [], []
    micro_batches, update = pretraining.Pretraining.micro_batches, pretraining.Pretraining.update

    def kept_batches(run):
        steps.append([])
        for batch in micro_batches(run):
            steps[-1].append(batch)
            yield batch

    def kept_start(run, t):
        if not start:
            start.append(copy.deepcopy(run.method))
        applied = update(run, t)
        rates.append(run.optimizer.param_groups[0]["lr"])
        runs[:] = [run]
        return applied

    runs, rates = [], []
    monkeypatch.setattr(pretraining, "open_source", lambda *args, **options: DigitsSource(count=64, size=16))
    monkeypatch.setattr(pretraining.Pretraining, "micro_batches", kept_batches)
    monkeypatch.setattr(pretraining.Pretraining, "update", kept_start)
    runtime = RuntimeConfig(out=tmp_path, device="cpu", precision="fp32", workers=0, accumulate=accumulate)
    pretraining.pretrain(small("rcmae", schedule="constant", momentum=0.6, ema_updates=2, probes=0), runtime)

    method = start[0]
    student, teacher, gamma = method.student, method.teacher.model, method.recipe.rcmae.gamma
    optimizer = adamw(student, method.recipe.optim, 0.0)
    for batches, rate in zip(steps, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for part, batch in enumerate(batches, 1):
            patches, order = method.normalize_and_patchify(batch["image"]), batch["order"]
            hidden = order[:, method.visible :].unsqueeze(2)
            target = method.target(patches.take_along_dim(hidden, 1))
            s, t = (network(patches, order, method.visible) for network in (student, teacher))
            loss = (s - target).square().mean() + gamma * (s - t.detach()).square().mean()
            (loss / len(batches)).backward()
            if part == len(batches):
                torch.nn.utils.clip_grad_norm_(student.parameters(), method.recipe.optim.clip or math.inf)
                optimizer.step()
                optimizer.zero_grad()
            if part % (len(batches) // 2) == 0:
                with torch.no_grad():
                    for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                        old.copy_(0.6 * old + 0.4 * new)
    assert len(steps) >= 3
    for ours, plain in ((runs[0].method.student, student), (runs[0].method.teacher.model, teacher)):
        for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
            if name.endswith("qkv.bias"):  # the keys' gradient is rounding, which AdamW scales to full steps
                a, b = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (a, b))
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name


def test_the_copy_that_looks_ahead_is_compiled_like_the_teacher():
    student = nn.Linear(2, 2)
    teacher = Teacher(student)
    teacher.model.compile()
    teacher.look_ahead(student, 0.5)
    assert teacher.ahead[0]._compiled_call_impl is not None
    assert teacher.model._compiled_call_impl is not None
