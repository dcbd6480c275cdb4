"""Probes of frozen features: known answers, a plain loop, LARS's formula, scikit-learn's optimum, and nothing
learned from the test set."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

import rcmae.tasks.nearest_neighbors as knn_module
from rcmae.config import changed
from rcmae.data.digits import DigitsSource
from rcmae.errors import ConfigError
from rcmae.methods.recipes import load_recipe
from rcmae.tasks import attentive_probe
from rcmae.tasks.linear_probe import RATES, Heads, fit, fit_mae, fit_rates, lars, predict
from rcmae.tasks.nearest_neighbors import NearestNeighbors, check_k, nearest
from rcmae.tasks.probe import probe_set
from tests.mutations import catches

CLASSES = 5

# --- k-NN ---------------------------------------------------------------------------------------------------


def plain_loop(train, labels, test, k):
    """One image at a time, in float64: the class with most votes; ties in similarity go to the lower index,
    ties in votes to the lower class."""
    train, test = (
        x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True) for x in (train, test)
    )
    predictions = []
    for feature in test:
        similar = train @ feature
        votes = np.zeros(labels.max() + 1)
        for i in np.lexsort((np.arange(len(train)), -similar.round(6)))[:k]:
            votes[labels[i]] += np.exp(similar[i] / 0.07)
        predictions.append(votes.round(6).argmax())
    return np.array(predictions)


def random_set(n=300, m=80, d=12, c=7, ties=False):
    rng = np.random.default_rng(0)
    train, test = rng.standard_normal((n, d)), rng.standard_normal((m, d))
    if ties:
        train, test = np.sign(train), np.sign(test)
    train, test = (torch.tensor(x, dtype=torch.float32) for x in (train, test))
    return train, rng.integers(0, c, n), test


def near(train, labels, k):
    return NearestNeighbors(train, torch.from_numpy(labels), 7, k)


@pytest.mark.parametrize("columns", [8192, 11])
@pytest.mark.parametrize("ties", [False, True])
def test_knn_equals_a_plain_loop(monkeypatch, ties, columns):
    """With `ties`, features are corners of a small cube: most similarities occur many times, with different
    labels."""
    monkeypatch.setattr(knn_module, "COLUMNS", columns)
    train, labels, test = random_set(d=4 if ties else 12, ties=ties)
    votes = near(train, labels, 300).votes(test, [1, 10, 20, 300])
    for k, scores in votes.items():
        assert (scores.argmax(1).numpy() == plain_loop(train, labels, test, k)).all(), k
    assert (near(train, labels, 10)(test).argmax(1) == votes[10].argmax(1)).all()


@catches(
    "the farthest neighbors come first",
    "rcmae.tasks.nearest_neighbors:nearest",
    lambda old: lambda queries, train, k: old(queries, train, k).flip(1),
)
def test_a_feature_is_its_own_nearest_neighbor():
    train, labels, _ = random_set()
    unit = torch.nn.functional.normalize(train, dim=1)
    assert (nearest(unit, unit, 3)[:, 0] == torch.arange(len(train))).all()
    assert (predict(near(train, labels, 1), train) == labels).all()


def test_similarity_ignores_the_norm_of_features():
    train, labels, test = random_set()
    long = near(train * torch.rand(len(train), 1).add(0.1) * 1e4, labels, 20)(test * 1e-4)
    torch.testing.assert_close(long, near(train, labels, 20)(test), rtol=1e-3, atol=1e-3)


def test_knn_has_a_gradient_and_the_same_predictions_with_it():
    """Also where all neighbors have one class, so that the votes have no gradient."""
    train, labels, test = random_set()
    labels = np.where(train[:, 0] > 0, 0, 1)
    model = near(train, labels, 5)
    x = test.clone().requires_grad_()
    logits = model(x)
    assert (logits.argmax(1) == model(test).argmax(1)).all()
    torch.nn.functional.cross_entropy(logits, model(test).argmax(1)).backward()
    assert (x.grad.abs().sum(1) > 1e-6).all()
    moved = test + 0.5 * torch.nn.functional.normalize(x.grad, dim=1) * test.norm(dim=1, keepdim=True)
    assert (model(moved).argmax(1) != model(test).argmax(1)).float().mean() > 0.5


def test_knn_with_a_gradient_does_not_save_all_pairs(monkeypatch):
    """Votes of all training features, computed in chunks: the same logits and gradient, without a saved m x n
    tensor."""
    train, labels, test = random_set()
    model, outputs, saved_sizes = near(train, labels, 5), [], []
    for columns in (8192, 70):
        monkeypatch.setattr(knn_module, "COLUMNS", columns)
        x = test.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved_sizes.append(t.numel()) or t, lambda t: t
        ):
            logits = model(x)
        logits[:, 0].sum().backward()
        outputs.append((logits.detach(), x.grad))
    assert max(saved_sizes) < len(test) * len(train) / 4
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    weight = ((torch.nn.functional.normalize(test, dim=1) @ model.train_set.T - 1) / 0.07).exp()
    of_all = (weight @ torch.nn.functional.one_hot(model.labels, model.classes).float() + 1e-12).log()
    others = outputs[0][0].argmax(1, keepdim=True) != torch.arange(model.classes)
    torch.testing.assert_close(outputs[0][0][others], of_all[others], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ks", [(10, 301), (0,), ()])
def test_an_impossible_k_is_rejected(ks):
    with pytest.raises(ConfigError, match="1 to 300, the number of training images"):
        check_k(ks, 300)


# --- LARS ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [False, True], ids=["as on CPU", "as on CUDA"])
def test_three_steps_of_lars_match_its_formula(foreach):
    model = nn.Linear(5, 3).double()
    optimizer = lars(model, lr=0.7)
    for group in optimizer.param_groups:
        group["foreach"] = foreach
    w, b = model.weight.detach().numpy().copy(), model.bias.detach().numpy().copy()
    mw, mb = 0.0, 0.0
    for _ in range(3):
        model.weight.grad, model.bias.grad = torch.randn(3, 5).double() * 40, torch.randn(3).double() * 40
        gw, gb = model.weight.grad.numpy(), model.bias.grad.numpy()
        mw = 0.9 * mw + 0.001 * np.linalg.norm(w) / np.linalg.norm(gw) * gw
        mb = 0.9 * mb + gb
        w, b = w - 0.7 * mw, b - 0.7 * mb
        optimizer.step()
    np.testing.assert_allclose(model.weight.detach().numpy(), w, rtol=1e-13)
    np.testing.assert_allclose(model.bias.detach().numpy(), b, rtol=1e-13)


@pytest.mark.parametrize("gradient", [1.0, 0.0])
def test_zero_weights_and_zero_gradients_are_not_scaled(gradient):
    model = nn.Linear(4, 2, bias=False)
    nn.init.zeros_(model.weight)
    model.weight.grad = torch.full((2, 4), gradient)
    lars(model, lr=0.5).step()
    assert torch.equal(model.weight.detach(), torch.full((2, 4), -0.5 * gradient))


def test_frozen_weights_are_left_alone():
    model = nn.Sequential(
        nn.Linear(4, 4).requires_grad_(False), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)
    )
    assert [len(group["params"]) for group in lars(model, 1.0).param_groups] == [1, 1]


# --- linear -------------------------------------------------------------------------------------------------


def gaussians(distance: float, n: int = 2000, m: int = 4000, d: int = 16):
    """Classes around random centers, with a common covariance that is not isotropic."""
    rng = np.random.default_rng(0)
    centers, shape = (
        distance * rng.standard_normal((CLASSES, d)),
        0.5 * rng.standard_normal((d, d)) / d**0.5 + np.eye(d),
    )

    def draw(count):
        labels = np.arange(count) % CLASSES
        return torch.tensor(
            centers[labels] + rng.standard_normal((count, d)) @ shape, dtype=torch.float32
        ), labels

    return *draw(n), *draw(m)


def by_rates(train, labels, test, truth, seed=0):
    return predict(fit_rates(train, labels, CLASSES, steps=300, seed=seed).probe, test) == truth


def by_mae(train, labels, test, truth, seed=0):
    """MAE's protocol on few images, with a high rate as its docstring recommends."""
    batches = attentive_probe.in_memory(train, labels, 200, len(train), seed)
    layer = fit_mae(
        batches, train.shape[1], CLASSES, steps=200, warmup=0.05, batch=len(train), base_lr=5.0, seed=seed
    )
    return predict(layer, test) == truth


both = pytest.mark.parametrize("probe", [by_mae, by_rates])


@both
def test_separable_classes_are_classified_perfectly(probe):
    train, labels, test, truth = gaussians(distance=8.0)
    assert probe(train, labels, test, truth).all()


@both
def test_shuffled_labels_give_chance_accuracy(probe):
    train, labels, test, truth = gaussians(distance=0.2, n=500)
    accuracies = [
        probe(train, np.random.default_rng(i).permutation(labels), test, truth).mean() for i in range(3)
    ]
    assert np.mean(accuracies) == pytest.approx(1 / CLASSES, abs=0.04)


@both
def test_the_optimum_is_that_of_logistic_regression(probe):
    train, labels, test, truth = gaussians(distance=0.35)
    reference = (
        LogisticRegression(C=1e3, max_iter=1000).fit(train.numpy(), labels).predict(test.numpy()) == truth
    )
    assert 0.6 < reference.mean() < 0.95, "a task that is neither trivial nor hopeless"
    assert 100 * probe(train, labels, test, truth).mean() == pytest.approx(100 * reference.mean(), abs=0.5)


@both
def test_a_probe_is_a_function_of_its_seed(probe):
    train, labels, test, truth = gaussians(distance=0.3, n=300)
    state = torch.get_rng_state()
    first = probe(train, labels, test, truth)
    assert torch.equal(state, torch.get_rng_state()), "the global generator is untouched"
    torch.rand(1)
    assert (first == probe(train, labels, test, truth)).all()
    assert (first != probe(train, labels, test, truth, seed=1)).any()


@both
def test_scale_and_offset_of_features_do_not_matter(probe):
    train, labels, test, truth = gaussians(distance=0.5, n=500)
    scale, offset = torch.logspace(-2, 2, train.shape[1]), torch.linspace(-30, 30, train.shape[1])
    moved = probe(train * scale + offset, labels, test * scale + offset, truth)
    assert (moved == probe(train, labels, test, truth)).mean() > 0.98


@both
def test_predictions_do_not_depend_on_other_test_images(probe):
    train, labels, test, truth = gaussians(distance=0.3, n=300)
    assert probe(train, labels, test[:1], truth[:1])[0] == probe(train, labels, test[:50], truth[:50])[0]


def test_maes_step_is_lars_on_standardized_features():
    """One step on the full set. The returned layer includes the running statistics: 0.9 of (0, 1) and 0.1 of
    the batch's."""
    train, labels, *_ = gaussians(distance=1.0, n=256)
    options = {"steps": 1, "warmup": 0.0, "batch": 256, "base_lr": 100.0, "seed": 3}
    targets = torch.from_numpy(labels)
    before, after = (fit_mae(batches, 16, CLASSES, **options) for batches in ([], [(train, targets)]))
    w = (before.weight.detach() * (1 + 1e-6) ** 0.5).requires_grad_()
    b = torch.zeros(CLASSES, requires_grad=True)
    assert w.std().item() == pytest.approx(0.01, rel=0.2) and not before.bias.any()
    x = (train - train.mean(0)) / (train.var(0, correction=0) + 1e-6).sqrt()
    torch.nn.functional.cross_entropy(x @ w.T + b, targets).backward()
    running = (0.9 + 0.1 * train.var(0) + 1e-6).sqrt()
    moved = w - 100 * 0.001 * w.norm() / w.grad.norm() * w.grad
    torch.testing.assert_close(after.weight, moved / running, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        after.bias, -100 * b.grad - (moved / running) @ (0.1 * train.mean(0)), rtol=1e-4, atol=1e-5
    )


@catches(
    "the learning rate is chosen without held-out samples",
    "rcmae.tasks.linear_probe:held_out",
    lambda old: lambda labels, seed=0, fraction=0.2: np.zeros(len(labels), bool),
)
def test_the_rate_is_chosen_on_held_out_samples_and_the_layer_fitted_on_all():
    """The test set is not an argument, so it cannot influence the choice."""
    train, labels, *_ = gaussians(distance=0.5, n=500)
    chosen = fit_rates(train, labels, CLASSES, steps=200)
    assert list(chosen.held_out) == list(RATES) and chosen.held_out[chosen.rate] == max(
        chosen.held_out.values()
    )
    alone = fit_rates(train, labels, CLASSES, rates=[chosen.rate], steps=200)
    assert torch.equal(alone.probe.weight, chosen.probe.weight) and alone.held_out == {}


def test_layers_of_different_rates_are_independent():
    """Three rates trained together equal each trained alone; the last one is far too high."""
    train, labels, *_ = gaussians(distance=1.0, n=500)
    rates = [1e-3, 0.1, 1e4]
    together = fit(train, labels, CLASSES, rates, 50, 100, 3)
    for i, rate in enumerate(rates):
        alone = fit(train, labels, CLASSES, [rate], 50, 100, 3)
        torch.testing.assert_close(together.weight[..., i], alone.weight[..., 0], rtol=1e-4, atol=1e-5)


def test_one_step_of_a_layer_equals_sgd():
    train, labels, *_ = gaussians(distance=1.0, n=256)
    heads = fit(train, labels, CLASSES, [0.5], 1, 256, 3)
    start = Heads(train, CLASSES, 1, torch.Generator().manual_seed(3))
    loss = torch.nn.functional.cross_entropy(start(train)[..., 0], torch.from_numpy(labels))
    loss.backward()
    torch.testing.assert_close(heads.weight, start.weight - 0.5 * start.weight.grad)


def test_with_one_image_a_class_the_middle_rate_is_taken():
    train, labels, *_ = gaussians(distance=8.0, n=CLASSES)
    fitted = fit_rates(train, labels, CLASSES, steps=10)
    assert fitted.rate == RATES[len(RATES) // 2] and fitted.held_out == {}


def test_a_constant_feature_is_not_amplified():
    """A feature that is zero in training and nearly zero in testing must not dominate."""
    train, labels, test, truth = gaussians(distance=2.0, n=300)
    train[:, 0], test[:, 0] = 0, 1 / 255
    layer = fit_rates(train, labels, CLASSES, steps=300).probe
    assert (predict(layer, test) == truth).mean() > 0.9


# --- attentive ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", attentive_probe.PROBES)
def test_attentive_probes_find_one_token_among_many(kind):
    """The class is in one token at a random position; in the mean over tokens it is hidden by noise."""
    rng = torch.Generator().manual_seed(0)

    def images(n):
        tokens, labels = 0.5 * torch.randn(n, 30, 16, generator=rng), torch.randint(0, 4, (n,), generator=rng)
        position = torch.randint(0, 30, (n,), generator=rng)
        tokens[torch.arange(n), position] = 4 * torch.eye(16)[labels] + 4 * torch.eye(16)[10]
        return tokens.half(), labels.numpy()

    (train, labels), (test, truth) = images(800), images(400)
    options = {"steps": 150, "rates": (1e-2, 3e-2), "heads": 5}
    fitted = attentive_probe.fit_rates(kind, train, labels, 4, **options)
    assert (predict(fitted.probe, test) == truth).mean() > 0.95
    assert fitted.held_out[fitted.rate] == max(fitted.held_out.values())
    again = attentive_probe.fit_rates(kind, train, labels, 4, **options | {"rates": (fitted.rate,)})
    assert (predict(again.probe, test) == predict(fitted.probe, test)).all()


def test_heads_divide_the_width():
    assert [attentive_probe.heads_for(width, 12) for width in (768, 128, 7)] == [12, 8, 7]


@catches("each test image counts as a sample", "rcmae.data.digits:DigitsSource.samples", lambda old: None)
def test_test_images_of_one_digit_have_one_number():
    recipe = changed(load_recipe("bundled"), probe_train=40, probe_test=600)
    probes = probe_set(DigitsSource(count=64), recipe)
    numbers = probes.test_images()
    assert len(numbers) == len(probes.truth) == 600 and len(np.unique(numbers)) < 364
    assert all(len(np.unique(probes.truth[numbers == n])) == 1 for n in np.unique(numbers))
