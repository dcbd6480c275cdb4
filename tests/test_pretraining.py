"""Pre-training: exact resumes, independence of runtime settings, and recovery from failures."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from rcmae import pretraining, step_time
from rcmae.config import RuntimeConfig
from rcmae.engine import signals
from rcmae.engine.checkpoint import checkpoints
from rcmae.engine.console import Screen
from rcmae.engine.distributed import World
from rcmae.engine.metrics import read_metrics
from rcmae.engine.run import run_lock
from rcmae.engine.schedules import Progress, default_log_every, spread, warmup_cosine
from rcmae.errors import ConfigError, DataError, DivergedError, OutOfMemoryError, Preempted, ProcessError
from rcmae.interop.load import load
from rcmae.lab import snapshots
from rcmae.methods.recipes import load_recipe
from rcmae.tasks.probe import Probes
from rcmae.trainer import Trainer
from tests.conftest import small, stop_at
from tests.mutations import catches
from tests.processes import start


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Forty random images in two class folders."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(40):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(
            root / "ab"[i % 2] / f"{i:02d}.png"
        )
    return root


def run(
    out: Path | None, data: Path | str, method: str = "rcmae", runtime: dict | None = None, **changes
) -> pretraining.Result:
    recipe = small(method, data=str(data), crop_scale=(0.5, 1.0), flip=True, **changes)
    options = {"device": "cpu", "precision": "fp32", "workers": 0, "save_every": "1h"}
    return pretraining.pretrain(recipe, RuntimeConfig(out=out, **(options | (runtime or {}))))


def weights(out: Path) -> str:
    """One hash of the saved student, teacher and optimizer."""
    newest = checkpoints(out / "checkpoints")[0]
    return hashlib.sha256(
        b"".join((newest / f"{n}.safetensors").read_bytes() for n in ("model", "optimizer"))
    ).hexdigest()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, folder) -> Path:
    """An uninterrupted run of twelve steps."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(out, folder, steps=12)
    return out


def teacher_from_student(old):
    def load_checkpoint(path, method, optimizer):
        state = old(path, method, optimizer)
        method.teacher.model.load_state_dict(method.student.state_dict())
        return state

    return load_checkpoint


@catches(
    "the optimizer is not restored",
    "rcmae.trainer:load_checkpoint",
    lambda old: lambda path, method, optimizer: (old(path, method, optimizer), optimizer.state.clear())[0],
)
@catches("the teacher is restored from the student", "rcmae.trainer:load_checkpoint", teacher_from_student)
@pytest.mark.parametrize("stops", [(1,), (5,), (11,), (2, 3, 7)])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    tmp_path, folder, uninterrupted, monkeypatch, stops
):
    for stop in stops:
        with monkeypatch.context() as patch:
            stop_at(patch, pretraining.Pretraining, stop)
            with pytest.raises(
                Preempted, match=f"SIGTERM; saved at step {stop}, run the same command again"
            ) as e:
                run(tmp_path / "run", folder, steps=12)
            assert e.value.exit_code == 75
    run(tmp_path / "run", folder, steps=12)
    assert weights(tmp_path / "run") == weights(uninterrupted)


@pytest.mark.parametrize(
    "runtime", [{"workers": 2}, {"threads": 1}, {"keep": 1, "save_every": "1s", "log_every": 1}]
)
def test_runtime_settings_change_nothing(tmp_path, folder, uninterrupted, runtime):
    run(tmp_path / "run", folder, steps=12, runtime=runtime)
    assert weights(tmp_path / "run") == weights(uninterrupted)


def test_another_seed_gives_another_result(tmp_path, folder, uninterrupted):
    run(tmp_path / "run", folder, steps=12, seed=1)
    assert weights(tmp_path / "run") != weights(uninterrupted)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("mae", {}), ("rcmae", {"teacher_mask": "same"}), ("rcmae", {"teacher_mask": "different"})],
    ids=str,
)
def test_accumulation_gives_the_gradients_of_the_whole_batch(tmp_path, folder, kind, settings, monkeypatch):
    """1 x 8 against 4 x 2, through the training loop."""
    gradients = []
    step = torch.optim.AdamW.step

    def noted(optimizer, *args):
        gradients.append([p.grad.clone() for g in optimizer.param_groups for p in g["params"]])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    for micro in (1, 4):
        run(tmp_path / str(micro), folder, kind, steps=2, runtime={"accumulate": micro}, **settings)
    # The second step: in the first, student and teacher agree under any mask.
    scale = max(g.abs().max() for g in gradients[1])
    for one, four in zip(gradients[1], gradients[3], strict=True):
        assert (one - four).abs().max() <= 1e-6 * scale


def saving(out: Path, data: Path) -> None:
    """A run that saves after every step."""
    torch.set_num_threads(1)
    run(out, data, steps=12, runtime={"save_every": "0.000001s", "log_every": 1})


def test_runs_survive_sigkill_at_any_moment(tmp_path, folder, uninterrupted):
    """A real process that is killed while it trains and saves, then resumed to the end."""
    log, kills = tmp_path / "output.txt", 0
    for attempt, steps in enumerate((2, 1, 3, 1)):
        process, deadline = start(log, saving, tmp_path / "run", folder), time.monotonic() + 60
        while process.is_alive() and log.read_text().count("\nstep ") < steps and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01 * attempt)  # at different times within a step
        assert "\nstep " in log.read_text(), "the process was training"
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    done = start(log, saving, tmp_path / "run", folder)
    done.join(60)
    done.kill()
    done.join()
    assert done.exitcode == 0, log.read_text()
    assert kills >= 2
    assert weights(tmp_path / "run") == weights(uninterrupted)


def test_the_contents_of_a_run_directory(uninterrupted):
    names = {p.name for p in uninterrupted.iterdir()}
    assert names >= {
        "recipe.toml",
        "machine.json",
        "metrics.jsonl",
        "checkpoints",
        "export",
        "report.html",
        "snapshots",
    }
    runtime = json.loads((uninterrupted / "machine.json").read_text())
    assert runtime["steps"] == 12
    assert runtime["images"] == 40
    kinds = [line["kind"] for line in read_metrics(uninterrupted)]
    assert kinds.count("train") == 12
    assert "reference" in kinds
    line = next(line for line in read_metrics(uninterrupted) if line["kind"] == "train")
    assert {
        "loss",
        "reconstruction",
        "consistency",
        "teacher_reconstruction",
        "momentum",
        "half_life_images",
        "drift",
        "lr",
    } <= set(line)
    assert load(uninterrupted)(torch.rand(1, 3, 16, 16)).cls.shape == (1, 24)
    assert not torch.equal(
        load(uninterrupted, "student").vit.norm.bias, load(uninterrupted, "teacher").vit.norm.bias
    )


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path, folder, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, pretraining.Pretraining, 4)
        with pytest.raises(Preempted):
            run(tmp_path / "run", folder, steps=12)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(
        metrics.read_text() + json.dumps({"kind": "train", "step": 9, "loss": 1.0}) + '\n{"kind": "tr'
    )
    run(tmp_path / "run", folder, steps=12)
    steps = [line["step"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert steps == list(range(1, 13))


def test_a_finished_run_is_not_changed_by_running_it_again(tmp_path, folder, capsys):
    run(tmp_path / "run", folder, steps=2)
    before = weights(tmp_path / "run")
    capsys.readouterr()
    assert run(tmp_path / "run", folder, steps=2).step == 2
    assert "is finished at step 2" in capsys.readouterr().out
    assert weights(tmp_path / "run") == before
    lost = tmp_path / "run" / "export" / "teacher"
    files = {path.name: path.read_bytes() for path in lost.iterdir()}
    shutil.rmtree(lost)
    run(tmp_path / "run", folder, steps=2)
    assert {path.name: path.read_bytes() for path in lost.iterdir()} == files, (
        "a missing export is written again"
    )


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"
            ),
            OutOfMemoryError,
            "host",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemoryError, "--accumulate 2"),
        (
            torch.distributed.DistBackendError("NCCL communicator was aborted"),
            ProcessError,
            r"another process .*\(NCCL",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            ProcessError,
            "a loader process was lost",
        ),
    ],
)
def test_lost_processes_and_memory_are_named(tmp_path, folder, monkeypatch, failure, kind, message):
    def fail(*args):
        raise failure

    monkeypatch.setattr(pretraining.Pretraining, "update", fail)
    with pytest.raises(kind, match=message):
        run(tmp_path / "run", folder)


def test_a_run_cannot_be_resumed_with_other_settings_or_data(tmp_path, folder):
    run(tmp_path / "run", folder, steps=2)
    with pytest.raises(ConfigError, match=r"was started with .*gamma 1.0 \(now 2.0\).*; use another --out"):
        run(tmp_path / "run", folder, steps=2, gamma=2.0)
    with pytest.raises(DataError, match="has changed since .*: 40 images then, 20 now; use another --out"):
        more = tmp_path / "more"
        for i, path in enumerate(sorted(folder.rglob("*.png"))[:20]):
            more.mkdir(exist_ok=True)
            os.link(path, more / f"{i}.png")
        recipe = small(data=str(more), steps=2)
        (tmp_path / "run" / "recipe.toml").write_text(loop_toml(recipe))
        pretraining.pretrain(recipe, RuntimeConfig(out=tmp_path / "run", device="cpu"))


def forgets_extensions(old):
    def restore(self, state):
        old(self, state | {"extended": []})

    return restore


@catches("an extension has no warm-up", "rcmae.engine.optim:ramp", lambda old: lambda length, step: 1.0)
@catches("a resumed run forgets its extension", "rcmae.pretraining:Pretraining.restore", forgets_extensions)
def test_a_finished_run_is_extended_by_a_greater_length(tmp_path, folder, capsys, monkeypatch):
    """Stopped and resumed within the extension, it is the same to the bit; the images of later epochs
    follow, the learning rate warms up again and then follows the schedule of the new length."""
    seen = []
    update = pretraining.Pretraining.update

    def noted(self, t):
        applied = update(self, t)
        half_life = self.method.half_life(t)
        seen.append(
            (t.step, self.optimizer.param_groups[0]["lr"], half_life, self.sampler(0, 0).keys(t.step))
        )
        return applied

    settings = {"half_life": "25%", "warmup": 0.25}
    for name in ("run", "stopped"):
        run(tmp_path / name, folder, steps=8, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(pretraining.Pretraining, "update", noted)
        assert run(tmp_path / "run", folder, steps=24, **settings).step == 24
    assert "extended from 8 to 24 steps" in capsys.readouterr().out
    steps, rates, half_lives, keys = zip(*seen, strict=True)
    assert steps == tuple(range(8, 24))
    assert half_lives == (6.0,) * 16
    assert {epoch for key in keys for epoch, _ in key} == {1, 2, 3, 4}, "the images of later epochs"
    whole = [warmup_cosine(0.03 * 8 / 256, 0.0, 0.25, Progress(step, 24, 5)) for step in steps]
    assert rates[:4] == pytest.approx([rate * k / 4 for k, rate in enumerate(whole[:4])])
    assert rates[4:] == pytest.approx(whole[4:])
    for stop in (9, 20):
        with monkeypatch.context() as patch:
            stop_at(patch, pretraining.Pretraining, stop)
            with pytest.raises(Preempted):
                run(tmp_path / "stopped", folder, steps=24, **settings)
    run(tmp_path / "stopped", folder, steps=24, **settings)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "run")
    assert load_recipe(str(tmp_path / "run" / "recipe.toml")).steps == 24
    machine = json.loads((tmp_path / "run" / "machine.json").read_text())
    assert (machine["steps"], machine["extended"]) == (24, [[8, 24]])
    events = [line for line in read_metrics(tmp_path / "stopped") if line["kind"] == "event"]
    assert [e["step"] for e in events if e["text"] == "extended from 8 to 24 steps"] == [8]
    trained = [line["step"] for line in read_metrics(tmp_path / "stopped") if line["kind"] == "train"]
    assert trained == list(range(1, 25))
    assert "Extended at step 8 to 24 steps" in (tmp_path / "run" / "report.html").read_text()
    run(tmp_path / "run", folder, epochs=6.0, steps=None, **settings)
    assert checkpoints(tmp_path / "run" / "checkpoints")[0].name == "step_00000030", "extended twice"


@catches("any setting of a run may change", "rcmae.pretraining:Pretraining.free", lambda old: (*old, "gamma"))
def test_only_the_length_of_a_finished_run_may_change(tmp_path, folder, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, pretraining.Pretraining, 3)
        with pytest.raises(Preempted):
            run(tmp_path / "run", folder, steps=10)
    for steps in (2, 20):
        with pytest.raises(
            ConfigError, match=rf"at step 3 of 10, --steps {steps} .* is another length: finish"
        ):
            run(tmp_path / "run", folder, steps=steps)
    run(tmp_path / "run", folder, epochs=2.0, steps=None)  # the same length in another unit
    before = weights(tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"has made 10 steps already, more than --steps 9 \(9 steps\); give more"
    ):
        run(tmp_path / "run", folder, steps=9)
    with pytest.raises(ConfigError, match=r"was started with gamma 1.0 \(now 2.0\); use another --out"):
        run(tmp_path / "run", folder, steps=20, gamma=2.0)
    assert weights(tmp_path / "run") == before
    assert load_recipe(str(tmp_path / "run" / "recipe.toml")).steps == 10
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("run").rename(Path("runs") / f"rcmae-{folder.name}")
    with pytest.raises(
        ConfigError, match="holds a finished run of 10 steps, .* give --out runs/rcmae-.* to extend"
    ):
        run(None, folder, steps=20)


def test_an_extension_by_time_is_converted_at_the_speed_so_far(tmp_path, folder, monkeypatch, capsys):
    run(tmp_path / "run", folder, steps=2)
    state = checkpoints(tmp_path / "run" / "checkpoints")[0] / "state.json"
    seconds = json.loads(state.read_text())["seconds"]
    run(tmp_path / "run", folder, steps=None, time=f"{3.01 * seconds:.6f}s")
    assert checkpoints(tmp_path / "run" / "checkpoints")[0].name == "step_00000006"
    monkeypatch.setattr(pretraining.Recipe, "most_steps", lambda self, images: 7)
    run(tmp_path / "run", folder, steps=None, time=f"{100 * seconds:.6f}s")
    assert checkpoints(tmp_path / "run" / "checkpoints")[0].name == "step_00000007", "as many as a new run"
    assert "a time stops at 7 steps on so few images" in capsys.readouterr().out


def test_a_kill_while_an_extension_is_recorded_does_not_lose_it(tmp_path, folder, monkeypatch):
    """After recipe.toml has been written, and before the checkpoint: both lengths, and others, are still
    possible."""
    run(tmp_path / "run", folder, steps=2)

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretraining.Pretraining, "record_extension", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", folder, steps=4)
    assert load_recipe(str(tmp_path / "run" / "recipe.toml")).steps == 4
    run(tmp_path / "run", folder, steps=2)
    assert load_recipe(str(tmp_path / "run" / "recipe.toml")).steps == 2
    assert run(tmp_path / "run", folder, steps=3).step == 3
    assert json.loads((tmp_path / "run" / "machine.json").read_text())["extended"] == [[2, 3]]


def loop_toml(recipe) -> str:
    from rcmae.config import to_toml

    return to_toml(recipe)


def test_two_runs_do_not_share_a_directory(tmp_path, folder, monkeypatch):
    inner = []

    def nested(run_, t):
        with pytest.raises(ConfigError, match=rf"is in use by process {os.getpid()}; choose another --out"):
            run(tmp_path / "run", folder, steps=1)
        inner.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretraining.Pretraining, "update", nested)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", folder, steps=1)
    assert inner
    run(tmp_path / "run", folder, steps=1)


def poison(monkeypatch, steps: set[int]) -> None:
    """Make the loss of these steps NaN."""
    from rcmae.methods.rcmae import RCMAE

    forward = RCMAE.forward

    def poisoned(method, batch, t):
        losses = forward(method, batch, t)
        return losses | {"loss": losses["loss"] * float("nan")} if t.step in steps else losses

    monkeypatch.setattr(RCMAE, "forward", poisoned)


@catches(
    "updates that are not finite are applied",
    "rcmae.engine.distributed:World.all_ranks",
    lambda old: lambda self, fine: torch.ones_like(fine),
)
def test_a_step_that_is_not_finite_is_skipped_and_named(tmp_path, folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        poison(patch, {3, 4})
        run(tmp_path / "run", folder, steps=8)
    lines = read_metrics(tmp_path / "run")
    events = [line for line in lines if line["kind"] == "event" and "images" in line]
    assert [e["text"].split(":")[0] for e in events] == [
        "step 3 was not finite and was skipped",
        "step 4 was not finite and was skipped",
    ]
    assert len(events[0]["images"]) == 8
    assert "step 3 was not finite" in capsys.readouterr().out
    assert [line["skipped"] for line in lines if line["kind"] == "train"][-1] == 2
    for which in ("student", "teacher"):
        assert all(p.isfinite().all() for p in load(tmp_path / "run", which).parameters())


def test_a_skipped_step_leaves_weights_and_teacher_alone(tmp_path, folder, monkeypatch):
    poison(monkeypatch, {0, 1, 2})
    run(tmp_path / "run", folder, steps=3)
    first = load_file(checkpoints(tmp_path / "run" / "checkpoints")[0] / "model.safetensors")
    monkeypatch.undo()
    run(tmp_path / "other", folder, steps=3, runtime={"keep": 9})
    begin = load_file(checkpoints(tmp_path / "other" / "checkpoints")[-1] / "model.safetensors")
    assert all(torch.equal(v, begin[k]) for k, v in first.items())


@catches("a run never diverges", "rcmae.engine.step:PATIENCE", lambda old: 10**9)
def test_divergence_ends_with_the_last_good_checkpoint(tmp_path, folder, monkeypatch):
    poison(monkeypatch, set(range(4, 99)))
    with pytest.raises(
        DivergedError, match=r"5 steps in a row were not finite.*step_0000000\d is kept; lower --base-lr"
    ) as e:
        run(tmp_path / "run", folder, steps=40)
    assert e.value.exit_code == 5
    assert checkpoints(tmp_path / "run" / "checkpoints")
    assert read_metrics(tmp_path / "run")[-1]["text"] == "diverged: 5 steps in a row were not finite"


def test_a_time_limit_is_converted_to_a_fixed_number_of_steps(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(step_time, "measure_step", lambda run: 0.5)
    result = run(tmp_path / "run", folder, steps=None, time="8s")
    assert 8 <= result.step <= 15
    assert json.loads((tmp_path / "run" / "machine.json").read_text())["steps"] == result.step


def test_measuring_a_step_does_not_change_the_run(tmp_path, folder, uninterrupted, monkeypatch):
    begin = pretraining.Pretraining.begin

    def measured(self):
        assert step_time.measure_step(self, 1, 3) > 0
        begin(self)

    monkeypatch.setattr(pretraining.Pretraining, "begin", measured)
    run(tmp_path / "run", folder, steps=12)
    assert weights(tmp_path / "run") == weights(uninterrupted)


def test_epochs_count_whole_batches(tmp_path, folder):
    assert run(tmp_path / "run", folder, steps=None, epochs=2.0).step == 10


def test_one_image_is_enough_for_a_run(tmp_path):
    (tmp_path / "one").mkdir()
    Image.effect_noise((20, 20), 50).convert("RGB").save(tmp_path / "one" / "a.png")
    assert run(tmp_path / "run", tmp_path / "one", batch_size=1).step == 6


def test_too_few_images_are_reported_with_numbers(tmp_path, folder):
    with pytest.raises(DataError, match="holds 40 images, fewer than the batch of 64; give --batch-size 32"):
        run(tmp_path / "run", folder, batch_size=64)


def test_probes_are_reported_with_their_baselines(tmp_path, folder, capsys):
    result = run(tmp_path / "run", folder, steps=4, probes=2, probe_train=20, probe_test=10)
    lines = read_metrics(tmp_path / "run")
    baseline = next(line for line in lines if line["kind"] == "baseline")
    assert set(baseline) == {"kind", "step", "raw_pixels", "random_init"}
    probes = [line for line in lines if line["kind"] == "probe"]
    assert [p["step"] for p in probes] == [2, 4]
    assert set(probes[0]) == {"kind", "step", "student", "teacher"}
    assert result.probe == {k: probes[-1][k] for k in ("student", "teacher")}
    shown = capsys.readouterr().out
    accuracy = r"[\d.]+ ± [\d.]+"
    assert re.search(rf"randomly initialized encoder\s+│\s+{accuracy} │\s+{accuracy} │", shown)
    assert re.search(
        rf"baselines, .*raw pixels linear probe {accuracy}.*randomly initialized encoder linear", shown
    )
    assert re.search(
        rf"step 2, .*teacher linear probe {accuracy}.*randomly initialized encoder linear", shown
    )
    assert "Learned: not shown." in shown, "ten test images show nothing after four steps"


def test_bf16_and_checkpointing_and_compile_free_options_run(tmp_path, folder):
    run(tmp_path / "run", folder, steps=2, runtime={"precision": "bf16", "checkpointing": True})
    assert all(p.isfinite().all() for p in load(tmp_path / "run").parameters())


def test_activation_checkpointing_changes_no_weight(tmp_path, folder, uninterrupted):
    run(tmp_path / "run", folder, steps=12, runtime={"checkpointing": True})
    assert weights(tmp_path / "run") == weights(uninterrupted)


def test_a_bad_image_is_replaced_named_once_and_changes_no_other(tmp_path, folder):
    import shutil

    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "a" / "00.png").write_bytes(b"not an image")
    run(tmp_path / "run", tmp_path / "data", steps=12, runtime={"max_corrupt_fraction": 0.1})
    bad = [json.loads(line) for line in (tmp_path / "run" / "bad_files.jsonl").read_text().splitlines()]
    assert len(bad) == 1
    assert bad[0]["where"].endswith("00.png")
    with pytest.raises(DataError, match=r"00\.png"):
        run(tmp_path / "strict", tmp_path / "data", steps=12, runtime={"strict": True})


def test_results_are_frozen():
    assert dataclasses.is_dataclass(pretraining.Result)


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(0, 60))
def test_the_requested_number_of_probes_is_made(total, count):
    """At most one per step, evenly spaced, the last one at the end. The number of reconstructions does not
    change."""
    run = SimpleNamespace(total=total, recipe=small(probes=count))
    milestones = pretraining.Pretraining.milestone_steps(run)
    probes = sorted(run.probe_steps)
    assert len(probes) == min(count, total)
    assert set(probes) | spread(total, snapshots.SNAPSHOTS) == milestones
    assert all(1 <= step <= total for step in milestones)
    if count:
        gaps = np.diff([0, *probes])
        assert probes[-1] == total and gaps.max() - gaps.min() <= 1


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3000), st.none() | st.integers(1, 700))
def test_log_lines_are_written_at_the_requested_steps(total, every):
    """Through the training loop, with steps that do nothing."""
    trainer = TrainerWithoutWork(total, every)
    trainer.train()
    every = every or default_log_every(total)
    assert trainer.logged == sorted({*range(every, total + 1, every), total})
    assert trainer.saved == sorted(trainer.milestone_steps())


class TrainerWithoutWork(Trainer):
    """A trainer whose steps do nothing, to see what the loop calls when."""

    def __init__(self, total: int, log_every: int | None):
        self.total, self.step, self.seconds, self.skipped, self.last_milestone = total, 0, 0.0, 0, 0
        self.steps_per_epoch, self.device, self.world, self.screen, self.out = (
            10,
            torch.device("cpu"),
            World(),
            Screen(False),
            Path(),
        )
        self.runtime = RuntimeConfig(log_every=log_every, save_every="9d")
        self.logged, self.saved, self.measured, self.unreadable = [], [], [], []

    def resume_or_begin(self):
        self.log_every = self.runtime.log_every or default_log_every(self.total)

    def loader(self, start, stop):
        return iter(())

    def begin(self): ...

    def update(self, t):
        return torch.ones(())

    def milestone_steps(self):
        return spread(self.total, 7) | spread(self.total, 3)

    def measure(self):
        self.measured.append(self.step)

    def record(self, measurement): ...

    def report(self): ...

    def log(self, t):
        self.logged.append(t.step)

    def save(self):
        self.saved.append(self.step)

    def more_state(self): ...

    def restore(self, state): ...

    def finish(self):
        assert self.measured == self.saved


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"half_life": "0.9 steps"}, "longer --half-life"),
        ({"schedule": "constant", "momentum": 0.4}, "higher --momentum"),
        ({"half_life": "5 steps"}, None),
        ({"half_life": None}, None),
        ({"method": "mae"}, None),
    ],
)
def test_a_short_half_life_is_noted_once(tmp_path, folder, capsys, settings, advice):
    for _ in range(2):
        run(tmp_path / "run", folder, **{"steps": 2} | settings)
    noted = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("note: the teacher's half-life is ")
    ]
    assert len(noted) == (advice is not None)
    assert not advice or noted[0].endswith(f"give a {advice}")


def test_an_uneven_number_of_probes_is_spread_over_the_run(tmp_path, folder):
    run(tmp_path / "run", folder, steps=12, probes=5, probe_train=20, probe_test=10)
    probes = [line["step"] for line in read_metrics(tmp_path / "run") if line["kind"] == "probe"]
    assert probes == [2, 5, 7, 10, 12]


@pytest.mark.parametrize(
    ("requested", "unlabeled", "message"),
    [
        ((20, 10), 0, ""),
        (
            (60, 20),
            0,
            "note: the probes are fitted on 30 labeled images and scored on 10 (60 and 20 were requested)\n",
        ),
        (
            (20, 10),
            4,
            "fitted on 20 labeled images and scored on 10 (20 and 10 were requested); 4 of 40 images without "
            "a label\n",
        ),
    ],
)
def test_probes_on_few_images_report_their_number(
    tmp_path, folder, capsys, monkeypatch, requested, unlabeled, message
):
    def some(recipe, *args):
        source = pretraining.open_source(recipe.data, 3)
        source.labels[:unlabeled] = -1
        return source

    monkeypatch.setattr(pretraining, "open_images", some)
    run(tmp_path / "run", folder, steps=1, probes=1, probe_train=requested[0], probe_test=requested[1])
    out = capsys.readouterr().out
    assert message in out if message else "were requested" not in out


def test_a_time_limit_too_short_for_training_is_rejected(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(step_time, "measure_step", lambda run: 0.5)
    with pytest.raises(
        ConfigError, match=r"--time 4s is enough for \d steps: .*a step 0.50 s; give --time 1m for 100 steps$"
    ):
        run(tmp_path / "run", folder, steps=None, time="4s")
    with pytest.raises(ConfigError, match="or fewer --probes"):
        run(tmp_path / "other", folder, steps=None, time="4s", probes=9, probe_train=20, probe_test=10)


@catches("a refused run leaves its files behind", "rcmae.engine.run:run_directory", lambda old: run_lock)
@pytest.mark.parametrize("exists", [False, True])
def test_an_error_before_the_first_step_leaves_the_directory_unchanged(tmp_path, folder, monkeypatch, exists):
    monkeypatch.setattr(step_time, "measure_step", lambda run: 0.5)
    out, existing = (
        tmp_path / "runs" / "mine",
        {"notes.txt": "mine", "recipe.toml": "an older attempt's", "metrics.jsonl": "and its lines"},
    )
    if exists:
        out.mkdir(parents=True)
        for name, text in existing.items():
            (out / name).write_text(text)
    with pytest.raises(ConfigError, match="--time 4s is enough for"):
        run(out, folder, steps=None, time="4s", probes=1, probe_train=20, probe_test=10)
    with pytest.raises(DataError, match="fewer than the batch"):
        run(out, folder, batch_size=64)
    assert (tmp_path / "runs").exists() == exists
    assert not exists or {path.name: path.read_text() for path in out.iterdir()} == existing


def test_an_error_for_bad_images_keeps_the_file_that_lists_them(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(b"no")
        if i % 4 == 0:
            Image.new("RGB", (20, 20)).save(tmp_path / f"{i}.png")
    with pytest.raises(DataError, match=r"all are listed in .*bad_files.jsonl"):
        run(tmp_path / "run", tmp_path, steps=None, time="1m")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["bad_files.jsonl"]


def test_a_signal_during_a_step_discards_the_step(tmp_path, folder, uninterrupted, monkeypatch):
    """The state before it is saved, and the resumed run is equal to the bit."""
    from rcmae.methods.rcmae import RCMAE

    compare = RCMAE.compare

    def signaled(method, batch):
        if len(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
        calls.append(1)
        return compare(method, batch)

    with monkeypatch.context() as patch:
        calls: list[int] = []
        patch.setattr(RCMAE, "compare", signaled)
        with pytest.raises(Preempted, match="SIGTERM; saved at step 4"):
            run(tmp_path / "run", folder, steps=12)
    run(tmp_path / "run", folder, steps=12)
    assert weights(tmp_path / "run") == weights(uninterrupted)


def test_a_signal_within_a_milestone_repeats_it_after_the_resume(tmp_path, folder, monkeypatch):
    settings = {"steps": 12, "probes": 3, "probe_train": 20, "probe_test": 10}
    run(tmp_path / "uninterrupted", folder, **settings)
    score = Probes.score

    def signaled(probes, backbones, step, last):
        signal.raise_signal(signal.SIGINT)
        return score(probes, backbones, step, last)

    with monkeypatch.context() as patch:
        patch.setattr(Probes, "score", signaled)
        with pytest.raises(Preempted, match="SIGINT; saved at step 4"):
            run(tmp_path / "run", folder, **settings)
    run(tmp_path / "run", folder, **settings)
    assert weights(tmp_path / "run") == weights(tmp_path / "uninterrupted")
    lines = [
        [line for line in read_metrics(tmp_path / name) if line["kind"] == "probe"]
        for name in ("uninterrupted", "run")
    ]
    assert lines[0] == lines[1]


@catches(
    "a signal outside of a step is not reported as Preempted",
    "rcmae.engine.run:preempted",
    lambda old: lambda name, step: signals.Interrupted(signal.Signals[name]),
)
def test_a_signal_during_the_setup_of_a_resumed_run_reports_its_checkpoint(tmp_path, folder, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, pretraining.Pretraining, 2)
        with pytest.raises(Preempted):
            run(tmp_path / "run", folder)
    monkeypatch.setattr(pretraining, "open_images", lambda *args: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Preempted, match="by SIGINT; saved at step 2, run the same command again") as e:
        run(tmp_path / "run", folder)
    assert e.value.exit_code == 75


@catches(
    "a milestone that was not saved stays in the metrics",
    "rcmae.trainer:Metrics",
    lambda old: lambda run, step, milestone, *sinks: old(run, step, step or 0, *sinks),
)
def test_a_milestone_that_was_recorded_but_not_saved_is_recorded_once(tmp_path, folder, monkeypatch):
    """A signal arrives during the milestone, the resumed run is killed between its record and its checkpoint,
    and the next one resumes."""
    settings = {"steps": 12, "probes": 3, "probe_train": 20, "probe_test": 10}

    def signaled(probes, backbones, step, last):
        signal.raise_signal(signal.SIGINT)

    def killed(self, measurement):
        record(self, measurement)
        raise KeyboardInterrupt

    record = pretraining.Pretraining.record
    with monkeypatch.context() as patch:
        patch.setattr(Probes, "score", signaled)
        with pytest.raises(Preempted, match="saved at step 4"):
            run(tmp_path / "run", folder, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(pretraining.Pretraining, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", folder, **settings)
    assert [line["step"] for line in read_metrics(tmp_path / "run") if line["kind"] == "probe"] == [4]
    run(tmp_path / "run", folder, **settings)
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "probe"] == [4, 8, 12]
    steps = [line["step"] for line in lines if "lidar" in line]
    assert steps and len(steps) == len(set(steps))
    assert len([line for line in lines if line["kind"] == "train" and line["step"] == 4]) == 1


def test_a_signal_before_the_first_step_ends_the_run_without_a_checkpoint(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(Probes, "baselines", lambda *args: signal.raise_signal(signal.SIGINT))
    with pytest.raises(signals.Interrupted) as e:
        run(tmp_path / "run", folder, probes=2, probe_train=20, probe_test=10)
    assert e.value.exit_code == 130
    assert not checkpoints(tmp_path / "run" / "checkpoints")
