"""A checkpoint is complete or absent, damage is detected, and nothing else is loaded as one."""

import contextlib
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rcmae.engine import checkpoint as cp
from rcmae.engine.metrics import Metrics, read_metrics
from rcmae.engine.optim import adamw
from rcmae.engine.run import record_recipe, run_lock
from rcmae.engine.schedules import Progress
from rcmae.errors import CheckpointError, ConfigError, StorageError
from rcmae.methods.recipes import load_recipe
from tests.conftest import batch_for, method_for, small
from tests.mutations import catches

STATE = {"total_steps": 9, "skipped": 0}


def trained(steps: int = 2):
    method = method_for(small())
    optimizer = adamw(method.student, method.recipe.optim, 1e-3)
    for step in range(steps):
        method(batch_for(method, seed=step), Progress(step, 9, 3))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(Progress(step, 9, 3), torch.ones(()))
    return method, optimizer


def save(folder, step, model=None, keep=2):
    return cp.save_checkpoint(folder, *(model or trained()), STATE | {"step": step}, keep)


def test_a_loaded_checkpoint_equals_the_saved_state(tmp_path):
    method, optimizer = trained()
    path = save(tmp_path, 2, (method, optimizer))
    other, fresh = trained(0)
    assert cp.load_checkpoint(path, other, fresh) == STATE | {"step": 2}
    for name, value in method.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    saved, loaded = cp.optimizer_state(method, optimizer), cp.optimizer_state(other, fresh)
    assert saved.keys() == loaded.keys()
    assert len(saved) > 30
    assert all(torch.equal(v, loaded[k]) for k, v in saved.items())
    assert any(k.startswith("teacher") for k in method.state_dict())


@catches("hashes are not verified", "rcmae.engine.checkpoint:verify", lambda old: lambda path: None)
def test_flipped_bits_and_truncated_files_are_detected(tmp_path):
    path = save(tmp_path, 1)
    rng = random.Random(0)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
        file = path / name
        original = file.read_bytes()
        for _ in range(40):
            damaged = bytearray(original)
            if rng.random() < 0.5:
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            else:
                damaged = damaged[: rng.randrange(len(damaged))]
            file.write_bytes(damaged)
            if name == "manifest.json" and json_equal(damaged, original):
                continue
            assert cp.verify(path), name
        file.write_bytes(original)
        assert cp.verify(path) is None


def json_equal(a: bytes, b: bytes) -> bool:
    """A flipped bit in white space does not change the manifest."""
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


@catches(
    "only the largest checkpoint is found",
    "rcmae.engine.checkpoint:checkpoints",
    lambda old: lambda folder: sorted(folder.glob("step_*"), key=lambda p: p.stat().st_size)[-1:],
)
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    messages = []
    (tmp_path / "step_00000002" / "model.safetensors").write_bytes(b"x")
    assert cp.newest(tmp_path, messages.append).name == "step_00000001"
    assert "step_00000002 is damaged (model.safetensors does not match its hash)" in messages[0]
    (tmp_path / "step_00000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint .* is damaged"):
        cp.newest(tmp_path, messages.append)
    assert cp.newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("manifest", [b"{}", b"[]", b"3", b'{"state.json": "x"}'])
def test_an_incomplete_manifest_is_reported_as_damage(tmp_path, manifest):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_bytes(manifest)
    assert cp.verify(path) == "its manifest is incomplete"


def test_metrics_survive_a_full_disk_at_a_resume(tmp_path, monkeypatch):
    """The metrics are cut back to the checkpoint by replacing the file: the old file stays until the new one
    is complete."""
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 1}\n5\n{"kind": "train", "step": 9}\n{"ki'
    )

    def refuse(path, content):
        path.write_bytes(content[: len(content) // 2])
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(cp, "_write", refuse)
        with pytest.raises(StorageError, match=r"metrics.jsonl: No space left on device"):
            Metrics(tmp_path, 1, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 9]
    metrics = Metrics(tmp_path, 1, 1)
    metrics.close()
    metrics.file = Path("/dev/full").open("a")  # noqa: SIM115 - closed below
    with pytest.raises(StorageError, match=r"cannot write .*metrics.jsonl: No space left on device"):
        metrics.write("train", 2, loss=1.0)
    metrics.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


@pytest.mark.parametrize(
    "text",
    [
        '{"kind": "train", "step": null}',
        '{"kind": "train", "step": "1"}',
        '{"kind": "train", "step": 1.5}',
        '{"kind": "train"}',
        '{"kind": "train", "step": true}',
        '{"step": 1}',
        '{"kind": null, "step": 1}',
        "5",
        '{"kind": "tr',
    ],
)
def test_a_malformed_line_of_the_metrics_is_left_out(tmp_path, text):
    """Anywhere in the file; the next resume removes it from the file too."""
    valid = '{"kind": "train", "step": 1}'
    (tmp_path / "metrics.jsonl").write_text(f"{text}\n{valid}\n{text}\n")
    assert read_metrics(tmp_path) == [json.loads(valid)]
    Metrics(tmp_path, 1, 1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == valid + "\n"


def test_only_the_last_record_of_a_repeated_milestone_is_read(tmp_path):
    """Other lines may occur twice in a step."""
    lines = [
        {"kind": "probe", "step": 1, "student": {"linear": 1.0}},
        {"kind": "health", "step": 1, "rankme": 2.0},
        {"kind": "health", "step": 1, "lidar": 2.0},
        {"kind": "event", "step": 1, "text": "one"},
        {"kind": "event", "step": 1, "text": "two"},
        {"kind": "health", "step": 1, "lidar": 3.0},
        {"kind": "probe", "step": 1, "student": {"linear": 4.0}},
        {"kind": "probe", "step": 2, "student": {"linear": 5.0}},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(tmp_path) == [lines[1], *lines[3:]]


def test_a_resume_continues_every_sink_at_the_same_step(tmp_path, monkeypatch):
    """W&B by the run's id, TensorBoard without the points after the checkpoint."""
    init_options, purge_steps = [], []
    wandb = SimpleNamespace(
        init=lambda **options: (
            init_options.append(options) or SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)
        )
    )
    board = SimpleNamespace(
        SummaryWriter=lambda place, purge_step: (
            purge_steps.append(purge_step) or SimpleNamespace(add_scalar=lambda *a: None, close=lambda: None)
        )
    )
    monkeypatch.setattr(
        "rcmae.engine.metrics.optional", lambda module, extra: {"wandb": wandb, "tensorboard": board}[extra]
    )
    for step in (None, 3):
        Metrics(tmp_path, step, tensorboard=True, wandb="project").close()
    assert init_options[0]["id"] == init_options[1]["id"] != ""
    assert init_options[0]["resume"] == "allow"
    assert purge_steps == [None, 4]


def test_a_run_without_a_checkpoint_can_be_started_with_another_recipe(tmp_path):
    """Files of a failed start do not constrain the next one; a checkpoint does. Moved data does not change
    the recipe."""
    record_recipe(tmp_path, small(seed=1), load_recipe)
    (tmp_path / "bad_files.jsonl").write_text('{"index": 0}\n')
    record_recipe(tmp_path, small(seed=2, data="here"), load_recipe)
    assert load_recipe(str(tmp_path / "recipe.toml")).seed == 2
    assert not (tmp_path / "bad_files.jsonl").exists()
    save(tmp_path / "checkpoints", 0)
    record_recipe(tmp_path, small(seed=2, data="there"), load_recipe)
    with pytest.raises(ConfigError, match=r"was started with seed 2 \(now 3\); use another --out"):
        record_recipe(tmp_path, small(seed=3, data="there"), load_recipe)


def test_a_full_disk_while_locking_is_reported_in_one_line(tmp_path, monkeypatch):
    def refuse(handle, content):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "write", refuse)
    with (
        pytest.raises(StorageError, match="cannot write the run directory .*: No space left on device"),
        run_lock(tmp_path / "run"),
    ):
        pytest.fail("entered")


def test_the_newest_are_kept_by_step_not_by_name_or_time(tmp_path):
    model = trained()
    for step in (9, 10, 100, 11):
        save(tmp_path, step, model)
    assert [p.name for p in cp.checkpoints(tmp_path)] == ["step_00000100", "step_00000011"]


@catches(
    "checkpoints are written in place",
    "rcmae.engine.checkpoint:write_folder",
    lambda old: lambda path, files: path.mkdir(parents=True, exist_ok=True) or old(path, files),
)
def test_a_crash_at_any_call_leaves_an_older_or_the_new_checkpoint(tmp_path, monkeypatch):
    """Every write, flush, rename and delete fails once; the disk always has a complete checkpoint."""
    model = trained()
    calls = ["open", "fsync", "rename", "rmtree", "mkdir"]

    class Crash(BaseException):
        pass

    def run(limit: int) -> bool:
        count = 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == limit:
                    raise Crash
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(cp.os, "open", counted(os.open))
            patch.setattr(cp.os, "fsync", counted(os.fsync))
            patch.setattr(cp.Path, "rename", counted(cp.Path.rename))
            patch.setattr(cp.Path, "mkdir", counted(cp.Path.mkdir))
            patch.setattr(cp.shutil, "rmtree", counted(cp.shutil.rmtree))
            patch.setattr(cp, "_write", counted(cp._write))
            try:
                save(tmp_path, limit + 1, model)
            except Crash:
                return True
        return False

    save(tmp_path, 0, model)
    limit = 1
    while run(limit):
        assert cp.newest(tmp_path, lambda text: pytest.fail(text)) is not None
        limit += 1
    assert limit > 12, calls


@pytest.mark.parametrize("errno", [28, 5, 122, 30])
def test_a_full_or_broken_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch, errno):
    save(tmp_path, 1)

    def refuse(path, content):
        path.write_bytes(content[: len(content) // 2])
        raise OSError(errno, os.strerror(errno))

    monkeypatch.setattr(cp, "_write", refuse)
    with pytest.raises(StorageError, match="the previous checkpoint is kept; free some space"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    assert cp.newest(tmp_path) is not None


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = trained()
    with torch.no_grad():
        model[0].teacher.model.decoder.pred.bias[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"teacher.model.decoder.pred.bias is not finite at step 3"):
        save(tmp_path, 3, model)
    assert not list(tmp_path.iterdir())


def test_another_model_does_not_load(tmp_path):
    path = save(tmp_path, 1)
    other = method_for(small(width=32))
    with pytest.raises(CheckpointError, match="belongs to another model"):
        cp.load_checkpoint(path, other, adamw(other.student, other.recipe.optim, 1e-3))


@pytest.mark.parametrize("call", range(1, 4))
def test_a_kill_while_the_same_step_is_saved_again_loses_nothing(tmp_path, monkeypatch, call):
    """At each rename or delete of the replacement: killed twice in a row, then completed."""
    save(tmp_path, 3)
    original = (tmp_path / "step_00000003" / "model.safetensors").read_bytes()

    class Killed(BaseException):
        pass

    for _ in range(2):
        calls = []

        def counted(old, calls=calls):
            def wrapped(*args, **options):
                calls.append(1)
                if len(calls) == call:
                    raise Killed
                return old(*args, **options)

            return wrapped

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", counted(Path.rename))
            with pytest.raises(Killed) if call < 3 else contextlib.nullcontext():
                save(tmp_path, 3)
        cp.recover(tmp_path)
        assert cp.newest(tmp_path).name == "step_00000003"
        assert (tmp_path / "step_00000003" / "model.safetensors").read_bytes() == original
    (tmp_path / f"{cp.ASIDE}step_00000003").mkdir(exist_ok=True)
    (tmp_path / f"{cp.ASIDE}step_00000003" / "left").touch()
    save(tmp_path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]
