"""Do micro-batches give the gradient of the whole batch? `python -m benchmarks.accumulate`: 1 x 64 against 4 x 16, in float32.

Prints the largest difference of any weight's gradient, in units of the largest gradient. Exit code 0 only below 1e-6.
"""

import math
import sys

import torch

from rcmae.config import changed
from rcmae.data.dataset import Images, collate
from rcmae.data.sampler import BatchSampler
from rcmae.data.sources import open_source
from rcmae.engine.schedules import Progress
from rcmae.methods import METHODS
from rcmae.methods.recipes import digits_recipe
from rcmae.models.backbone import IMAGENET


def main() -> int:
    source = open_source("embedded:digits", size=digits_recipe("rcmae").images.size)
    worst = 0.0
    recipes = {name: digits_recipe(name) for name in METHODS}
    recipes = {name: recipe for name, recipe in recipes.items() if not METHODS[name].accumulation_caveat(recipe)}
    recipes["rcmae, the teacher under its own masks"] = changed(recipes["rcmae"], teacher_mask="different")
    for said, recipe in recipes.items():
        gradients = []
        for micro in (1, 4):
            torch.manual_seed(0)
            method = METHODS[recipe.method](recipe, *IMAGENET)
            if recipe.method == "rcmae":  # else the two agree under any mask
                method.teacher.model.decoder.pred.weight.mul_(1.1)
            data = Images(source, method.views(), recipe.seed)
            for keys in BatchSampler(len(source), 64, micro=micro, start=0, stop=1, seed=recipe.seed):
                batch = collate([data[key] for key in keys])
                (method(batch, Progress(0, 10, 10))["loss"] / micro).backward()
            gradients.append({n: p.grad for n, p in method.student.named_parameters() if p.requires_grad})
        largest = max(g.abs().max() for g in gradients[0].values())
        gap = torch.stack([(gradients[0][n] - gradients[1][n]).abs().max() / largest for n in gradients[0]]).max().item()
        print(f"{said}: 1 x 64 against 4 x 16, largest difference {gap:.1e} of the largest gradient")
        worst = max(worst, gap) if gap < math.inf else math.inf
    return int(worst > 1e-6)


if __name__ == "__main__":
    sys.exit(main())
