"""Linear classification of frozen features: MAE's protocol, many learning rates at once, and the logistic regression of online probes.

None of them chooses anything on the test set.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from ..engine.schedules import Progress, cosine, warmup_cosine
from .lars import lars
from .splits import held_out

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"Learning rates for a batch of 256 (DINOv2's)."

SCORED = 4096
"Features that are scored at a time."


def linear_right(
    train: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"], truth: Int[np.ndarray, " m"], strength: float = 0.1,
) -> Bool[np.ndarray, " m"]:  # fmt: skip
    """Which of the second set multinomial logistic regression on standardised features gets right; `strength` is sklearn's C."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=200))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 200 steps are far past where the accuracy still moves
        model.fit(train, labels)
    return model.predict(test) == truth


@torch.no_grad()
def predict(layer: nn.Module, x: Float[Tensor, "m ..."]) -> Int[np.ndarray, " m"]:
    """The class that a layer names for each feature."""
    return torch.cat([layer(part.float()).argmax(1) for part in x.split(SCORED)]).cpu().numpy()


def folded(mean: Float[Tensor, " d"], std: Float[Tensor, " d"], weight: Float[Tensor, "c d"], bias: Float[Tensor, " c"]) -> nn.Linear:
    """A linear layer on standardised features, as one on the features themselves."""
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], len(weight), device=weight.device)
    with torch.no_grad():
        layer.weight.copy_(weight / std)
        layer.bias.copy_(bias - (weight / std) @ mean)
    return layer


def fit_mae(
    batches: Iterable[tuple[Float[Tensor, "b d"], Int[Tensor, " b"]]], width: int, classes: int, *,
    steps: int, warmup: float, batch: int, base_lr: float = 0.1, seed: int = 0, device: torch.device | None = None,
) -> nn.Linear:  # fmt: skip
    """A layer fitted as MAE and RC-MAE do: BatchNorm without weights, eps 1e-6, and a linear layer; LARS, no weight decay.

    The learning rate is base_lr * batch / 256, up from 0 in the share `warmup` of the steps, then a cosine to 0. Made for a million images
    and batches of 16,384: LARS moves weights by a share of their size a step, which in the few steps of a small set leaves them near their
    first values; take `fit_rates` there. What differs: the statistics are of the whole batch, not of each GPU's part.
    """
    head = nn.utils.skip_init(nn.Linear, width, classes)
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
    probe = nn.Sequential(norm, head).to(device)
    peak = base_lr * batch / 256
    optimizer = lars(probe, peak)
    for step, (x, answers) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(peak, 0.0, warmup, Progress(step, steps, 1))
        loss = F.cross_entropy(probe(x.float()), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return folded(norm.running_mean, (norm.running_var + norm.eps).sqrt(), head.weight, head.bias)


class Rated(NamedTuple):
    """What `fit_rates` found."""

    layer: nn.Linear
    rate: float
    "the learning rate it was fitted with, for a batch of 256; at an end of the list, a better one may lie beyond"
    held_out: dict[float, float]
    "by rate, percent right of the training images that were held out to choose it; empty where there was one rate only"


def fit_rates(
    train: Float[Tensor, "n d"], labels: Int[np.ndarray, " n"], classes: int, *,
    rates: Sequence[float] = RATES, steps: int = 12_500, batch: int = 1024, seed: int = 0, tick: Callable[[], object] = lambda: None,
) -> Rated:  # fmt: skip
    """A linear layer by SGD, its learning rate the one that does best on a fifth of the training set that the others did not see.

    Layers of all rates are fitted together on four fifths; then one of the chosen rate on the whole set. Equally many right: the lower
    loss decides, then the lower rate. Steps, batch and rates are DINOv2's. Where every class has one image, the middle rate is taken.
    `tick` is called after each step, of which there are at most twice as many.
    """
    scores: dict[float, float] = {}
    rate = rates[0]
    if len(rates) > 1:
        held = held_out(labels, seed)
        if not held.any():
            return fit_rates(train, labels, classes, rates=[rates[len(rates) // 2]], steps=steps, batch=batch, seed=seed, tick=tick)
        inside, outside = (torch.from_numpy(np.flatnonzero(part)).to(train.device) for part in (~held, held))
        heads = fit(train[inside], labels[~held], classes, rates, steps, batch, seed, tick)
        found = heads.score(train[outside], labels[held])
        best = max(range(len(rates)), key=lambda i: (found[i][0], -found[i][1], -rates[i]))
        rate, scores = rates[best], {r: 100 * share for r, (share, _) in zip(rates, found, strict=True)}
    only = fit(train, labels, classes, [rate], steps, batch, seed, tick)
    return Rated(folded(only.mean, only.std, only.weight[..., 0].T, only.bias[:, 0]), rate, scores)


class Heads(nn.Module):
    """`r` linear layers that start alike, on features standardised by the statistics of `examples`."""

    def __init__(self, examples: Float[Tensor, "n d"], classes: int, count: int, draws: torch.Generator):
        super().__init__()
        std, self.mean = torch.std_mean(examples.float(), 0)
        self.std = torch.where(std > 1e-6, std, 1.0)  # what never changes is left as it is
        start = 0.01 * torch.randn(examples.shape[1], classes, 1, generator=draws)
        self.weight = nn.Parameter(start.expand(-1, -1, count).clone())
        self.bias = nn.Parameter(torch.zeros(classes, count))

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b c r"]:
        x = (x.float() - self.mean) / self.std
        return (x @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias

    @torch.no_grad()
    def score(self, x: Float[Tensor, "m d"], truth: Int[np.ndarray, " m"]) -> list[tuple[float, float]]:
        """Of each layer, the share it gets right and its loss; a loss that is not finite counts as infinite."""
        answers = torch.from_numpy(truth).to(x.device)
        losses = [_losses(self(a), b) * len(b) for a, b in zip(x.split(SCORED), answers.split(SCORED), strict=True)]
        loss = (torch.stack(losses).sum(0) / len(x)).nan_to_num(nan=float("inf"))
        return list(zip((predict(self, x) == truth[:, None]).mean(0).tolist(), loss.tolist(), strict=True))


def fit(
    train: Float[Tensor, "n d"], labels: Int[np.ndarray, " n"], classes: int, rates: Sequence[float], steps: int, batch: int, seed: int,
    tick: Callable[[], object] = lambda: None,
) -> Heads:  # fmt: skip
    """One layer a rate (for a batch of 256) by SGD with momentum 0.9 and a cosine to 0, all on the same batches of at most n images."""
    draws = torch.Generator().manual_seed(seed)
    heads = Heads(train, classes, len(rates), draws).to(train.device)
    batch, answers = min(batch, len(train)), torch.from_numpy(labels).to(train.device)
    # SGD is linear in the gradient, and a layer's gradient is of its own loss only: a loss weighed by a rate is learned at that rate.
    weights = torch.tensor(rates, device=train.device) * batch / 256
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    for step, chosen in enumerate(batches(len(train), batch, steps, draws)):
        optimizer.param_groups[0]["lr"] = cosine(1.0, 0.0, step / steps)
        chosen = chosen.to(train.device)
        loss = (_losses(heads(train[chosen]), answers[chosen]) * weights).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tick()
    return heads


def _losses(logits: Float[Tensor, "b c r"], answers: Int[Tensor, " b"]) -> Float[Tensor, " r"]:
    """Cross-entropy of each layer."""
    return F.cross_entropy(logits, answers[:, None].expand(-1, logits.shape[2]), reduction="none").mean(0)


def batches(n: int, batch: int, steps: int, draws: torch.Generator) -> Iterator[Int[Tensor, " b"]]:
    """Indices of each step's images: pass after pass in a new order, what is left over of a pass dropped."""
    a_pass = n // batch
    for step in range(steps):
        if step % a_pass == 0:
            order = torch.randperm(n, generator=draws)
        yield order[step % a_pass * batch :][:batch]
