"""Linear probes of frozen features: MAE's protocol, SGD at many learning rates at once, and the logistic
regression of online probes.

None of them selects anything on the test set.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.optim import Lars
from torch import Tensor, nn

from ..engine.schedules import Progress, cosine, warmup_cosine
from .splits import held_out

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"Learning rates for a batch of 256 (DINOv2's)."

SCORED = 4096
"Batch size of predictions and scores."


def linear_correct(
    train: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
    truth: Int[np.ndarray, " m"],
) -> Bool[np.ndarray, " m"]:
    """Which test features multinomial logistic regression on standardized features classifies correctly."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
    with warnings.catch_warnings():
        # The accuracy stops changing long before 200 iterations.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train, labels)
    return model.predict(test) == truth


@torch.no_grad()
def predict(layer: nn.Module, x: Float[Tensor, "m ..."]) -> Int[np.ndarray, " m"]:
    """The class that a layer predicts for each feature."""
    return torch.cat([layer(part.float()).argmax(1) for part in x.split(SCORED)]).cpu().numpy()


def folded(
    mean: Float[Tensor, " d"],
    std: Float[Tensor, " d"],
    weight: Float[Tensor, "c d"],
    bias: Float[Tensor, " c"],
) -> nn.Linear:
    """Fold the standardization of the features into a linear layer."""
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], len(weight), device=weight.device)
    with torch.no_grad():
        layer.weight.copy_(weight / std)
        layer.bias.copy_(bias - (weight / std) @ mean)
    return layer


def lars(model: nn.Module, lr: float) -> Lars:
    """SGD with momentum 0.9 where the gradient g of a matrix w is first scaled to g * 0.001 |w| / |g|; no
    weight decay.

    Biases and other vectors are not scaled, nor is a matrix whose weights or gradients are all zero. Without
    weight decay timm scales nothing unless `always_adapt` is set; its `eps`, which the formula does not have,
    is 0. (With weight decay the two would differ: timm divides by |g| + decay |w|, MAE by |g + decay w|.)
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "always_adapt": True}, {"params": vectors, "always_adapt": False}]
    return Lars(groups, lr=lr, momentum=0.9, weight_decay=0.0, trust_coeff=0.001, eps=0.0)


def fit_mae(
    batches: Iterable[tuple[Float[Tensor, "b d"], Int[Tensor, " b"]]],
    width: int,
    classes: int,
    *,
    steps: int,
    warmup: float,
    batch: int,
    base_lr: float = 0.1,
    seed: int = 0,
    device: torch.device | None = None,
) -> nn.Linear:
    """Fit a linear layer with the protocol of MAE and RC-MAE: BatchNorm without affine parameters (eps 1e-6)
    and a linear layer; LARS without weight decay.

    The learning rate is base_lr * batch / 256: it rises from 0 in the fraction `warmup` of the steps, then
    follows a cosine to 0. The protocol is made for a million images and batches of 16,384: LARS changes the
    weights by a fraction of their norm per step, so that the few steps of a small set leave them near their
    initial values; use `fit_rates` there. One difference from MAE: the BatchNorm statistics are those of the
    full batch, not of each GPU's part.
    """
    head = nn.utils.skip_init(nn.Linear, width, classes)
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
    probe = nn.Sequential(norm, head).to(device)
    peak = base_lr * batch / 256
    optimizer = lars(probe, peak)
    for step, (x, labels) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(peak, 0.0, warmup, Progress(step, steps, 1))
        loss = F.cross_entropy(probe(x.float()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert norm.running_mean is not None and norm.running_var is not None
    std = torch.sqrt(norm.running_var + norm.eps)
    return folded(norm.running_mean, std, head.weight, head.bias)


class Fitted(NamedTuple):
    """The result of `fit_rates`."""

    probe: nn.Module
    rate: float
    "the selected learning rate; if it is the lowest or highest of the list, a rate outside it may be better"
    held_out: dict[float, float]
    "by rate, accuracy in percent on the held-out training images; empty if nothing was selected"

    def record(self) -> dict[str, Any]:
        """The learning rate and the accuracies, as JSON values."""
        return {"rate": self.rate, "held_out": {f"{rate:g}": score for rate, score in self.held_out.items()}}


def fit_rates(
    train: Float[Tensor, "n d"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    *,
    rates: Sequence[float] = RATES,
    steps: int = 12_500,
    batch: int = 1024,
    seed: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> Fitted:
    """Fit a linear layer by SGD at the learning rate (for a batch of 256) with the best accuracy on a
    held-out fifth of the training set.

    One layer per rate is fitted on the other four fifths, then one with the selected rate on the full set.
    Ties are broken by the lower loss, then by the lower rate. Steps, batch and rates are DINOv2's. If every
    class has only one image, the middle rate is used. `tick` is called after each step, at most 2 * `steps`
    times.
    """
    scores: dict[float, float] = {}
    rate, held = rates[len(rates) // 2], held_out(labels, seed)
    if held.any() and len(rates) > 1:
        inside, outside = (torch.from_numpy(np.flatnonzero(part)).to(train.device) for part in (~held, held))
        heads = fit(train[inside], labels[~held], classes, rates, steps, batch, seed, tick)
        results = heads.score(train[outside], labels[held])
        best = max(range(len(rates)), key=lambda i: (results[i][0], -results[i][1], -rates[i]))
        rate = rates[best]
        scores = {r: 100 * accuracy for r, (accuracy, _) in zip(rates, results, strict=True)}
    head = fit(train, labels, classes, [rate], steps, batch, seed, tick)
    layer = folded(head.norm.mean, head.norm.std, head.weight[..., 0].T, head.bias[:, 0])
    return Fitted(layer, rate, scores)


class Standard(nn.Module):
    """Standardizes features channel by channel, by the mean and standard deviation of `examples`."""

    mean: Tensor
    std: Tensor

    def __init__(self, examples: Float[Tensor, "*n d"]):
        super().__init__()
        std, mean = torch.std_mean(examples.float(), tuple(range(examples.ndim - 1)))
        self.register_buffer("std", torch.where(std > 1e-6, std, 1.0))  # constant features are not scaled
        self.register_buffer("mean", mean)

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        return (x.float() - self.mean) / self.std


class Heads(nn.Module):
    """`r` linear layers with the same initial weights, on features standardized by the statistics of
    `examples`."""

    def __init__(self, examples: Float[Tensor, "n d"], classes: int, count: int, draws: torch.Generator):
        super().__init__()
        self.norm = Standard(examples)
        start = 0.01 * torch.randn(examples.shape[1], classes, 1, generator=draws)
        self.weight = nn.Parameter(start.expand(-1, -1, count).clone())
        self.bias = nn.Parameter(torch.zeros(classes, count))

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b c r"]:
        return (self.norm(x) @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias

    @torch.no_grad()
    def score(self, x: Float[Tensor, "m d"], truth: Int[np.ndarray, " m"]) -> list[tuple[float, float]]:
        """The accuracy (0 to 1) and the loss of each layer; NaN counts as infinite."""
        labels = torch.from_numpy(truth).to(x.device)
        losses = [
            _losses(self(a), b) * len(b) for a, b in zip(x.split(SCORED), labels.split(SCORED), strict=True)
        ]
        loss = (torch.stack(losses).sum(0) / len(x)).nan_to_num(nan=float("inf"))
        return list(zip((predict(self, x) == truth[:, None]).mean(0).tolist(), loss.tolist(), strict=True))


def fit(
    train: Float[Tensor, "n d"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    rates: Sequence[float],
    steps: int,
    batch: int,
    seed: int,
    tick: Callable[[], object] = lambda: None,
) -> Heads:
    """Fit one layer per rate (for a batch of 256) by SGD with momentum 0.9 and a cosine to 0, all on the same
    batches of at most n images."""
    draws = torch.Generator().manual_seed(seed)
    heads = Heads(train, classes, len(rates), draws).to(train.device)
    batch, targets = min(batch, len(train)), torch.from_numpy(labels).to(train.device)
    # SGD is linear in the gradient, and each layer gets the gradient of its own loss only. So weighting a
    # loss by a rate is the same as training that layer at that rate.
    weights = torch.tensor(rates, device=train.device) * batch / 256
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    for step, chosen in enumerate(batches(len(train), batch, steps, draws)):
        optimizer.param_groups[0]["lr"] = cosine(1.0, 0.0, step / steps)
        chosen = chosen.to(train.device)
        loss = (_losses(heads(train[chosen]), targets[chosen]) * weights).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tick()
    return heads


def _losses(logits: Float[Tensor, "b c r"], labels: Int[Tensor, " b"]) -> Float[Tensor, " r"]:
    """Cross-entropy of each layer."""
    return F.cross_entropy(logits, labels[:, None].expand(-1, logits.shape[2]), reduction="none").mean(0)


def batches(n: int, batch: int, steps: int, draws: torch.Generator) -> Iterator[Int[Tensor, " b"]]:
    """Indices of each step's images: every epoch in a new order, without its incomplete last batch."""
    steps_per_epoch = n // batch
    for step in range(steps):
        if step % steps_per_epoch == 0:
            order = torch.randperm(n, generator=draws)
        yield order[step % steps_per_epoch * batch :][:batch]
