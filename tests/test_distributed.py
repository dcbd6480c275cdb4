"""Two processes give the same weights as one, and agree on skipped steps and on stopping."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rcmae.config import to_toml
from rcmae.data.sources import open_source
from rcmae.engine.checkpoint import checkpoints
from rcmae.engine.metrics import read_metrics
from rcmae.interop.timm_export import export
from rcmae.tasks.detection.coco import open_coco
from tests import distributed_case, test_detection_train, test_finetune
from tests.distributed_case import METHODS, random_init
from tests.mutations import catches
from tests.processes import ranks
from tests.test_finetune import fill
from tests.test_pretraining import folder, run  # noqa: F401 - a fixture


def together(out: Path, data: Path, case: str = "plain", ends: tuple[int, int] = (0, 0)) -> str:
    """The output of both ranks, which must end with these exit codes."""
    codes, output = ranks(out.with_name(f"{out.name}-{case}"), distributed_case.main, out, data, case)
    assert codes == list(ends), output[-5000:]
    assert any(ends) or "Warning" not in output, output
    return output


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(out / "checkpoints")[0] / "model.safetensors")


@catches(
    "the logged losses are those of one rank",
    "rcmae.engine.distributed:average",
    lambda old: lambda value: value,
    case="plain",
)
@catches(
    "the second rank reads other images from its cache",
    "rcmae.data.cache:Decoded.opened",
    lambda old: lambda self, index: old(self, index - int(os.environ.get("RANK", "0"))),
    case="cache",
)
@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "cache"])
def test_two_processes_train_like_one(case, tmp_path, folder):  # noqa: F811
    run(tmp_path / "one", folder, steps=6)
    output = together(tmp_path / "two", folder, case)
    assert output.count("--cache ram: 40 images in 58 kB; none is reduced") == (case == "cache")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        # The key biases have no gradient but rounding (see benchmarks/parity.py), which differs.
        if not name.endswith("qkv.bias"):
            assert torch.allclose(value, two[name], rtol=1e-3, atol=2e-5), name
    metrics = [
        [line["reconstruction"] for line in read_metrics(tmp_path / k) if line["kind"] == "train"]
        for k in ("one", "two")
    ]
    assert len(metrics[1]) == 6, "one record for both"
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-4), "the mean over both halves of the batch"


@catches(
    "each rank has a center of its own",
    "rcmae.methods.distillation:average",
    lambda old: lambda value: value,
    case="dino",
)
@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_batch_statistics_are_those_of_all_ranks(name, tmp_path, folder):  # noqa: F811
    """Negatives, centers, balanced targets, mean entropy and batch normalization use both halves of the
    batch: the losses stay the same."""
    together(tmp_path / "two", folder, name)
    run(tmp_path / "one", folder, **METHODS[name])
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / k) if line["kind"] == "train"]
        for k in ("one", "two")
    ]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
def test_a_bad_loss_on_one_rank_is_skipped_on_both(tmp_path, folder):  # noqa: F811
    together(tmp_path / "run", folder, "nan")
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines if line["kind"] == "train"][-1] == 1
    assert all(v.isfinite().all() for v in weights(tmp_path / "run").values())


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both(tmp_path, folder):  # noqa: F811
    together(tmp_path / "run", folder, "stop")
    assert checkpoints(tmp_path / "run" / "checkpoints")[0].name == "step_00000004"
    together(tmp_path / "run", folder)
    assert checkpoints(tmp_path / "run" / "checkpoints")[0].name == "step_00000006"


@pytest.mark.slow
def test_two_processes_fine_tune_like_two_micro_batches(tmp_path):
    """Mixtures, dropped paths and correct predictions on test images are the same; sums are computed in
    another order."""
    sets = tuple(
        open_source(str(fill(tmp_path / name, count))) for name, count in (("train", 32), ("test", 21))
    )
    one = test_finetune.run(tmp_path / "one", sets, test_finetune.FULL, accumulate=2)
    together(tmp_path / "two", tmp_path, "finetune")
    for name, value in weights(tmp_path / "one").items():
        if not name.endswith("qkv.bias"):
            assert torch.allclose(value, weights(tmp_path / "two")[name], rtol=1e-3, atol=2e-5), name
    scores = load_file(tmp_path / "two" / "test.safetensors")
    assert torch.allclose(scores["confidence"], torch.from_numpy(one.confidence), atol=1e-4)
    assert (scores["correct"].numpy() == one.correct).all()
    vals = [
        [line["accuracy"] for line in read_metrics(tmp_path / k) if line["kind"] == "val"]
        for k in ("one", "two")
    ]
    assert vals[0] == pytest.approx(vals[1])


@pytest.mark.slow
def test_two_processes_train_a_detector_like_two_micro_batches(tmp_path):
    """Every test image is evaluated once and in order, both ranks end with the same detector, and one of them
    writes the results."""
    sets = open_coco("bundled:scenes", train_images=8, test_images=5, size=64)
    settings = dataclasses.replace(test_detection_train.TINY, steps=3, warmup_steps=1)
    export(test_detection_train.backbone(), tmp_path / "backbone", {})
    (tmp_path / "tiny.toml").write_text(to_toml(settings))
    output = together(tmp_path / "two", tmp_path, "detect")
    assert [output.count(text) for text in ("note: printed once", "Open ", "the detector is in")] == [
        1,
        1,
        1,
    ], output
    assert (tmp_path / "two" / "report.html").exists()

    detections, expected = json.loads((tmp_path / "detections0.json").read_text()), random_init(sets[1])
    assert len(expected) > 20 and [r["image_id"] for r in detections] == [r["image_id"] for r in expected]
    assert [r["score"] for r in detections] == pytest.approx([r["score"] for r in expected], abs=1e-5)

    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    test_detection_train.run(tmp_path / "one", sets, settings, accumulate=2)
    for name, value in weights(tmp_path / "one").items():
        if not name.endswith("qkv.bias"):
            assert torch.allclose(value, first[name], rtol=1e-3, atol=2e-5), name


@pytest.mark.slow
def test_a_lost_rank_is_reported_by_the_other(tmp_path, folder):  # noqa: F811
    together(tmp_path / "run", folder, "lost", ends=(0, 9))
    assert (tmp_path / "run" / "error.txt").read_text().startswith("another process of the run was lost (")
