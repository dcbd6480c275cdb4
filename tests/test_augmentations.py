"""Every view that a shipped recipe draws, thousands of times, so that rare draws are tested too.

New releases of libraries reject other inputs, and training on a million images would meet all of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from rcmae.config import changed, flags, shipped_recipes
from rcmae.data.supervised import SupervisedView
from rcmae.methods import METHODS
from rcmae.methods.recipes import load_recipe
from rcmae.tasks.detection.coco import Objects
from rcmae.tasks.detection.settings import load_detect
from rcmae.tasks.detection.views import Jitter
from rcmae.tasks.finetune import FineTuneRecipe, load_finetune

STATISTICS = (0.5,) * 3, (0.25,) * 3
SMALL = {"model": "vit_tiny_small_images", "size": 32, "width": 24, "depth": 1, "heads": 2, "local_size": 16}
DRAWS = 1000


def photograph(seed: int, h: int = 20, w: int = 26) -> np.ndarray:
    """Noise over a gradient of brightness; every eighth image has one color, and so no contrast to
    stretch."""
    draws = np.random.default_rng(seed)
    if seed % 8 == 0:
        return np.full((h, w, 3), draws.integers(256, size=3), np.uint8)
    return (draws.integers(0, 128, (h, w, 3)) + np.linspace(0, 127, w)[None, :, None]).astype(np.uint8)


def views_of(settings: FineTuneRecipe, shape: tuple[int, int] = (16, 16)) -> SupervisedView:
    options = {k: getattr(settings, k) for k in ("flip", "randaugment", "erasing")}
    return SupervisedView(shape, *STATISTICS, scale=settings.crop_scale, **options)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5", "rand-m15-mmax20-n3-inc1"])
def test_every_operation_of_randaugment_works_at_every_magnitude(policy):
    view = SupervisedView(
        (16, 16), *STATISTICS, scale=(1.0, 1.0), flip=False, randaugment=policy, erasing=0.0
    )
    image = Image.fromarray(photograph(3))
    for operation in view.augment.ops:
        largest = int(operation.magnitude_max or 10)
        for magnitude in np.linspace(0, largest, 4 * largest + 1):
            for _ in range(4):  # the sign is random
                arguments = operation.level_fn(magnitude, operation.hparams) if operation.level_fn else ()
                changed = operation.aug_fn(image, *arguments, **operation.kwargs)
                assert (changed.size, changed.mode) == (image.size, "RGB"), (operation.name, magnitude)


def test_posterize_keeps_between_zero_and_four_bits():
    view = views_of(load_finetune("folder"))
    (posterize,) = [o for o in view.augment.ops if o.name == "PosterizeIncreasing"]
    image = Image.fromarray(photograph(3))
    levels = {
        m: np.unique(np.array(posterize.aug_fn(image, *posterize.level_fn(m, posterize.hparams))))
        for m in (0.0, 9.0, 10.0)
    }
    assert levels[10.0].tolist() == [0]
    assert levels[9.0].tolist() == [0, 128]
    assert 10 < len(levels[0.0]) <= 16 and not (levels[0.0] % 16).any()


@pytest.mark.parametrize("name", shipped_recipes("finetune"))
def test_views_of_a_recipe_of_fine_tuning(name):
    view = views_of(load_finetune(name))
    for seed in range(DRAWS):
        sample = view(photograph(seed), np.random.default_rng(seed))["image"]
        assert sample.shape == (3, 16, 16) and sample.isfinite().all()


@pytest.mark.parametrize("name", shipped_recipes())
def test_views_of_a_recipe_of_pre_training(name):
    recipe = load_recipe(name)
    with torch.device("meta"):  # views need only the grid of the network
        view = METHODS[recipe.method](
            changed(recipe, **{k: v for k, v in SMALL.items() if k in flags(type(recipe))}), *STATISTICS
        ).views()
    for seed in range(DRAWS // 20):  # of up to twelve crops each
        sample = view(photograph(seed), np.random.default_rng(seed))
        assert sample["image"].shape[-3:] == (3, 32, 32) and sample["image"].dtype == torch.uint8


@pytest.mark.parametrize("name", shipped_recipes("detection"))
def test_views_of_a_recipe_of_detection(name):
    s = load_detect(name)
    view = Jitter(32, s.jitter, s.flip, s.max_instances, STATISTICS[0])
    for seed in range(DRAWS):
        draws = np.random.default_rng(seed)
        masks = draws.random((3, 20, 26)) < draws.random((3, 1, 1))
        sample = view(photograph(seed), Objects(np.array([1, 2, 3]), masks), draws)
        assert sample["image"].shape == (3, 32, 32) and len(sample["boxes"]) == len(sample["labels"]) == len(
            sample["masks"]
        )
