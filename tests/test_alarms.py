"""Alarms: each fault, put into the code of a real run, raises its own alarm and no other; a healthy run
raises none."""

import re
import time
from pathlib import Path

import pytest

import rcmae.pretraining as pretraining
from benchmarks.alarms import FAULTS, patched, stops_at
from rcmae.cli import main
from rcmae.config import RuntimeConfig
from rcmae.data.digits import DigitsSource
from rcmae.engine.checkpoint import checkpoints
from rcmae.engine.metrics import read_metrics
from rcmae.engine.schedules import Progress
from rcmae.errors import AlarmError, Preempted
from rcmae.lab.alarms import Alarms
from tests.conftest import method_for, small

STEPS = 24
"Three epochs of 64 digits."

SETTING = {"teacher-stale": "--out", "collapse": "--base-lr", "low-precision": "--precision fp32"}
"""What the line of an alarm must tell to change; of others, the setting that makes the teacher's memory
shorter under its schedule."""


@pytest.fixture(scope="module")
def digits() -> DigitsSource:
    return DigitsSource(count=64, size=16)


@pytest.fixture(autouse=True)
def _quick(monkeypatch, digits):
    """Small images that are drawn once; one milestone, without a page or an export."""
    monkeypatch.setattr(pretraining, "open_source", lambda *args, **options: digits)
    monkeypatch.setattr(pretraining, "write_report", lambda run: None)
    monkeypatch.setattr(pretraining, "export", lambda *args: None)
    monkeypatch.setattr(pretraining, "spread", lambda total, count: {total})


def run(out: Path, runtime: dict | None = None, **changes) -> pretraining.Result:
    options = {"device": "cpu", "precision": "fp32", "workers": 0, "save_every": "1h"} | (runtime or {})
    return pretraining.pretrain(small(**{"steps": STEPS} | changes), RuntimeConfig(out=out, **options))


def recorded(out: Path) -> list[dict]:
    return [line for line in read_metrics(out) if line["kind"] == "alarm"]


def printed(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("alarm ")]


def run_with_fault(name: str, out: Path, runtime: dict | None = None) -> None:
    """A run with a fault, from its start or from its resumption."""
    fault = FAULTS[name]
    if fault.resumes:
        with patched("rcmae.pretraining:Pretraining.update", stops_at(STEPS // 2)), pytest.raises(Preempted):
            run(out, runtime, **fault.settings)
    with patched(fault.target, fault.wrap):
        run(out, runtime, **fault.settings)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_raises_its_own_alarm_once(tmp_path, capsys, name):
    run_with_fault(name, tmp_path / "run")
    alarms = recorded(tmp_path / "run")
    assert [a["name"] for a in alarms] == [FAULTS[name].alarm]
    assert printed(capsys.readouterr().out) == [f"alarm {alarms[0]['name']}: {alarms[0]['text']}"]
    effective, ineffective = (
        ("--momentum", "--half-life")
        if "schedule" in FAULTS[name].settings
        else ("--half-life", "--momentum")
    )
    assert SETTING.get(alarms[0]["name"], effective) in alarms[0]["text"]
    assert ineffective not in alarms[0]["text"]


@pytest.mark.parametrize(
    ("runtime", "changes"),
    [
        ({}, {}),
        ({}, {"method": "mae"}),
        ({"precision": "bf16"}, {"method": "mae", "seed": 1}),
        ({"precision": "bf16"}, {"half_life": "adaptive"}),
        ({"accumulate": 2}, {"ema_updates": 2, "teacher_mask": "different"}),
        (
            {"accumulate": 2, "precision": "bf16"},
            {"teacher_mask": "different", "schedule": "constant", "momentum": 0.7},
        ),
        ({}, {"schedule": "cosine", "momentum": 0.7, "seed": 1}),
        ({}, {"half_life": "adaptive", "teacher_mask": "different", "gamma": 0.5}),
    ],
    ids=lambda v: " ".join(f"{k} {x}" for k, x in v.items()) or "plain",
)
def test_a_healthy_run_raises_no_alarm(tmp_path, capsys, runtime, changes):
    """Also when it is stopped and resumed."""
    with patched("rcmae.pretraining:Pretraining.update", stops_at(STEPS // 2)), pytest.raises(Preempted):
        run(tmp_path / "run", runtime, **changes)
    run(tmp_path / "run", runtime, **changes)
    assert recorded(tmp_path / "run") == []
    assert printed(capsys.readouterr().out) == []
    assert any("rankme" in line for line in read_metrics(tmp_path / "run"))


# --- --on-alarm stop ----------------------------------------------------------------------------------------

COMMAND = (
    "pretrain --size 16 --width 24 --depth 2 --heads 2 --decoder-width 16 --decoder-depth 2 --decoder-heads "
    "2 --batch-size 8"
)
COMMAND += f" --steps {STEPS} --probes 0 --device cpu --precision fp32 --workers 0"


def weights(out: Path) -> dict[str, bytes]:
    newest = checkpoints(out / "checkpoints")[0]
    return {name: (newest / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")}


def command(out: Path, half_life: str = "2 steps", on_alarm: str = "stop") -> int:
    return main([*COMMAND.split(), "--out", str(out), "--half-life", half_life, "--on-alarm", on_alarm])


def test_stop_ends_the_run_and_the_same_command_resumes_it(tmp_path, capsys):
    """It stops at the step of the alarm. After the resume that alarm is known, and the weights are those of a
    run that only warns."""
    with patched("rcmae.models.decoder:Decoder.forward", FAULTS["predictions in 16 bits"].wrap):
        assert command(tmp_path / "run") == 5
        error = capsys.readouterr().err
        assert re.fullmatch(
            r"rcmae: error: alarm low-precision: .*; stopped at step 3, "
            r"its checkpoint is kept; the same .*\n",
            error,
        )
        assert checkpoints(tmp_path / "run" / "checkpoints")[0].name == "step_00000003"
        assert command(tmp_path / "run") == 0
        assert printed(capsys.readouterr().out) == []
        assert [(a["step"], a["name"]) for a in recorded(tmp_path / "run")] == [(3, "low-precision")]
        assert command(tmp_path / "warned", on_alarm="warn") == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "warned")


def test_stop_before_the_first_step(tmp_path, capsys):
    assert command(tmp_path / "run", half_life="50%") == 5
    assert "stopped at step 0" in capsys.readouterr().err
    before = read_metrics(tmp_path / "run")
    assert {line["kind"] for line in before} == {"alarm", "reference"}
    assert command(tmp_path / "run", half_life="50%") == 0
    assert read_metrics(tmp_path / "run")[: len(before)] == before
    assert len(recorded(tmp_path / "run")) == 1


def test_stop_at_the_last_step(tmp_path):
    with patched("rcmae.models.decoder:Decoder.forward", FAULTS["the output is constant"].wrap):
        assert command(tmp_path / "run") == 5
        assert checkpoints(tmp_path / "run" / "checkpoints")[0].name == f"step_{STEPS:08d}"
        assert command(tmp_path / "run") == 0


def test_a_stale_teacher_is_never_saved(tmp_path):
    """The run stops before the step, so the checkpoint has the correct teacher; every resume that loses it
    raises the alarm again."""
    stop = {"on_alarm": "stop"}
    with pytest.raises(AlarmError, match=f"stopped at step {STEPS // 2}"):
        run_with_fault("the teacher is stale after a resume", tmp_path / "run", stop)
    with patched("rcmae.pretraining:Pretraining.update", stops_at(STEPS // 2 + 4)), pytest.raises(Preempted):
        run(tmp_path / "run", stop)
    fault = FAULTS["the teacher is stale after a resume"]
    with (
        patched(fault.target, fault.wrap),
        pytest.raises(AlarmError, match=f"stopped at step {STEPS // 2 + 4}"),
    ):
        run(tmp_path / "run", stop)
    run(tmp_path / "run", stop)
    run(tmp_path / "uninterrupted")
    assert weights(tmp_path / "run") == weights(tmp_path / "uninterrupted")


# --- thresholds ---------------------------------------------------------------------------------------------


def at_start(step: int, **changes) -> list[str]:
    """Alarms before step `step` of 400, 8 an epoch."""
    method = method_for(small(**changes))
    if getattr(method, "adaptive_half_life", None) is not None:
        method.adaptive_half_life.fill_(1e9)  # adapted to its upper bound
    return [a.name for a in Alarms(method, 400, 8).at_start(Progress(step, 400, 8))]


@pytest.mark.parametrize("step", [0, 100, 399])
def test_a_half_life_above_the_limit_of_adaptive_raises_an_alarm(step):
    assert at_start(step, half_life="adaptive") == []
    assert at_start(step, half_life="10%") == []
    assert at_start(step, half_life="11%") == ["teacher-drag"]


@pytest.mark.parametrize("step", [0, 100, 399])
def test_a_resumed_run_also_checks_the_momentum_at_the_start_of_its_schedule(step):
    assert at_start(step, schedule="cosine", momentum=0.95) == []
    assert at_start(step, schedule="cosine", momentum=1.0) == ["momentum-one"]
    assert at_start(step, half_life="1e30 steps") == ["momentum-one"]
    assert at_start(step, method="mae") == []


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"half_life": "1e30 steps"}, "it will never learn; give a shorter --half-life"),
        ({"half_life": "50%"}, "at the end; give a shorter --half-life, of 40 steps or fewer"),
        ({"schedule": "constant", "momentum": 1.0}, "it will never learn; give a lower --momentum"),
        (
            {"schedule": "constant", "momentum": 0.999},
            "at the end; give a lower --momentum, of 40 steps or fewer",
        ),
        (
            {"schedule": "cosine", "momentum": 0.999},
            "at the end; give a lower --momentum, of 40 steps or fewer",
        ),
        (
            {"schedule": "linear", "momentum": 0.999},
            "at the end; give a lower --momentum, of 40 steps or fewer",
        ),
    ],
)
def test_alarms_recommend_only_settings_that_the_schedule_uses(changes, advice):
    (alarm,) = Alarms(method_for(small(**changes)), 400, 8).at_start(Progress(0, 400, 8))
    assert alarm.text.endswith(advice)


def test_an_alarm_that_stops_the_run_is_on_its_page(tmp_path, monkeypatch):
    """Even if the page was written just before."""
    drawn = []

    def draw(run: Path, running: bool | None = None) -> None:
        time.sleep(
            0.3
        )  # pages of milestones are written only after twenty times the duration of the last one
        drawn.append(recorded(run))

    monkeypatch.setattr(pretraining, "write_report", draw)
    fault = FAULTS["predictions in 16 bits"]
    with pytest.raises(AlarmError), patched(fault.target, fault.wrap):
        run(tmp_path / "run", {"on_alarm": "stop", "log_every": 1})
    assert len(drawn) == 2 and not drawn[0] and drawn[1], "at the beginning and at the end"
