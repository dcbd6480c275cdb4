"""k-nearest-neighbour classification of frozen features: cosine similarity, votes weighted by exp(similarity / 0.07)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError

COLUMNS = 8192
"Training features that are compared at a time."


class Knn(nn.Module):
    """Features "m d" to the shares of the votes "m c" that each class gets from the `k` nearest training features, as logarithms.

    At most `COLUMNS` training features at a time are compared, some 40 bytes a pair, whatever their number. Equal votes go to the lower
    class. Raises ConfigError when k is below 1 or above the training set.

    Where all neighbours are of one class, votes have no gradient. So what wants one (an attack) gets the votes of all training features
    instead, k = n, with the class that the k nearest name lifted to the top.
    """

    def __init__(self, train: Float[Tensor, "n d"], labels: Int[Tensor, " n"], classes: int, k: int, temperature: float = 0.07):
        super().__init__()
        check_k([k], len(train))
        self.register_buffer("train_set", F.normalize(train.float(), dim=1), persistent=False)
        self.register_buffer("labels", labels, persistent=False)
        self.classes, self.k, self.temperature = classes, k, temperature

    def forward(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "m c"]:
        votes = self.votes(x, [self.k])[self.k]
        if not x.requires_grad:
            return votes
        unit, starts = F.normalize(x.float(), dim=1), range(0, len(self.train_set), COLUMNS)
        parts = [checkpoint(self._part, unit, first, use_reentrant=False, preserve_rng_state=False) for first in starts]
        of_all = (torch.stack(parts).sum(0) + 1e-12).log()
        named = votes.argmax(1, keepdim=True)
        lift = (of_all.amax(1, keepdim=True) - of_all.gather(1, named) + 1e-3).detach()
        return of_all.scatter_add(1, named, lift)

    def _part(self, unit: Float[Tensor, "m d"], first: int) -> Float[Tensor, "m c"]:
        """Votes of `COLUMNS` training features."""
        weight = ((unit @ self.train_set[first : first + COLUMNS].T - 1) / self.temperature).exp()
        return weight @ F.one_hot(self.labels[first : first + COLUMNS], self.classes).float()

    @torch.no_grad()
    def votes(self, x: Float[Tensor, "m d"], ks: Sequence[int]) -> dict[int, Float[Tensor, "m c"]]:
        """The same for several k at most `self.k`, from one search."""
        x = F.normalize(x.float(), dim=1)
        near = nearest(x, self.train_set, self.k)
        similar = (x.unsqueeze(1) @ self.train_set[near].transpose(1, 2)).squeeze(1)
        weight = ((similar - 1) / self.temperature).exp()
        found = {}
        for k in ks:
            votes = weight.new_zeros(len(x), self.classes).scatter_add(1, self.labels[near[:, :k]], weight[:, :k])
            found[k] = (votes / votes.sum(1, keepdim=True) + 1e-12).log()
        return found


def check_k(ks: Sequence[int], images: int) -> None:
    """Raises ConfigError unless every k lies in 1 to the number of training images."""
    if not ks or min(ks) < 1 or max(ks) > images:
        raise ConfigError(f"k must lie in 1 to {images:,}, the number of training images, not {', '.join(map(str, ks))}")


def nearest(queries: Float[Tensor, "q d"], train: Float[Tensor, "n d"], k: int) -> Int[Tensor, "q k"]:
    """The k training features most similar to each query, best first, all of unit length; among equals the lower index comes first.

    Similarity (to 2^-30, finer than float32 is at 1) and index are packed into one integer that sorts by both. Else `topk` is free to
    choose among images that look the same, and the answer would depend on how the set was cut.
    """
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first in range(0, len(train), COLUMNS):
        keys = train[first : first + COLUMNS]
        index = torch.arange(first, first + len(keys), device=queries.device)
        ranked = ((queries @ keys.T * 2**30).long() << 32) - index
        best = torch.cat([best, ranked], 1)
        best = best.topk(min(k, best.shape[1])).values
    return -best % 2**32
