"""The words on the paper's claims follow from the numbers."""

import copy

import pytest

from benchmarks import answered, claim, evaluation, pictures


@pytest.mark.parametrize(
    ("verdicts", "word"),
    [
        (["better (+1.0)", "better (+2.0)"], "confirmed on this set"),
        (["better (+1.0)", "inconclusive (+0.1)"], "confirmed in part, on this set"),
        (["worse (-1.0)", "equivalent within 1 point (+0.0)"], "refuted on this set"),
        (["worse (-1.0)", "inconclusive (+0.1)"], "inconclusive"),
    ],
)
def test_what_verdicts_say_together(verdicts, word):
    assert answered._confirmed(verdicts) == word


@pytest.fixture
def changed(monkeypatch):
    """Results of which some are replaced."""
    real, replaced = answered._of, {}
    monkeypatch.setattr(answered, "_of", lambda name: replaced.get(name, real(name)))

    def change(name, edit):
        replaced[name] = copy.deepcopy(real(name))
        edit(replaced[name])

    return change


@pytest.mark.parametrize(
    ("fraction", "word"),
    [
        ([0.9, 0.8, 1.0], "a momentum regularizer, but not conditional"),
        ([0.1, 0.0, 0.2], "confirmed"),
        ([0.5, 0.3, 0.7], "inconclusive"),
        (None, "inconclusive"),
    ],
)
def test_the_regularizer_is_conditional_by_the_fraction_on_other_images(changed, fraction, word):
    changed("lab_gradients", lambda results: results["targets"][0].update(fraction=fraction))
    assert answered.network().word == word


def test_more_memory_refutes_the_claim_of_less(changed):
    def edit(results):
        for row in results["rows"]:
            row["peak"] *= 100 if row["name"] == "rcmae" else 1

    changed("cost", edit)
    assert answered.memory().word == "refuted"


def test_an_effect_on_orthogonal_inputs_refutes_the_condition(changed):
    changed("lab_linear", lambda results: results["table"][2].update(previous=-0.3))
    assert answered.linear().word == "refuted"


def test_incomplete_experiments_answer_nothing(changed):
    changed("claim", lambda results: results.update(seeds=[*claim.SEEDS][:-1]))
    changed("pictures", lambda results: results.update(seeds=[*pictures.SEEDS][:-1]))
    assert answered.classification() is answered.NOT_RUN


def test_the_verdicts_on_robustness_are_those_of_the_evaluation():
    """One comparison has one verdict on all pages: it is corrected within the same family."""
    results = answered._of("evaluation")
    _, verdict = evaluation.compared(results, "MAE", "1 and 10 % of the labels")["finetune", 1, "corrupted"]
    assert f"corrupted, 1 % of the labels: {verdict}" in answered.robustness().text
    assert str(verdict) in evaluation.verdict(results)
