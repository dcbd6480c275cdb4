"""k-nearest-neighbour classification of frozen features: cosine similarity, votes weighted by exp(similarity / 0.07)."""

import numpy as np
from jaxtyping import Bool, Float, Int


def knn_right(
    train: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"], truth: Int[np.ndarray, " m"], k: int = 20, temperature: float = 0.07,
) -> Bool[np.ndarray, " m"]:  # fmt: skip
    """Which of the second set it gets right. k is lowered to the number of training samples when there are fewer."""
    train, test = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (train, test))
    k = min(k, len(train))
    similar = test @ train.T
    near = np.argpartition(-similar, k - 1, axis=1)[:, :k]
    weight = np.exp((np.take_along_axis(similar, near, 1) - 1) / temperature)
    votes = np.zeros((len(test), labels.max() + 1))
    np.add.at(votes, (np.arange(len(test))[:, None], labels[near]), weight)
    return votes.argmax(1) == truth
