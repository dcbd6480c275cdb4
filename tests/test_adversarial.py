"""Attacks: the closed form on a linear model, the minimum over restarts, independence of batch boundaries;
sanity checks that hold and that can fail."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from rcmae.errors import ConfigError
from rcmae.tasks.robustness import adversarial
from rcmae.tasks.robustness.adversarial import Attack, attacked, fgsm, pgd, sanity
from tests.mutations import catches

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)


class Standardized(nn.Module):
    """A classifier of pixels in 0 to 1 that standardizes them inside."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), *layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net((images - MEAN) / STD)


def linear(classes: int = 2) -> Standardized:
    return Standardized(nn.Linear(3 * 8 * 8, classes)).eval()


def images(n: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return low + (high - low) * torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def predict(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


@pytest.fixture
def network() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Random weights, so nonlinear that restarts matter. Its predictions are the labels, except for every
    tenth image."""
    torch.manual_seed(0)
    model, x = Standardized(nn.Linear(192, 64), nn.GELU(), nn.Linear(64, 5)).eval(), images(300)
    with torch.no_grad():
        model.net[1].weight *= 2
    labels = predict(model, x)
    labels[::10] = (labels[::10] + 1) % 5
    return model, x, labels


@catches(
    "eps is in units of standardized pixels",
    "rcmae.tasks.robustness.adversarial:attacked",
    lambda old: (
        lambda model, images, labels, attack, *rest: old(
            model, images, labels, replace(attack, eps=4 * attack.eps), *rest
        )
    ),
)
@pytest.mark.parametrize(
    "attack", [fgsm(2.0), pgd(2.0), pgd(2.0, steps=7, restarts=3)], ids=["fgsm", "pgd", "restarts"]
)
@pytest.mark.parametrize("span", [(0.1, 0.9), (0.0, 1.0)], ids=["inside", "at the border"])
def test_attacks_on_a_linear_model_match_the_closed_form(attack, span):
    """The lowest margin is margin - sum |w| * (eps, or the distance to 0 or 1), with w per pixel: the weights
    over the standard deviations."""
    torch.manual_seed(0)
    model, x = linear(), images(300, *span)
    if span[0] == 0:
        x = x.round(decimals=1)  # many pixels at 0 and at 1
    labels, eps = predict(model, x), attack.eps / 255
    weight = model.net[1].weight
    w = ((weight[1] - weight[0]).view(3, 8, 8) / STD).detach() * (2 * labels - 1).view(-1, 1, 1, 1)
    max_change = torch.where(w > 0, x, 1 - x).clamp(max=eps)

    def margin(x):
        with torch.no_grad():
            logits = model(x)
        return (logits[:, 1] - logits[:, 0]) * (2 * labels - 1)

    worst = margin(x) - (w.abs() * max_change).sum((1, 2, 3))
    assert (worst.abs() > 1e-5).all() and 30 < (worst > 0).sum() < 270, (
        "the attack succeeds on some images and fails on others, none within rounding"
    )
    perturbed, correct = attacked(model, x, labels, attack)
    assert torch.equal(correct, worst > 0)
    torch.testing.assert_close(margin(perturbed)[correct], worst[correct], rtol=0, atol=2e-6)
    if span[0] > 0:
        torch.testing.assert_close(worst, margin(x) - eps * w[0].abs().sum(), rtol=0, atol=2e-6)


def test_misclassified_images_are_not_attacked(network):
    model, x, labels = network
    misclassified = predict(model, x) != labels
    assert misclassified.sum() == 30
    for attack in (fgsm(4.0), pgd(4.0, restarts=2)):
        perturbed, correct = attacked(model, x, labels, attack)
        assert not correct[misclassified].any() and torch.equal(perturbed[misclassified], x[misclassified])
        assert torch.equal(predict(model, perturbed) == labels, correct), (
            "the returned images agree with the returned correctness"
        )
    rest = attacked(model, x[misclassified], labels[misclassified], pgd(4.0, restarts=2))
    assert torch.equal(rest[0], x[misclassified]) and not rest[1].any()


def test_restarts_only_lower_the_accuracy_and_batch_boundaries_do_not_matter(network):
    model, x, labels = network
    three = pgd(3.0, steps=3, restarts=3)
    one_restart, three_restarts = (
        attacked(model, x, labels, attack)[1] for attack in (replace(three, restarts=1), three)
    )
    assert (three_restarts <= one_restart).all() and three_restarts.sum() < one_restart.sum()
    full, correct = attacked(model, x, labels, three, seed=5)
    part, _ = attacked(model, x[23:40], labels[23:40], three, seed=5, indices=range(23, 40))
    torch.testing.assert_close(part, full[23:40], rtol=0, atol=1e-6)
    parts = zip(*(v.split(70) for v in (x, labels, torch.arange(300))), strict=True)
    assert torch.equal(
        torch.cat([attacked(model, *two, three, 5, i.tolist())[1] for *two, i in parts]), correct
    )
    assert not torch.equal(attacked(model, x, labels, three, seed=6)[0], full)


def test_the_weights_get_no_gradient(network):
    model, x, labels = network
    attacked(model, x, labels, pgd(2.0))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("attack", [fgsm(1.0), pgd(1.0), pgd(4.0, steps=30, restarts=2)])
def test_sanity_checks_hold(network, attack):
    checks = sanity(*network, attack)
    assert len(checks) == 6 and all(check.holds for check in checks.values()), checks


def assert_fails(name: str, model, x, labels, attack: Attack) -> None:
    checks = sanity(model, x, labels, attack)
    assert not checks[name].holds, checks


def test_each_sanity_check_can_fail(network, monkeypatch):
    model, x, labels = network
    torch.manual_seed(0)
    assert_fails("eps 0 equals clean", nn.Sequential(model, nn.Dropout(0.5)).train(), x, labels, pgd(1.0))
    assert_fails("PGD is not above FGSM", model, x, labels, Attack(1.0, 1, 0.0, 0))
    assert_fails(
        "without a bound no image stays correct",
        nn.Sequential(Quantized(), model),
        x,
        labels,
        pgd(1.0, steps=20),
    )
    assert_fails("twice the steps are not stronger", model, x, labels, Attack(2.0, 2, 0.1, 0))
    original = attacked
    # eps in deviations instead of pixels, a common mistake; then an attack that gets weaker with more steps
    monkeypatch.setattr(
        adversarial,
        "attacked",
        lambda m, x, y, a, s: original(m, x, y, replace(a, eps=min(255, a.eps / 0.225)), s),
    )
    assert_fails("distance is never above eps", model, x, labels, pgd(1.0))
    monkeypatch.setattr(
        adversarial,
        "attacked",
        lambda m, x, y, a, s: original(m, x, y, replace(a, steps=max(1, 20 - a.steps)), s),
    )
    assert_fails("more steps are not weaker", model, x, labels, Attack(2.0, 8, 0.1, 0))


class Quantized(nn.Module):
    """Rounds to eight levels of gray, whose gradient is zero."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (7 * images).round() / 7


def test_attack_names_and_invalid_attack_settings():
    attacks = [fgsm(0.5), pgd(8.0), pgd(4.0, steps=5, restarts=3), Attack(1, 10, 0.25, 0)]
    assert [attack.name for attack in attacks] == [
        "FGSM 0.5/255",
        "PGD-20 8/255",
        "PGD-5 x3 4/255",
        "PGD-10 1/255",
    ]
    with pytest.raises(ConfigError, match="eps is in 1/255 and lies in 0 to 255, not -1"):
        fgsm(-1.0)
    with pytest.raises(ConfigError, match="at least one step and at least 0 restarts, not 0 and 1"):
        Attack(1.0, 0, 1.0, 1)
