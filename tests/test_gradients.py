"""`rcmae lab gradients`: its continuation of a run, its batches and cosines, its tests on known rows, and its
errors."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rcmae.cli import main
from rcmae.config import to_toml
from rcmae.engine.checkpoint import load_checkpoint
from rcmae.lab import gradients
from rcmae.lab.gradients import CONDITIONS, LAGS, TARGETS, TESTED, Continuation, analyzed, run_gradients
from rcmae.lab.settings import GradientSettings
from tests.conftest import small
from tests.mutations import catches
from tests.test_pretraining import folder, run  # noqa: F401 - a fixture

TINY = GradientSettings(blocks=2, settle=2, device="cpu")
NEED = 2 + 2 * 20


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder):  # noqa: F811
    """A run of twelve steps with the checkpoints of all even ones."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run(out, folder, steps=12, batch_size=3, weight_decay_end=0.5, runtime={"keep": 99})
    return out


@pytest.fixture(autouse=True)
def _no_gap(monkeypatch):
    """Without plain steps between blocks."""
    monkeypatch.setattr(gradients, "GAP", 0)


def at(finished, step: int):
    return finished / "checkpoints" / f"step_{step:08d}"


# --- the continuation ---------------------------------------------------------------------------------------


@catches(
    "a continuation does not follow the schedules",
    "rcmae.lab.continuation:set_schedules",
    lambda old: (
        lambda optimizer, optim, shape, t, extended: old(
            optimizer, optim, shape, dataclasses.replace(t, step=0), extended
        )
    ),
)
@catches(
    "a continuation has the masks of another epoch",
    "rcmae.lab.continuation:Continuation.batch",
    lambda old: lambda self, keys: old(self, [(epoch + 1, i) for epoch, i in keys]),
)
def test_a_continuation_makes_the_steps_of_the_run(finished):
    """Two steps from a checkpoint: the weights, teacher and optimizer state of the next one, to the bit."""
    study = Continuation(str(finished), TINY)
    study.start(at(finished, 2), raised=False)
    study.train(), study.recorded()
    reference = Continuation(str(finished), TINY)
    load_checkpoint(at(finished, 4), reference.method, reference.optimizer)
    for name, value in reference.method.state_dict().items():
        assert torch.equal(study.method.state_dict()[name], value), name
    states = [[*s.optimizer.state.values()] for s in (study, reference)]
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(*states, strict=True))


@catches(
    "S - T is not that of the present step",
    "rcmae.lab.gradients:common_targets",
    lambda old: lambda s, past: old(s, past) | {"sum": past[1].update},
)
def test_student_minus_teacher_is_the_weighted_sum_of_all_updates(finished):
    """From a new network, where both are the same, with AdamW and weight decay."""
    study = Continuation(str(finished), TINY)
    study.start(None, raised=True)
    updates = [study.recorded() for _ in range(4)]
    momentum = study.method.momentum_per_step(study.time)
    assert 0 < momentum < 1
    gap = gradients.common_targets(study, dict.fromkeys(LAGS, updates[-1]))["sum"]
    for name, value in gap.items():
        terms = [momentum**i * past.update[name] for i, past in enumerate(reversed(updates), 1)]
        assert torch.allclose(value, sum(terms), rtol=1e-4, atol=1e-7), name


def test_a_run_starts_at_its_quarters_if_enough_steps_are_left(finished, tmp_path):
    study = Continuation(str(finished), TINY)
    assert study.starts(NEED) == [(at(finished, 12), True)]
    assert [path.name[-2:] for path, raised in study.starts(3) if not raised] == ["04", "06", "08"]
    assert [path.name[-2:] for path, _ in study.starts(7)] == ["04"]
    manifest = at(finished, 6) / "manifest.json"
    manifest.rename(tmp_path / "manifest.json")
    try:
        assert [path.name[-2:] for path, _ in study.starts(3)] == ["04", "08"], "a damaged one is left out"
    finally:
        (tmp_path / "manifest.json").rename(manifest)
    fixed = Continuation(str(finished), dataclasses.replace(TINY, lr=0.01))
    assert fixed.starts(3) == [(at(finished, 12), True)]


# --- what is measured ---------------------------------------------------------------------------------------


@catches("other images are drawn at random", "numpy:lexsort", lambda old: lambda keys: old(keys[:1]))
def test_each_condition_has_the_batch_that_it_describes(finished, monkeypatch):
    study = Continuation(str(finished), TINY)
    batches, trained, requested = [], [], []
    train, batch = study.train, study.batch
    monkeypatch.setattr(study, "train", lambda: trained.append(train()) or trained[-1])
    monkeypatch.setattr(study, "batch", lambda keys: requested.append(keys) or batch(keys))
    monkeypatch.setattr(gradients, "features_of", lambda s, b: batches.append(b) or torch.randn(3, 4))
    gradients.measure(study)
    same, masks, crops, other = batches
    _, last = trained[-1]
    assert torch.equal(same["image"], last["image"]) and torch.equal(same["order"], last["order"])
    assert torch.equal(same["image"], masks["image"]) and not torch.equal(same["order"], masks["order"])
    assert not torch.equal(same["image"], crops["image"])
    assert torch.equal(crops["order"], masks["order"])
    assert not torch.equal(same["image"], other["image"])
    (*_, again, others), recent = requested, {i for keys, _ in trained for _, i in keys}
    assert [i for _, i in again] == [i for _, i in trained[-1][0]]
    assert len(recent) > 20 and not recent & {i for _, i in others}, "none of the images of the block"


def test_the_measured_cosines_match_autograd(finished):
    """Against explicit steps and explicit gradients from the same checkpoint."""
    study, reference = Continuation(str(finished), TINY), Continuation(str(finished), TINY)
    row = gradients.measure(study)
    m = reference.method
    weights = [p for p in m.student.parameters() if p.requires_grad]

    def flat(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).double()

    steps = []
    for _ in range(max(LAGS)):
        keys = reference.sampler.keys(reference.step)
        c = m.compare(reference.batch(keys))
        gradient = flat(F.mse_loss(c.prediction, c.target))
        before = torch.cat([p.detach().flatten() for p in weights]).double()
        _, batch = reference.train()
        after = torch.cat([p.detach().flatten() for p in weights]).double()
        steps.append((batch, gradient, after - before))

    def consistency(batch):
        c = m.compare(batch)
        return flat(F.mse_loss(c.prediction, c.teacher_prediction))

    def cosine(a, b):
        return pytest.approx(F.cosine_similarity(a, b, 0).item(), rel=1e-3, abs=1e-5)

    for k in LAGS:
        batch, gradient, update = steps[-k]
        c = consistency(batch)
        assert row["cosine"]["same"][f"update {k}"] == cosine(c, update)
        assert row["cosine"]["same"][f"gradient {k}"] == cosine(c, -gradient)
        assert row["part"]["same"][f"update {k}"] == pytest.approx(
            ((c @ update) / (update @ update)).item(), rel=1e-3
        )
    c = consistency(steps[-1][0])
    moment = torch.cat([reference.optimizer.state[p]["exp_avg"].flatten() for p in weights]).double()
    assert row["cosine"]["same"]["moment"] == cosine(c, -moment)
    r = m.compare(steps[-1][0])
    r = flat(F.mse_loss(r.prediction, r.target))
    assert row["ratio"]["same"] == pytest.approx((c.norm() / r.norm()).item(), rel=1e-3)
    assert row["similarity"]["same"] == pytest.approx(1)
    assert row["cosine"]["same"]["sum"] > 0.1, "consistency opposes the sum of all updates"
    kappa = -row["part"]["other"]["moment"]
    assert row["beta1"] == pytest.approx(0.9 + 0.1 * kappa)


# --- verdicts -----------------------------------------------------------------------------------------------


def rows_of(same, other, runs: int = 5, noise: float = 0.004, part=None) -> list[dict]:
    """Rows of two blocks per run with these means of the cosines; the components are `part` (same, other), by
    default the cosines."""
    rng, rows = np.random.default_rng(0), []
    for index in range(2 * runs):
        shared = noise * rng.standard_normal()
        means = {"same": same, "masks": (same + other) / 2, "crops": (same + other) / 2, "other": other}
        parts = dict(zip(("same", "other"), part, strict=True)) if part else means
        row = {"run": f"run{index // 2}", "step": 25, "total": 100, "beta1": 0.9 - 0.1 * parts["other"]}
        for key, values in (("cosine", means), ("part", means | parts)):
            row[key] = {
                c: {t: v + shared + noise / 4 * rng.standard_normal() for t in TARGETS}
                for c, v in values.items()
            }
        row |= {key: dict.fromkeys(CONDITIONS, 0.5) for key in ("ratio", "similarity")}
        row["by_block"] = {c: {"encoder 0": v, "decoder 0": v} for c, v in means.items()}
        rows.append(row)
    return rows


def about(rows: list[dict], unit: str = "run", **changes) -> dict:
    start = {"run": "run0", "step": 25, "total": 100, "kind": "continued", "lr": None, "half_life": 5.0}
    values = {"starts": [start], "recipe": "rcmae", "blocks": 2, "batch_size": 8, "fits_recipe": True}
    values |= {"gamma": 1.0, "beta1": 0.9, "whole_images": False, "unit": unit, "units": len(rows) // 2}
    return values | changes


def texts(rows: list[dict], **changes) -> list[str]:
    return [text for _, text in analyzed(about(rows, **changes), rows)["findings"]]


@catches(
    "the verdict ignores the fraction on other images",
    "rcmae.lab.gradients:ratio_of_means",
    lambda old: lambda values, references: old(0.1 * values, references),
    case="0.4-0.36-unconditional",
)
@pytest.mark.parametrize(
    ("same", "other", "word"),
    [(0.4, 0.02, "conditional"), (0.4, 0.36, "unconditional"), (0.03, 0.02, "inconclusive")],
)
def test_the_verdict_on_conditionality(same, other, word):
    noise = 0.06 if word == "inconclusive" else 0.004
    first, *_ = texts(rows_of(same, other, noise=noise))
    assert (word if word == "inconclusive" else f"mostly {word}:") in first
    assert ("inconclusive" in first) == (word == "inconclusive")


def test_verdicts_on_the_same_batch_and_on_other_images():
    def verdict(same, other, **options):
        (tone, text), *_ = [
            gradients.verdicts([gradients.target_line(rows, "run", "sum")])[0]
            for rows in [rows_of(same, other, **options)]
        ]
        return tone, text

    tone, text = verdict(0.4, 0.001)
    assert tone == "good" and text.startswith(
        "reverted more on the same batch than on other images (difference +0.39"
    )
    assert "near zero on other images, within 0.05" in text
    tone, text = verdict(0.4, 0.36)
    assert (
        tone == "note"
        and text.startswith("reverted more on")
        and "reverted on other images too (+0.3" in text
    )
    assert verdict(0.1, 0.2)[1].startswith("reverted less on the same batch")
    assert "continued on other images (\N{MINUS SIGN}0.2" in verdict(0.1, -0.2)[1]
    _, text = verdict(0.2, 0.2)
    assert text.startswith("reverted alike on the same batch and on other images, within 0.05 (difference ")
    _, text = verdict(0.1, 0.1, noise=0.8)
    assert text.startswith("inconclusive whether reverted more") and "80 % power at" in text
    assert "; inconclusive on other images (" in text


def test_no_verdict_where_there_is_nothing_to_judge_and_notes_where_a_rate_was_raised():
    rows = rows_of(0.4, 0.02)
    assert texts(rows, gamma=0)[0].startswith("The consistency loss has weight 0")
    raised = dict(about(rows)["starts"][0], kind="raised", lr=1e-3)
    note = texts(rows, starts=[raised])[1]
    assert note.startswith("The learning rate was set to 0.001 again") and "not about the run" in note
    assert "32 images" in texts(rows, batch_size=32, fits_recipe=False)[1]
    for row in rows:
        row["ratio"] = dict.fromkeys(row["ratio"], 0.0)
    assert texts(rows)[0].startswith("The consistency gradient is zero on every batch")


@catches(
    "blocks of one run count as independent",
    "rcmae.lab.gradients:per_unit",
    lambda old: lambda rows, unit, *path: old(rows, "block", *path),
)
def test_with_three_runs_a_run_is_one_value():
    rows = rows_of(0.4, 0.02, runs=3)
    lines = {unit: gradients.target_line(rows, unit, "sum")["same"] for unit in ("run", "block")}
    assert lines["run"].df == 2 and lines["block"].df == 5
    assert lines["run"].mean == pytest.approx(lines["block"].mean)
    assert set(TESTED) < set(TARGETS)


# --- the command --------------------------------------------------------------------------------------------


def test_the_command_writes_its_page_and_leaves_the_runs_alone(finished, tmp_path, capsys):
    runs = [finished]
    for seed in (1, 2):
        runs.append(Path(shutil.copytree(finished, tmp_path / f"seed{seed}")))
        recipe = (runs[-1] / "recipe.toml").read_text()
        assert "\nseed = 0\n" in recipe
        (runs[-1] / "recipe.toml").write_text(recipe.replace("\nseed = 0\n", f"\nseed = {seed}\n"))
    files = sorted((p, p.stat().st_mtime_ns) for out in runs for p in out.rglob("*") if p.is_file())
    options = ["--blocks", "2", "--settle", "0", "--device", "cpu", "--out", str(tmp_path / "page")]
    assert main(["lab", "gradients", *map(str, runs), *options]) == 0
    out = capsys.readouterr().out
    assert "S \N{MINUS SIGN} T, all past updates" in out
    assert "The learning rate was set to" in out
    assert sorted((p, p.stat().st_mtime_ns) for o in runs for p in o.rglob("*") if p.is_file()) == files
    study = json.loads((tmp_path / "page" / "gradients.json").read_text())
    assert len(study["rows"]) == 6 and study["about"]["unit"] == "run"
    assert (tmp_path / "page" / "gradients.html").exists()
    assert main(["lab", "gradients", str(finished), str(finished), "--device", "cpu"]) == 2
    assert "must differ in the seed" in capsys.readouterr().err


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
    run(tmp_path / "run", folder, steps=2, batch_size=3, **changes)
    study = run_gradients([str(tmp_path / "run")], TINY)
    ((tone, text),) = study["findings"]
    assert tone == "note" and text.startswith(reason) and text.endswith("there is nothing to judge.")


def test_failures_are_reported_in_one_line(tmp_path, capsys, folder, finished):  # noqa: F811
    run(tmp_path / "mae", folder, "mae", steps=2)
    (tmp_path / "bare").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.toml").write_text(to_toml(small(data=str(folder), batch_size=3)))
    recipe = small(data=str(folder), batch_size=3)
    (tmp_path / "wild.toml").write_text(
        to_toml(dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, base_lr=1e30)))
    )
    cases = [
        ([], 2, "give a run directory, or several"),
        ([str(tmp_path / "mae")], 2, "whose gradients are compared here; give a run of rcmae"),
        ([str(tmp_path / "bare")], 2, "is no run directory: recipe.toml is missing"),
        ([str(tmp_path / "nowhere")], 2, "there is no recipe"),
        ([str(tmp_path / "begun")], 4, "has no checkpoint"),
        (
            [str(finished), "--batch-size", "4"],
            3,
            "holds 40 images, fewer than 11 batches of 4; lower --batch-size",
        ),
        ([str(finished), "--blocks", "1"], 2, "an interval needs 2 blocks or more, not 1"),
        ([str(finished), "--batch-size", "1"], 2, "a batch needs 2 images or more"),
        ([str(tmp_path / "wild.toml")], 5, "the loss is not finite"),
    ]
    for argv, code, text in cases:
        assert main(["lab", "gradients", *argv, "--device", "cpu"]) == code, argv
        err = capsys.readouterr().err
        assert err.startswith("rcmae: error: "), argv
        assert err.count("\n") == 1, argv
        assert text in err, (argv, err)
