"""Is the gradient of accumulated micro-batches that of the full batch? `python -m benchmarks.accumulate`.

Compares 1 x 64 with 4 x 16 images in float32 and prints the largest difference of any weight's gradient,
relative to the largest gradient. Exit code 0 only below 1e-6.
"""

import math
import sys
from typing import Any

import torch
from torch import Tensor

from rcmae.config import changed
from rcmae.data.dataset import Images, collate
from rcmae.data.sampler import BatchSampler
from rcmae.data.sources import open_source
from rcmae.engine.schedules import Progress
from rcmae.methods import METHODS
from rcmae.methods.rcmae import RCMAE
from rcmae.methods.recipes import digits_recipe
from rcmae.models.backbone import IMAGENET


def main() -> int:
    """Compare for every method whose micro-batches should add up to the batch."""
    source = open_source("bundled:digits", size=digits_recipe("rcmae").images.size)
    recipes = {name: digits_recipe(name) for name in METHODS}
    recipes = {
        name: recipe for name, recipe in recipes.items() if not METHODS[name].accumulation_caveat(recipe)
    }
    recipes["rcmae, teacher_mask=different"] = changed(recipes["rcmae"], teacher_mask="different")
    largest = 0.0
    for name, recipe in recipes.items():
        gradients: list[dict[str, Tensor]] = []
        for micro in (1, 4):
            torch.manual_seed(0)
            method = METHODS[recipe.method](recipe, *IMAGENET)
            if isinstance(method, RCMAE):  # an identical teacher would agree under any mask
                decoder: Any = method.teacher.model.decoder
                decoder.pred.weight.mul_(1.1)
            data = Images(source, method.views(), recipe.seed)
            for keys in BatchSampler(len(source), 64, micro=micro, start=0, stop=1, seed=recipe.seed):
                batch = collate([data[key] for key in keys])
                (method(batch, Progress(0, 10, 10))["loss"] / micro).backward()
            gradients.append({n: p.grad for n, p in method.student.named_parameters() if p.grad is not None})
        full, accumulated = gradients
        scale = max(g.abs().max() for g in full.values())
        gaps = [(full[n] - accumulated[n]).abs().max() / scale for n in full]
        gap = torch.stack(gaps).max().item()
        print(f"{name}: 1 x 64 against 4 x 16, largest difference {gap:.1e} of the largest gradient")
        largest = max(largest, gap) if gap < math.inf else math.inf
    return int(largest > 1e-6)


if __name__ == "__main__":
    sys.exit(main())
