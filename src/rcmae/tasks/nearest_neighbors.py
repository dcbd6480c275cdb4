"""k-nearest-neighbor classification of frozen features: cosine similarity, and votes weighted by
exp(similarity / 0.07)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError

COLUMNS = 8192
"Training features that are compared at a time."


class NearestNeighbors(nn.Module):
    """Features "m d" to log fractions "m c" of the votes that each class gets from the `k` nearest training
    features.

    At most `COLUMNS` training features are compared at a time, at some 40 bytes per pair. Ties go to the
    lower class. Raises ConfigError if k is below 1 or above the number of training features.

    If all neighbors belong to the same class, their votes have no gradient. So inputs that require one (in an
    attack) get the votes of all training features instead, k = n, with the class predicted by the k nearest
    raised to the top.
    """

    train_set: Tensor
    labels: Tensor

    def __init__(
        self,
        train: Float[Tensor, "n d"],
        labels: Int[Tensor, " n"],
        classes: int,
        k: int,
        temperature: float = 0.07,
    ):
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
        parts = [
            checkpoint(self._part, unit, first, use_reentrant=False, preserve_rng_state=False)
            for first in starts
        ]
        all_votes = (torch.stack(parts).sum(0) + 1e-12).log()  # [m, c]
        predicted = votes.argmax(1, keepdim=True)
        lift = (all_votes.amax(1, keepdim=True) - all_votes.gather(1, predicted) + 1e-3).detach()
        return all_votes.scatter_add(1, predicted, lift)

    def _part(self, unit: Float[Tensor, "m d"], first: int) -> Float[Tensor, "m c"]:
        """Votes of `COLUMNS` training features from index `first` on."""
        weight = ((unit @ self.train_set[first : first + COLUMNS].T - 1) / self.temperature).exp()
        return weight @ F.one_hot(self.labels[first : first + COLUMNS], self.classes).float()

    @torch.no_grad()
    def votes(self, x: Float[Tensor, "m d"], ks: Sequence[int]) -> dict[int, Float[Tensor, "m c"]]:
        """The votes for several values of k up to `self.k`, from a single search."""
        x = F.normalize(x.float(), dim=1)
        neighbors = nearest(x, self.train_set, self.k)  # [m, k]
        similarity = (x.unsqueeze(1) @ self.train_set[neighbors].transpose(1, 2)).squeeze(1)  # [m, k]
        weight = ((similarity - 1) / self.temperature).exp()
        result = {}
        for k in ks:
            votes = weight.new_zeros(len(x), self.classes).scatter_add(
                1, self.labels[neighbors[:, :k]], weight[:, :k]
            )
            result[k] = (votes / votes.sum(1, keepdim=True) + 1e-12).log()
        return result


def check_k(ks: Sequence[int], images: int) -> None:
    """Raise ConfigError unless every k lies between 1 and the number of training images."""
    if not ks or min(ks) < 1 or max(ks) > images:
        raise ConfigError(
            f"k must lie in 1 to {images:,}, the number of training images, not {', '.join(map(str, ks))}"
        )


def nearest(queries: Float[Tensor, "q d"], train: Float[Tensor, "n d"], k: int) -> Int[Tensor, "q k"]:
    """Indices of the k training features most similar to each query, best first; among equals the lower index
    comes first. All features have unit length.

    Similarity (to 2^-30, finer than float32 resolves at 1) and index are packed into a single integer that
    sorts by both. With plain similarities, `topk` could return any of several identical images, and the
    result would depend on how the training set is split into parts.
    """
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first in range(0, len(train), COLUMNS):
        keys = train[first : first + COLUMNS]
        index = torch.arange(first, first + len(keys), device=queries.device)
        ranked = ((queries @ keys.T * 2**30).long() << 32) - index
        best = torch.cat([best, ranked], 1)
        best = best.topk(min(k, best.shape[1])).values
    return -best % 2**32
