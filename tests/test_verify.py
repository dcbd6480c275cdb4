"""`rcmae verify`: it confirms the training loop, and detects each fault that it is designed for."""

import json

import pytest
import torch

import rcmae.pretraining as pretraining
import rcmae.trainer as trainer
from rcmae.cli import main
from rcmae.config import to_toml
from rcmae.data.sampler import BatchSampler
from rcmae.errors import Preempted
from rcmae.lab import verify
from rcmae.lab.verify import Outcome, compare
from rcmae.methods.rcmae import RCMAE
from tests.conftest import small, stop_at
from tests.test_pretraining import folder, run  # noqa: F401 - a fixture

STEPS = 4
EVERY = {"save_every": "0.000001s", "keep": 99, "log_every": 1}


def outcome(out, data, method="rcmae", **runtime) -> Outcome:
    run(out, data, method, steps=STEPS, runtime=EVERY | runtime)
    return Outcome.read(out, STEPS)


def differing(row) -> set[str]:
    """The quantities that differ by more than float32 rounding explains, here by a factor of ten."""
    return {
        name
        for name, value in row.differences.items()
        if value > (0.05 if name in ("student", "teacher") else 1e-4)
    }


@pytest.mark.parametrize("method", ["mae", "rcmae"])
def test_micro_batches_equal_a_batch(tmp_path, folder, method):  # noqa: F811
    row = compare(
        "", outcome(tmp_path / "1", folder, method), outcome(tmp_path / "4", folder, method, accumulate=4)
    )
    assert row.holds, row
    assert 0 < row.differences["gradient"] < 1e-5
    assert ("teacher" in row.differences) == (method == "rcmae")


def test_a_teacher_update_in_every_micro_batch_is_detected(tmp_path, folder, monkeypatch):  # noqa: F811
    full_batch = outcome(tmp_path / "1", folder)
    forward = RCMAE.forward

    def eager(method, batch, t):
        method.teacher.update(method.student, method.momentum(t), torch.ones(()))
        return forward(method, batch, t)

    monkeypatch.setattr(RCMAE, "forward", eager)
    row = compare("", full_batch, outcome(tmp_path / "4", folder, accumulate=4))
    assert not row.holds
    assert "teacher" in differing(row)


def test_repeated_micro_batches_are_detected(tmp_path, folder, monkeypatch):  # noqa: F811
    full_batch = outcome(tmp_path / "1", folder)
    iterate = BatchSampler.__iter__

    def repeating(sampler):
        for i, keys in enumerate(iterate(sampler)):
            if i % sampler.micro == 0:
                first = keys
            yield first

    monkeypatch.setattr(BatchSampler, "__iter__", repeating)
    row = compare("", full_batch, outcome(tmp_path / "4", folder, accumulate=4))
    assert not row.holds
    assert {"loss", "gradient"} <= differing(row)


@pytest.mark.parametrize("fault", ["none", "optimizer", "teacher"])
def test_an_incomplete_resume_is_detected(tmp_path, folder, monkeypatch, fault):  # noqa: F811
    uninterrupted = outcome(tmp_path / "uninterrupted", folder)
    with monkeypatch.context() as patch:
        stop_at(patch, pretraining.Pretraining, 2)
        with pytest.raises(Preempted):
            outcome(tmp_path / "run", folder)
    load = trainer.load_checkpoint

    def forgetful(path, method, optimizer):
        state = load(path, method, optimizer)
        if fault == "optimizer":
            optimizer.state.clear()
        if fault == "teacher":
            method.teacher.model.load_state_dict(method.student.state_dict())
        return state

    monkeypatch.setattr(trainer, "load_checkpoint", forgetful)
    row = compare("", uninterrupted, outcome(tmp_path / "run", folder), exact=True)
    assert row.holds == (fault == "none"), row
    if fault == "none":
        assert set(row.differences.values()) == {0.0}


@pytest.mark.slow
def test_the_command_confirms_every_variation(tmp_path, capsys, monkeypatch, folder):  # noqa: F811
    """Except for compilation, which takes a minute."""
    unavailable = verify._unavailable
    monkeypatch.setattr(
        verify,
        "_unavailable",
        lambda way, kind: "left out" if "--compile" in way.flags else unavailable(way, kind),
    )
    (tmp_path / "mine.toml").write_text(to_toml(small(data=str(folder))))
    file = tmp_path / "report.json"
    argv = [
        "verify",
        "rcmae",
        "--recipe",
        str(tmp_path / "mine.toml"),
        "--steps",
        "3",
        "--batch-size",
        "8",
        "--device",
        "cpu",
    ]
    assert main([*argv, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.count(" yes ") == 3, out
    rows = json.loads(file.read_text())["rows"]
    assert [row["holds"] for row in rows] == [True] * 4
    assert rows[1]["differences"] == {"loss": 0, "gradient": 0, "student": 0, "teacher": 0}
    assert rows[2]["differences"]["gradient"] > 0, "two processes ran"


def test_a_failed_check_exits_with_1(tmp_path, capsys, monkeypatch):
    rows = [verify.Row("a = b", {"loss": 0.5}, False), verify.Row("c = d", {}, True, "needs two GPUs")]
    monkeypatch.setattr(verify, "verify", lambda recipe, **_: rows)
    assert main(["verify", "mae", "--json", str(tmp_path / "report.json")]) == 1
    out = capsys.readouterr().out
    assert "NO" in out
    assert "not run" in out
    assert "c = d: needs two GPUs" in out
