"""The race: equal initial weights and budgets, valid intervals, verdicts that follow from the numbers; small,
stopped and resumed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from rcmae.cli import main
from rcmae.compare.cost import MID_RUN
from rcmae.compare.race import (
    ARMS,
    STYLES,
    Budget,
    RaceSettings,
    arms,
    parse_budget,
    plan,
    verdict,
    write_race_page,
)
from rcmae.config import check, replaced
from rcmae.data.dataset import Images
from rcmae.data.digits import DigitsSource
from rcmae.data.sampler import BatchSampler
from rcmae.engine.metrics import read_metrics
from rcmae.errors import ConfigError
from rcmae.methods import METHODS
from rcmae.methods.recipes import load_recipe
from rcmae.tasks.attentive_probe import attentive_correct
from rcmae.tasks.interval import over_seeds

AVERAGED = "mae averaged"

TINY = [
    "size=16",
    "width=24",
    "depth=1",
    "heads=2",
    "decoder_width=16",
    "decoder_depth=1",
    "decoder_heads=2",
    "batch_size=16",
]


def test_all_arms_start_from_the_same_encoder_and_see_the_same_images():
    first, keys = None, set()
    for arm in arms(ARMS):
        torch.manual_seed(arm.recipe.seed)
        method = METHODS[arm.recipe.method](arm.recipe, (0.5,) * 3, (0.25,) * 3)
        weights = method.ema_source.encoder.state_dict()
        first = first or weights
        for name, value in weights.items():
            assert torch.equal(value, first[name]), (arm.name, name)
        keys.add(str(BatchSampler(1000, arm.recipe.optim.batch_size, seed=arm.recipe.seed).keys(3)))
    assert len(keys) == 1


def test_averaged_mae_is_mae_to_the_bit_and_costs_what_mae_costs():
    mae, averaged = arms(["mae", AVERAGED], settings=TINY)
    assert averaged.cost_recipe == mae.recipe
    assert averaged.network == "teacher"
    losses = []
    for arm in (mae, averaged):
        torch.manual_seed(0)
        method = METHODS[arm.recipe.method](arm.recipe, (0.5,) * 3, (0.25,) * 3)
        images = Images(DigitsSource("train", 8, 16, 0), method.views(), 0, 3)
        samples = [images[(0, i)] for i in range(8)]
        if arm is averaged:
            with torch.no_grad():  # a teacher with unrelated predictions
                method.teacher.model.decoder.pred.weight.normal_()
        loss = method(
            default_collate([{k: v for k, v in s.items() if k != "bad"} for s in samples]), MID_RUN
        )["loss"]
        loss.backward()
        losses.append((loss, [p.grad for p in method.student.parameters() if p.grad is not None]))
    (loss, gradient), (other, others) = losses
    assert torch.equal(loss, other)
    assert all(torch.equal(a, b) for a, b in zip(gradient, others, strict=True))


def test_arms_combine_their_own_settings_with_common_ones():
    one, two = arms(["rcmae, half_life = 5%, crop_scale=[0.5, 1.0]", "dino"], settings=["base_lr=1e-3"])
    assert (one.recipe.teacher.half_life, one.recipe.images.crop_scale) == ("5%", (0.5, 1.0))
    assert one.recipe.optim.base_lr == two.recipe.optim.base_lr == 1e-3
    one, two = arms(["mae", "dino"], settings=["prototypes=9"])
    assert two.recipe.dino.prototypes == 9, "settings that only some methods have are allowed"
    with pytest.raises(ConfigError, match="mae: 'prototypes=9' is no setting"):
        arms(["mae", "rcmae"], settings=["prototypes=9"])
    dino, averaged = arms(["dino", AVERAGED], data="photos")
    assert dino.recipe.network.model == "vit_small_patch16"
    assert (dino.recipe.optim.batch_size, dino.recipe.teacher) == (256, load_recipe("folder").teacher)
    assert averaged.recipe.teacher == arms(["rcmae", "mae"], data="photos")[0].recipe.teacher


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("4m", Budget("seconds", 240)),
        ("300000 images", Budget("images", 3e5)),
        ("2e13 FLOPs", Budget("FLOPs", 2e13)),
    ],
)
def test_a_budget_is_time_flops_or_images(text, budget):
    assert parse_budget(text) == budget


def test_settings_by_name_reach_every_section_and_say_what_is_wrong():
    recipe = check(
        replaced(load_recipe("dino-bundled"), ["steps=7", "depth=2", "sinkhorn=false", "half_life=2%"], "x")
    )
    assert (recipe.steps, recipe.network.depth, recipe.dino.sinkhorn, recipe.teacher.half_life) == (
        7,
        2,
        False,
        "2%",
    )
    for wrong, message in (
        ("dephth=2", "did you mean depth"),
        ("depth", "write key=value"),
        ("depth=two", "of type int"),
        ("images=3", "no setting"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(replaced(recipe, [wrong], "arm x"))


def test_the_verdict_follows_from_the_differences_to_the_first_arm():
    def row(arm, *seeds):
        others = {"a": over_seeds([s - 40 for s in seeds])} if arm != "a" else {}
        return {"arm": arm, "linear": seeds, "linear against": others}

    rows = [row("a", 40.0, 40.0, 40.0), row("b", 45.0, 38.0, 46.0), row("c", 30.0, 30.5, 29.0)]
    best, unclear, worse, note = verdict(rows, {"budget": "9 FLOPs", "data": "x"})
    assert best == (
        "With 9 FLOPs for each on x, b has the highest linear probe accuracy on mean patches (43.0 %)."
    )
    assert unclear.startswith("b against a: inconclusive (+3.0 points, -7.8 to +13.8; 80 % power at ")
    assert worse == "c against a: worse (-10.2 points, -12.1 to -8.3)." and "2 comparisons" in note


def test_the_attentive_probe_finds_one_token_among_many():
    """The class is in one token at a random position; in the mean over tokens it is hidden by noise."""
    rng = torch.Generator().manual_seed(0)

    def images(n):
        tokens, labels = 0.5 * torch.randn(n, 30, 16, generator=rng), torch.randint(0, 4, (n,), generator=rng)
        position = torch.randint(0, 30, (n,), generator=rng)
        tokens[torch.arange(n), position] = 4 * torch.eye(16)[labels] + 4 * torch.eye(16)[10]
        return tokens.half(), labels.numpy()

    (train, labels), (test, truth) = images(800), images(400)
    correct = attentive_correct(train, labels, test, truth)
    assert correct.mean() > 0.95
    assert (correct == attentive_correct(train, labels, test, truth)).all()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["mae"], "needs two arms"),
        (["mae", "mae"], "'mae' is given twice"),
        (["mae", "rcmaee"], "did you mean rcmae"),
        (["mae", "rcmae", "--budget", "much"], "is no budget"),
        (["mae", "rcmae", "--budget", "0 images"], "above 0"),
        (
            ["mae", "rcmae", "--seeds", "1", "--probes", "0"],
            "--seeds must be 2 or more, not 1; --probes must be 1 or more",
        ),
        (
            ["mae", "dino, local_crops=1, local_size=64", "ibot, batch_size=1"],
            "local_size=64: local_size 64 is larger than the image, 32; ibot, batch_size=1: ibot compares "
            "images",
        ),
        (["mae", "rcmae, data=other"], "data is set by the race"),
        (["mae", "rcmae", "--settings", "steps=7", "batch_size=4"], "steps is set by the race"),
        (["mae", "rcmae", "--budget", "64 images"], "too few to probe"),
    ],
)
def test_bad_input_is_reported_in_one_line(tmp_path, capsys, argv, message):
    assert main(["compare", "race", *argv, "--out", str(tmp_path / "race")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_race_without_labels_is_refused_before_it_runs(tmp_path, capsys):
    folder = tmp_path / "flat"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((40, 40, 3), 50 * i, np.uint8)).save(folder / f"{i}.png")
    argv = ["compare", "race", "mae", "rcmae", "--data", str(folder), "--out", str(tmp_path / "race")]
    assert main(argv) == 3
    assert "has no labels to probe with" in capsys.readouterr().err
    assert not (tmp_path / "race").exists()


def test_a_race_can_be_stopped_and_resumed_and_is_not_run_twice(tmp_path, capsys):
    out = tmp_path / "race"
    argv = [
        "compare",
        "race",
        "mae",
        AVERAGED,
        "--budget",
        "640 images",
        "--seeds",
        "2",
        "--probes",
        "2",
        "--probe-train",
        "60",
    ]
    argv += ["--probe-test", "50", "--jobs", "2", "--device", "cpu", "--out", str(out), "--settings", *TINY]
    command = [sys.executable, "-m", "rcmae", *argv]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(out.glob("*/checkpoints/*")) and first.poll() is None:
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    _, error = first.communicate(timeout=60)
    assert first.returncode == 75 and error.splitlines()[-1].startswith("rcmae: stopped: by SIGTERM"), error
    begun = {path.parent.name for path in out.glob("*/checkpoints")}
    assert begun

    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "4 of 4 runs, 100%" in printed
    assert "against mae" in printed
    runs = [path.parent for path in out.glob("*/finished")]
    assert len(runs) == 4 and begun <= {run.name for run in runs}
    results = json.loads((out / "race.json").read_text())
    for row in results["rows"]:
        assert row["steps"] == 40 and row["images"] == 640
        assert [point["step"] for point in row["curve"]] == [0, 20, 40]
        assert len(row["linear"]) == len(row["attentive"]) == len(row["knn"]) == 2
        assert row["curve"][0]["linear"] == results["rows"][0]["curve"][0]["linear"], (
            "all start from the same weights"
        )
        assert row["curve"][-1]["linear"] == row["linear"]
        seconds = [point["seconds"] for point in row["curve"]]
        assert 0 == seconds[0] < seconds[1] < seconds[2]
    mae, averaged = results["rows"]
    assert mae["flops"] == averaged["flops"]
    last = read_metrics(Path(next(run for run in runs if run.name.startswith("mae-averaged"))))
    accuracy = next(line for line in reversed(last) if line["kind"] == "probe")["teacher"]["linear"]
    assert accuracy in averaged["linear"]
    assert (out / "race.html").read_text().count("<svg") == 9

    before = {run.name: (run / "metrics.jsonl").stat().st_mtime_ns for run in runs}
    assert main(argv) == 0
    assert before == {run.name: (run / "metrics.jsonl").stat().st_mtime_ns for run in runs}


def test_the_recorded_race_can_be_drawn_again(tmp_path):
    """Its arms still exist, each with a line style of its own."""
    results = json.loads((Path(__file__).parent.parent / "results" / "race.json").read_text())
    names = [row["arm"] for row in results["rows"]]
    assert set(names) <= set(ARMS) and len({STYLES[name] for name in ARMS}) == len(ARMS)
    page = write_race_page(results, tmp_path).read_text()
    assert all(name in page for name in names)
    assert "Averaged weights cost as much as MAE" in page


def test_a_flops_budget_is_divided_by_the_cost_of_a_step(tmp_path):
    contestants = arms(["mae", "dino"], settings=["batch_size=10"])
    steps = plan(
        contestants,
        RaceSettings(budget=Budget("FLOPs", 1e12), probes=1),
        {"mae": 1e9, "dino": 8e9},
        "",
        tmp_path,
        print,
    )
    assert steps == {"mae": 100, "dino": 12}
