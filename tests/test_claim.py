"""The analysis of docs/rcmae-answered.md, on results whose answer is known."""

import math

import numpy as np
import pytest

from benchmarks import claim
from benchmarks.runs import packed
from rcmae.data import digits
from rcmae.errors import DivergedError
from rcmae.tasks.interval import judged
from tests.mutations import catches

IMAGES = 1000


def line(arm: str, seed: int, steps: int, student: float, teacher: float, cpu: str = "x") -> dict:
    """A line of results/claim.jsonl with these accuracies in percent, on both endpoints."""

    def result(accuracy: float) -> dict:
        correct = np.arange(IMAGES) < round(accuracy / 100 * IMAGES)
        return packed(np.random.default_rng([seed, steps]).permutation(correct))

    about = {"arm": arm, "rate": 3e-3, "seed": seed, "steps": steps, "tuned": True}
    networks = {"student": student, "teacher": teacher} if arm == claim.MAE else {"teacher": teacher}
    results = {f"{n} {e}": result(v) for n, v in networks.items() for e in claim.ENDPOINTS}
    return about | {"cpu": cpu, "precision": "fp32"} | results


def mae_after(steps: float) -> float:
    """The accuracy of a simulated MAE: 10 points per doubling."""
    return 50 + 10 * math.log2(steps / 2000)


def lines_of(seed: int, gains: dict[str, float], **about) -> list[dict]:
    """All lines of a seed; `gains` of arms in points at 2,000 steps. A seed moves all of its runs."""
    shift = seed % 3
    lines = [
        line(claim.MAE, seed, steps, mae_after(steps) + shift, mae_after(steps) + shift, **about)
        for steps in claim.LENGTHS
    ]
    for arm in claim.HALF_LIVES:
        accuracy = mae_after(claim.STEPS) + shift + gains.get(arm, 0.0)
        lines.append(line(arm, seed, claim.STEPS, accuracy, accuracy, **about))
    return lines


@pytest.fixture
def analyzed(monkeypatch, tmp_path):
    """The analysis of these lines."""

    def run(lines: list[dict]) -> dict:
        results = claim.Results(tmp_path / "claim.jsonl")
        results.path.write_text("")
        for each in lines:
            results.append(each)
        monkeypatch.setattr(claim, "RESULTS", results)
        return claim.analysis()

    return run


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.2])
def test_a_known_speed_is_recovered(analyzed, factor):
    gain = mae_after(claim.STEPS * factor) - mae_after(claim.STEPS)
    lines = [x for seed in claim.SEEDS for x in lines_of(seed, {"RC-MAE 3": gain})]
    result = analyzed(lines)["fine-tuned"]["speed"]["RC-MAE 3"]
    assert result["low"] < factor * 1.01 and factor < result["high"] * 1.01
    assert result["speed"] == pytest.approx(factor, rel=0.03)


@pytest.mark.parametrize(
    ("gain", "low", "high"), [(30.0, claim.SPEEDS[-1], None), (-30.0, None, claim.SPEEDS[0])]
)
def test_speeds_beyond_the_runs_of_mae_are_not_told_apart(analyzed, gain, low, high):
    lines = [x for seed in claim.SEEDS for x in lines_of(seed, {"RC-MAE 3": gain})]
    result = analyzed(lines)["linear"]["speed"]["RC-MAE 3"]
    assert (result["low"], result["speed"], result["high"]) == (low, None, high)


@catches(
    "images of one digit are taken as independent",
    "rcmae.data.digits:glyphs_of",
    lambda old: lambda seed, split, count: np.arange(count) + seed * count,
)
def test_what_digits_do_on_all_seeds_is_uncertainty():
    """An arm that is better on some of the digits, on every seed: the next digits may be others."""
    seeds = range(11, 27)
    of_image = [digits.glyphs_of(seed, "test", 2000) for seed in seeds]
    effect = np.random.default_rng(0).normal(0, 0.3, 2000)
    draws = np.random.default_rng(1)
    arms = [
        [draws.random(2000) < 0.5 + shift * effect[glyphs % 2000] for glyphs in of_image] for shift in (1, 0)
    ]
    correct, others = arms
    images = claim.subjects(seeds, "linear", correct)
    assert claim.difference(correct, others, images).images > 1, "about 30 points over the root of 364"


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (1.1, 1.4, "a factor of two is refuted"),
        (1.1, None, "inconclusive"),
        (0.95, 1.05, "equivalent, a factor of two is refuted"),
        (None, 1.05, "a factor of two is refuted"),
        (None, None, "inconclusive"),
    ],
)
def test_what_a_speed_shows(low, high, words):
    assert claim.speed_verdict(low, high) == words


def test_mae_between_two_lengths_is_a_mixture(analyzed):
    analyzed([x for seed in (11, 12) for x in lines_of(seed, {})])
    seeds = claim.complete()
    between = [100 * c.mean() for c in claim.mae_after(seeds, "linear", math.sqrt(1000 * 1414))]
    shifts = [seed % 3 for seed in seeds]
    expected = [mae_after(math.sqrt(1000 * 1414)) + shift for shift in shifts]
    assert between == pytest.approx(expected, abs=0.2)
    for steps in claim.LENGTHS:
        (first, _), (same, _) = (
            claim.mae_after(seeds, "linear", steps),
            claim.results_of(seeds, claim.MAE, "linear", steps),
        )
        assert first == pytest.approx(same.astype(float))


@pytest.mark.parametrize(
    ("gains", "text"),
    [
        ({"RC-MAE 3": 4.0}, "Confirmed on this set: better than MAE is RC-MAE 3."),
        (dict.fromkeys(claim.HALF_LIVES, -8.0), "Refuted on this set"),
        ({}, "Refuted on this set"),
        ({"RC-MAE 3": 1.0}, "Inconclusive on this set"),
    ],
)
def test_the_answer_follows_from_the_primary_family(analyzed, gains, text):
    lines = []
    for k, seed in enumerate(claim.SEEDS):
        lines += lines_of(seed, {arm: gain + 3 * (-1) ** k for arm, gain in gains.items()})
    assert claim.answer(analyzed(lines)).startswith(text)


@pytest.mark.parametrize(
    ("arm", "steps", "tuned", "method", "networks"),
    [
        (claim.MAE, claim.STEPS, True, "rcmae", ("student", "teacher")),
        (claim.MAE, 1000, True, "mae", ("student",)),
        (claim.MAE, claim.STEPS, False, "mae", ("student",)),
        ("RC-MAE 3", claim.STEPS, True, "rcmae", ("teacher",)),
    ],
)
def test_only_the_run_whose_average_is_evaluated_has_a_teacher(arm, steps, tuned, method, networks):
    job = claim.Job(arm, 6e-3, 11, steps, tuned)
    assert (job.recipe.method, job.networks) == (method, networks)
    assert (job.recipe.optim.batch_size, job.recipe.steps) == (claim.BATCH_SIZE, steps)


def test_a_diverged_run_counts(monkeypatch, tmp_path):
    """With the networks of its last checkpoint."""

    def diverge(recipe, path, **options):
        raise DivergedError("5 steps in a row were not finite")

    monkeypatch.setattr(claim, "RESULTS", claim.Results(tmp_path / "claim.jsonl"))
    monkeypatch.setattr(claim, "pretrain_quietly", diverge)
    monkeypatch.setattr(claim, "machine", lambda path: {"cpu": "x", "precision": "fp32"})
    monkeypatch.setattr(claim, "probed", lambda *a: {"teacher linear": {"accuracy": 10.0}})
    monkeypatch.setattr(claim.shutil, "rmtree", lambda path: None)
    claim.run(claim.Job("RC-MAE 3", 48e-3, 0, 1000, False))
    (line,) = claim.RESULTS.lines()
    assert line["diverged"] and line["teacher linear"]["accuracy"] == 10.0


def test_an_arm_with_two_rates_is_refused(analyzed):
    lines = lines_of(11, {})
    with pytest.raises(ValueError, match="has runs at"):
        analyzed([*lines, *(x | {"rate": 6e-3} for x in lines_of(12, {}))])


def test_incomplete_seeds_and_mixed_machines_are_left_out(analyzed):
    first, second, third, fourth = (lines_of(seed, {}) for seed in (11, 12, 13, 14))
    third[0]["precision"] = "bf16"
    tuning = [x | {"tuned": False, "seed": 15} for x in lines_of(15, {})]
    results = analyzed([*first, *second[:-1], *third, *fourth, *tuning])
    assert results["seeds"] == [11, 14]
    assert "2 of 16 seeds are complete" in claim.table(results)


@pytest.mark.parametrize("lines", [[], lines_of(11, {}), lines_of(12, {})[1:]])
def test_with_too_few_seeds_the_page_has_no_result(analyzed, lines):
    text = claim.table(analyzed(lines))
    assert "too few for any result" in text and "better" not in text


def test_half_lives_are_a_family_of_four(analyzed):
    """A difference with p = 0.03 is one when judged alone, but not among four."""
    deviation = 4 / 2.4 * math.sqrt(15 / 16)
    lines = []
    for k, seed in enumerate(claim.SEEDS):
        wave = deviation * (-1) ** k
        lines += lines_of(seed, {"RC-MAE 1": 1 + wave, **{f"RC-MAE {n}": wave for n in (3, 10, 30)}})
    against = analyzed(lines)["linear"]["against"]
    assert {other: [*verdicts] for other, verdicts in against.items()} == dict.fromkeys(
        (claim.MAE, claim.AVERAGED), claim.HALF_LIVES
    )
    for verdicts in against.values():
        result = verdicts["RC-MAE 1"]
        assert str(judged([result["gain"]])[0]).startswith("better")
        assert result["verdict"].startswith("inconclusive")


def test_the_page_of_complete_results(analyzed, tmp_path):
    results = analyzed([x for seed in claim.SEEDS for x in lines_of(seed, {"RC-MAE 10": 5.0})])
    text = claim.table(results)
    assert "16 of 16 seeds" in text and text.count("better (+5.0 points") == 4
    claim.draw(results, tmp_path / "claim.png")
    assert (tmp_path / "claim.png").stat().st_size > 10_000
