"""Attentive probe: a few learned queries gather the tokens of a frozen backbone, a linear layer tells classes from what they gathered."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class AttentivePool(nn.Module):
    """Softmax attention of `heads` queries over tokens; each reads its own share of the width, so `heads` divides it.

    Tokens are standardised by the statistics of `examples`. Queries start at zero: at first all tokens count alike.
    """

    def __init__(self, examples: Float[Tensor, "n t d"], heads: int, classes: int):
        super().__init__()
        self.heads = heads
        self.std, self.mean = torch.std_mean(examples.float(), (0, 1))
        self.query = nn.Parameter(torch.zeros(heads, examples.shape[2]))
        self.head = nn.Linear(examples.shape[2], classes)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b c"]:
        tokens = (tokens.float() - self.mean) / (self.std + 1e-6)
        share = (tokens @ self.query.T / tokens.shape[2] ** 0.5).softmax(1)
        gathered = torch.einsum("bnh,bnhw->bhw", share, tokens.unflatten(2, (self.heads, -1)))
        return self.head(gathered.flatten(1))


def attentive_right(
    train: Float[Tensor, "n t d"], labels: Int[np.ndarray, " n"], test: Float[Tensor, "m t d"], truth: Int[np.ndarray, " m"], *,
    epochs: int = 40, batch: int = 128, lr: float = 0.03, heads: int = 4, seed: int = 0,
) -> Bool[np.ndarray, " m"]:  # fmt: skip
    """Which of the second set a probe that was fitted on the first one gets right.

    AdamW and a cosine without warm-up, from weights and an order drawn from `seed`; nothing is chosen on the second set. (Epochs and
    learning rate were, once, on the embedded set: a tenth of the rate reaches 58 % there, this one 74 %.)
    """
    draws = torch.Generator().manual_seed(seed)
    answers, device = torch.from_numpy(labels).to(train.device), train.device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        probe = AttentivePool(train[:512], heads, int(labels.max()) + 1).to(device)
    batch = min(batch, len(train))
    steps = epochs * (len(train) // batch)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.cat([torch.randperm(len(train), generator=draws)[: len(train) // batch * batch] for _ in range(epochs)])
    for chosen in order.to(device).split(batch):
        loss = F.cross_entropy(probe(train[chosen]), answers[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        said = torch.cat([probe(part).argmax(1) for part in test.split(1024)])
    return said.cpu().numpy() == truth
