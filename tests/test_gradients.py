"""`rcmae lab gradients`: its four batches, its gradients against autograd, and its errors."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rcmae.cli import main
from rcmae.config import to_toml
from rcmae.lab.gradients import CONDITIONS, GradientSettings, GradientStudy, findings, run_gradients
from tests.conftest import small
from tests.test_pretraining import folder, run  # noqa: F401 - a fixture

TINY = GradientSettings(batches=2, batch_size=8, settle=3, device="cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder):  # noqa: F811
    """A run of six steps."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run(out, folder, steps=6)
    return out


def test_each_condition_has_the_batch_that_it_describes(finished, monkeypatch):
    study = GradientStudy(str(finished), TINY)
    requested, batches = [], []
    batch = study.batch
    monkeypatch.setattr(
        study, "batch", lambda indices, draw: requested.append(indices) or batch(indices, draw)
    )
    monkeypatch.setattr(study, "features", lambda b: batches.append(b) or torch.randn(8, 4))
    rows = study.measure(0)
    assert [row["condition"] for row in rows] == list(CONDITIONS)
    i, ii, iii, iv = batches
    assert torch.equal(i["image"], ii["image"])
    assert not torch.equal(i["order"], ii["order"])
    assert not torch.equal(i["image"], iii["image"])
    assert not torch.equal(i["order"], iii["order"])
    assert requested[0] == requested[1], "new crops of the same images"
    assert not set(requested[0]) & set(requested[2]), "other images"
    assert not torch.equal(i["image"], iv["image"])


def test_the_measured_cosines_match_autograd(finished):
    """Against an explicit step and explicit gradients from the same checkpoint."""
    study, reference = GradientStudy(str(finished), TINY), GradientStudy(str(finished), TINY)
    row = study.measure(0)[0]
    m = reference.method.train()
    batch = reference.batch([i for _, i in reference.sampler.keys(0)], 0)
    weights = [p for p in m.student.parameters() if p.requires_grad]

    def flat(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).double()

    c = m.compare(batch)
    before = flat(F.mse_loss(c.prediction, c.target))
    reference.train(batch)
    c = m.compare(batch)
    consistency = flat(F.mse_loss(c.prediction, c.teacher_prediction))
    c = m.compare(batch)
    reconstruction = flat(F.mse_loss(c.prediction, c.target))
    moment = torch.cat([reference.optimizer.state[p]["exp_avg"].flatten() for p in weights]).double()
    assert row["previous"] == pytest.approx(F.cosine_similarity(consistency, before, 0).item(), rel=1e-4)
    assert row["moment"] == pytest.approx(F.cosine_similarity(consistency, moment, 0).item(), rel=1e-4)
    assert row["ratio"] == pytest.approx((consistency.norm() / reconstruction.norm()).item(), rel=1e-4)
    assert row["similarity"] == pytest.approx(1)
    assert row["previous"] < -0.1, "on the same inputs, consistency opposes the previous step"


def test_the_command_writes_its_page_and_leaves_the_run_alone(finished, tmp_path, capsys):
    files = sorted((p, p.stat().st_mtime_ns) for p in finished.rglob("*") if p.is_file())
    argv = [
        "lab",
        "gradients",
        str(finished),
        "--batches",
        "3",
        "--batch-size",
        "8",
        "--settle",
        "2",
        "--device",
        "cpu",
    ]
    assert main([*argv, "--out", str(tmp_path / "page")]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}:" in out for name in CONDITIONS)
    assert "effect on other images:" in out
    assert sorted((p, p.stat().st_mtime_ns) for p in finished.rglob("*") if p.is_file()) == files
    study = json.loads((tmp_path / "page" / "gradients.json").read_text())
    assert len(study["rows"]) == 12
    for line in study["summary"]:
        mean, low, high = line["previous"]
        assert low <= mean <= high
    assert (tmp_path / "page" / "gradients.html").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"schedule": "constant", "momentum": 0.0},
            "The consistency gradient is zero on every batch: teacher and student are the same",
        ),
        ({"gamma": 0.0}, "The consistency loss has weight 0"),
    ],
)
def test_without_consistency_there_is_nothing_to_judge(tmp_path, folder, changes, reason):  # noqa: F811
    run(tmp_path / "run", folder, steps=2, **changes)
    study = run_gradients(str(tmp_path / "run"), TINY)
    ((tone, text),) = study["findings"]
    assert tone == "note" and text.startswith(reason) and text.endswith("there is nothing to judge.")


def test_findings_say_when_theory_does_not_hold():
    def findings_for(means):
        rng = np.random.default_rng(0)
        rows = [
            {"condition": c, "previous": m + 0.01 * rng.standard_normal(), "ratio": 0.5}
            for c, m in zip(CONDITIONS, means, strict=True)
            for _ in range(20)
        ]
        return findings(rows, {"whole_images": False, "gamma": 1.0})

    as_expected = findings_for((-0.9, -0.5, -0.4, 0.0))
    assert [tone for tone, _ in as_expected] == [*["good"] * 4, "note"]
    assert "other images: none found" in as_expected[4][1]
    upside_down = findings_for((-0.1, -0.5, -0.5, -0.6))
    assert "the order is reversed" in upside_down[0][1]
    assert "no difference" in upside_down[1][1]
    assert "effect on other images: the step is reverted" in upside_down[4][1]


def test_failures_are_reported_in_one_line(tmp_path, capsys, folder, finished):  # noqa: F811
    run(tmp_path / "mae", folder, "mae", steps=2)
    (tmp_path / "bare").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.toml").write_text(to_toml(small(data=str(folder))))
    recipe = small(data=str(folder))
    (tmp_path / "wild.toml").write_text(
        to_toml(dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, base_lr=1e30)))
    )
    cases = [
        ([str(tmp_path / "mae")], 2, "whose gradients are compared here; give a run of rcmae"),
        ([str(tmp_path / "bare")], 2, "is no run directory: recipe.toml is missing"),
        ([str(tmp_path / "nowhere")], 2, "there is no recipe"),
        ([str(tmp_path / "begun")], 4, "has no checkpoint"),
        (
            [str(finished), "--batch-size", "30"],
            3,
            "holds 40 images, fewer than two batches of 30; lower --batch-size",
        ),
        ([str(finished), "--batches", "1"], 2, "an interval needs 2 batches or more, not 1"),
        ([str(finished), "--batch-size", "1"], 2, "a batch needs 2 images or more"),
        ([str(tmp_path / "wild.toml")], 5, "the loss is not finite"),
    ]
    for argv, code, text in cases:
        assert main(["lab", "gradients", *argv, "--device", "cpu"]) == code, argv
        err = capsys.readouterr().err
        assert err.startswith("rcmae: error: "), argv
        assert err.count("\n") == 1, argv
        assert text in err, (argv, err)
