"""Robustness to the worst small change of every pixel: FGSM (Goodfellow et al. 2015) and PGD in L-infinity (Madry et al. 2018).

Models take pixels in 0 to 1 and standardise them inside, so eps is a length in pixels, given in 1/255, and not in channels' deviations.
They must be in evaluation mode, without autocast. What PGD does not break may still break: its accuracy is an upper bound.
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
    """`steps` along the sign of the gradient, each of `size`, at most `eps` away (both in 1/255).

    `restarts` counts the random points in the box that it starts from; 0: once, from the image itself. Raises ConfigError.
    """

    eps: float
    steps: int
    size: float
    restarts: int

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 255:
            raise ConfigError(f"eps is in 1/255 and lies in 0 to 255, not {self.eps:g}")
        if self.steps < 1 or self.restarts < 0:
            raise ConfigError(f"an attack makes at least one step and no negative number of restarts, not {self.steps} and {self.restarts}")

    @property
    def name(self) -> str:
        """As it is called in tables: "FGSM 1/255", "PGD-20 1/255"."""
        restarts = f" x{self.restarts}" if self.restarts > 1 else ""
        kind = f"PGD-{self.steps}" if self.steps > 1 or self.restarts else "FGSM"
        return f"{kind}{restarts} {self.eps:g}/255"


def fgsm(eps: float) -> Attack:
    """One step of eps from the image itself."""
    return Attack(eps, 1, eps, 0)


def pgd(eps: float, steps: int = 20, size: float | None = None, restarts: int = 1) -> Attack:
    """By default a step is 2.5 eps / steps (Madry et al.'s choice): enough to cross the box from any start, and to turn at its faces."""
    return Attack(eps, steps, 2.5 * eps / steps if size is None else size, restarts)


def attacked(
    model: Model, images: Images, labels: Int[Tensor, " b"], attack: Attack, seed: int = 0, indices: Sequence[int] | None = None
) -> tuple[Images, Bool[Tensor, " b"]]:
    """The images after the attack, and which of them the model still gets right.

    An image is moved no further once the model errs: one that is wrong from the start stays as it is, and over restarts the worst counts.
    Random starts are drawn from (seed, image's index, restart), so batches may be cut anywhere; without `indices` they count from 0.
    """
    eps, key = attack.eps / 255, [seed, zlib.crc32(b"attack")]
    low, high = (images - eps).clamp(0, 1), (images + eps).clamp(0, 1)
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    result = images.clone()
    for restart in range(max(1, attack.restarts)):
        left = right.nonzero()[:, 0]  # every image that survived the restarts before
        if not len(left):
            break
        x = images[left]
        if attack.restarts:
            shape = images.shape[1:]
            draws = [np.random.Philox(key=key, counter=[0, 0, i if indices is None else indices[i], restart]) for i in left.tolist()]
            shares = np.array([np.random.Generator(draw).uniform(-1, 1, shape) for draw in draws], np.float32).reshape(-1, *shape)
            x = (x + eps * torch.from_numpy(shares).to(x)).clamp(low[left], high[left])
        for step in range(attack.steps + 1):  # the last round only looks
            x.requires_grad_()
            logits = model(x)
            held = logits.argmax(1) == labels[left]
            result[left] = x.detach()
            right[left] = held
            if step == attack.steps or not held.any():
                break
            # A sum, so that no image's gradient depends on its neighbours.
            gradient = torch.autograd.grad(F.cross_entropy(logits.float(), labels[left], reduction="sum"), x)[0]
            left, x, gradient = left[held], x.detach()[held], gradient[held]
            x = (x + attack.size / 255 * gradient.sign()).clamp(low[left], high[left])
    return result, right


class Check(NamedTuple):
    """Whether it holds, and the numbers that say so."""

    holds: bool
    saw: str


SLACK = 1.0
"Percentage points, or a single image if that is more, that a check grants: which of two attacks finds an image on the brink is luck."


def sanity(model: Model, images: Images, labels: Int[Tensor, " b"], attack: Attack, seed: int = 0) -> dict[str, Check]:
    """What must be true of an attack that measures the model and not its own failure, checked on one batch of a few hundred images.

    The last three look for gradient masking as Carlini et al. 2019 (arXiv 1902.06705) ask: a model that fails one may resist this attack
    and not another.
    """

    def percent(attack: Attack) -> float:
        return 100 * attacked(model, images, labels, attack, seed)[1].float().mean().item()

    with torch.no_grad():
        clean = 100 * (model(images).argmax(1) == labels).float().mean().item()
    moved, right = attacked(model, images, labels, attack, seed)
    found, single = 100 * right.float().mean().item(), percent(fgsm(attack.eps))
    still = percent(replace(attack, eps=0.0))
    free = percent(pgd(255.0, max(20, attack.steps)))
    longer = percent(replace(attack, steps=2 * attack.steps))
    distance, low, high = (x.item() for x in (255 * (moved - images).abs().max(), moved.min(), moved.max()))
    slack = max(SLACK, 100 / len(images) + 1e-3)
    rounding = 255 * torch.finfo(images.dtype).eps  # of values up to 1
    return {
        "eps 0 equals clean": Check(still == clean, f"{still:.1f} % and {clean:.1f} %"),
        "PGD is not above FGSM": Check(found <= single + slack, f"{found:.1f} % and {single:.1f} %"),
        "distance is never above eps": Check(
            distance <= attack.eps + rounding and low >= 0 and high <= 1,
            f"{distance:.4f} of {attack.eps:g} / 255, pixels {low:.4f} to {high:.4f}",
        ),
        "without a bound nothing stays right": Check(free <= slack, f"{free:.1f} %"),
        "more steps are not weaker": Check(longer <= found, f"{longer:.1f} % and {found:.1f} %"),
        "twice the steps find no more": Check(longer >= found - slack, f"{longer:.1f} % and {found:.1f} %"),
    }
