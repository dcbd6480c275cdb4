"""Adversarial attacks in L-infinity: FGSM (Goodfellow et al. 2015) and PGD (Madry et al. 2018).

Models take pixels in 0 to 1 and standardize them inside, so eps is in units of pixel values (given in 1/255)
and not of the channels' standard deviations. Models must be in evaluation mode, without autocast. Accuracy
under PGD is an upper bound: a stronger attack may succeed where it fails.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import ConfigError

Images = Float[Tensor, "b c h w"]
Model = Callable[[Tensor], Tensor]
"Pixels in 0 to 1 [b, c, h, w] to logits [b, classes]."


@dataclass(frozen=True)
class Attack:
    """`steps` along the sign of the gradient, each of `size`, within a box of radius `eps` (both in 1/255).

    `restarts` is the number of random starting points in the box; 0 means one start, from the image itself.
    Raises ConfigError.
    """

    eps: float
    steps: int
    size: float
    restarts: int

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 255:
            raise ConfigError(f"eps is in 1/255 and lies in 0 to 255, not {self.eps:g}")
        if self.steps < 1 or self.restarts < 0:
            raise ConfigError(
                f"an attack needs at least one step and at least 0 restarts, not {self.steps} and "
                f"{self.restarts}"
            )

    @property
    def name(self) -> str:
        """The name in tables: "FGSM 1/255", "PGD-20 1/255"."""
        restarts = f" x{self.restarts}" if self.restarts > 1 else ""
        kind = f"PGD-{self.steps}" if self.steps > 1 or self.restarts else "FGSM"
        return f"{kind}{restarts} {self.eps:g}/255"


def fgsm(eps: float) -> Attack:
    """A single step of eps from the image itself."""
    return Attack(eps, 1, eps, 0)


def pgd(eps: float, steps: int = 20, restarts: int = 1) -> Attack:
    """The step size is 2.5 eps / steps, as in Madry et al.: enough to cross the box from any starting point
    and to move along its faces."""
    return Attack(eps, steps, 2.5 * eps / steps, restarts)


def attacked(
    model: Model,
    images: Images,
    labels: Int[Tensor, " b"],
    attack: Attack,
    seed: int = 0,
    indices: Sequence[int] | None = None,
) -> tuple[Images, Bool[Tensor, " b"]]:
    """The images after the attack, and which of them the model still classifies correctly.

    An image is not changed any further once it is misclassified. So an image that is misclassified from the
    start stays as it is, and an image counts as correct only if it survives all restarts. Random starting
    points are functions of (seed, image index, restart), so they do not depend on the batches; without
    `indices` images are numbered from 0.
    """
    eps, key = attack.eps / 255, [seed, zlib.crc32(b"attack")]
    low, high = (images - eps).clamp(0, 1), (images + eps).clamp(0, 1)
    with torch.no_grad():
        correct = model(images).argmax(1) == labels
    result = images.clone()
    for restart in range(max(1, attack.restarts)):
        left = correct.nonzero()[:, 0]  # the images that survived all previous restarts
        if not len(left):
            break
        x = images[left]
        if attack.restarts:
            shape = images.shape[1:]
            draws = [
                np.random.Philox(key=key, counter=[0, 0, i if indices is None else indices[i], restart])
                for i in left.tolist()
            ]
            offsets = np.array(
                [np.random.Generator(draw).uniform(-1, 1, shape) for draw in draws], np.float32
            ).reshape(-1, *shape)
            x = (x + eps * torch.from_numpy(offsets).to(x)).clamp(low[left], high[left])
        for step in range(attack.steps + 1):  # the last iteration only evaluates
            x.requires_grad_()
            logits = model(x)
            survived = logits.argmax(1) == labels[left]
            result[left] = x.detach()
            correct[left] = survived
            if step == attack.steps or not survived.any():
                break
            # A sum, so that no image's gradient depends on the size of the batch.
            loss = F.cross_entropy(logits.float(), labels[left], reduction="sum")
            [gradient] = torch.autograd.grad(loss, x)
            left, x, gradient = left[survived], x.detach()[survived], gradient[survived]
            x = (x + attack.size / 255 * gradient.sign()).clamp(low[left], high[left])
    return result, correct


class Check(NamedTuple):
    """The outcome of a sanity check, and the numbers it compared."""

    holds: bool
    numbers: str


SLACK = 1.0
"""Tolerance of a check in percentage points (or a single image if that is more): which of two attacks
succeeds on an image close to the decision boundary is partly chance."""


def sanity(
    model: Model, images: Images, labels: Int[Tensor, " b"], attack: Attack, seed: int = 0
) -> dict[str, Check]:
    """Checks that an attack measures the model's robustness and not a failure of the attack, on a batch of a
    few hundred images.

    The last three detect gradient masking, as recommended by Carlini et al. 2019 (arXiv 1902.06705): a model
    that fails one of them may resist this attack but not another.
    """

    def percent(attack: Attack) -> float:
        return 100 * attacked(model, images, labels, attack, seed)[1].float().mean().item()

    with torch.no_grad():
        clean = 100 * (model(images).argmax(1) == labels).float().mean().item()
    moved, correct = attacked(model, images, labels, attack, seed)
    accuracy, single_step = 100 * correct.float().mean().item(), percent(fgsm(attack.eps))
    eps_zero = percent(replace(attack, eps=0.0))
    unbounded = percent(pgd(255.0, max(20, attack.steps)))
    longer = percent(replace(attack, steps=2 * attack.steps))
    distance, low, high = (x.item() for x in (255 * (moved - images).abs().max(), moved.min(), moved.max()))
    slack = max(SLACK, 100 / len(images) + 1e-3)
    rounding = 255 * torch.finfo(images.dtype).eps  # for values up to 1
    return {
        "eps 0 equals clean": Check(eps_zero == clean, f"{eps_zero:.1f} % and {clean:.1f} %"),
        "PGD is not above FGSM": Check(
            accuracy <= single_step + slack, f"{accuracy:.1f} % and {single_step:.1f} %"
        ),
        "distance is never above eps": Check(
            distance <= attack.eps + rounding and low >= 0 and high <= 1,
            f"{distance:.4f} of {attack.eps:g} / 255, pixels {low:.4f} to {high:.4f}",
        ),
        "without a bound no image stays correct": Check(unbounded <= slack, f"{unbounded:.1f} %"),
        "more steps are not weaker": Check(longer <= accuracy, f"{longer:.1f} % and {accuracy:.1f} %"),
        "twice the steps are not stronger": Check(
            longer >= accuracy - slack, f"{longer:.1f} % and {accuracy:.1f} %"
        ),
    }
