"""The analysis of docs/rcmae-answered.md, on results whose answer is known."""

import math

import numpy as np
import pytest

from benchmarks import claim
from benchmarks.runs import packed
from rcmae.tasks.interval import judged

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


@pytest.mark.parametrize(("factor", "extended"), [(0.8, False), (1.0, False), (1.2, False), (1.5, True)])
def test_a_known_speed_is_recovered(analyzed, factor, extended):
    gain = mae_after(claim.STEPS * factor) - mae_after(claim.STEPS)
    lines = [x for seed in claim.SEEDS for x in lines_of(seed, {"RC-MAE 3 steps": gain, "RC-MAE 3": gain})]
    result = analyzed(lines)["fine-tuned"]["speed"]["RC-MAE 3"]
    assert result["speed"] == pytest.approx([factor] * 3, rel=0.02)
    assert result["extended"] == extended


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (1.1, 1.4, "learns faster, a factor of two is refuted"),
        (1.1, 2.4, "learns faster"),
        (0.95, 1.05, "equivalent, a factor of two is refuted"),
        (1.02, 1.08, "learns faster, equivalent, a factor of two is refuted"),
        (0.7, 0.8, "learns more slowly, a factor of two is refuted"),
        (0.8, 1.3, "inconclusive, a factor of two is refuted"),
        (0.8, 2.3, "inconclusive"),
    ],
)
def test_what_a_speed_shows(low, high, words):
    assert claim.speed_verdict(low, high) == words


def test_a_curve_that_falls_or_never_arrives():
    """Accuracies at 1,000, 1,414, 2,000 and 2,828 steps."""
    falling, rising, hill = [50.0, 49, 48, 47], [10.0, 20, 30, 40], [10.0, 30, 20, 30]
    steps = claim.steps_until(
        np.array([49.0, 60, 25, 50, 25]), np.array([falling, falling, rising, rising, hill])
    )
    assert steps[0] == pytest.approx(1414) and steps[2] == pytest.approx(math.sqrt(1414 * 2000))
    assert steps[1] < 1000, "the falling curve had it before its start"
    assert steps[3] == pytest.approx(2828 * 2828 / 2000)
    assert steps[4] == pytest.approx(math.sqrt(1414 * 2000)) or steps[4] == pytest.approx(
        math.sqrt(2000 * 2828)
    )
    flat = claim.steps_until(np.array([60.0, 40.0]), np.full((2, 4), 50.0))
    assert flat[0] == np.inf and flat[1] == 0


def test_incomplete_seeds_and_mixed_machines_are_left_out(analyzed):
    first, second, third, fourth = (lines_of(seed, {}) for seed in (11, 12, 13, 14))
    third[0]["cpu"] = "y"
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
