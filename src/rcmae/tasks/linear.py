"""Linear classification of frozen features."""

import warnings

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


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
