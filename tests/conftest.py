"""One thread per worker. While the tests run, the shape annotations of rcmae.methods, and of all that it
imports, are checked."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

with install_import_hook("rcmae", "beartype.beartype"):
    import rcmae.methods

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import default_collate

import rcmae.config as c
from rcmae.data.views import rng
from rcmae.methods.recipes import recipe_type
from rcmae.report import curves

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    map(str, (ROOT, ROOT / "src"))
)  # child processes of tests import this checkout
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Undrawn(curves.Figure):
    """An empty figure, for pages whose figures are not tested: drawing those of a run would take longer than
    its training."""

    def savefig(self, file, **options) -> None:
        file.write("<svg></svg>")

    def draw_without_rendering(self) -> None:
        """No layout either."""


Drawn, curves.Figure = curves.Figure, Undrawn


@pytest.fixture(scope="module")
def drawn():
    """Draw real figures, from the first test that requests this to the end of its module, which may share
    pages."""
    curves.Figure = Drawn
    yield
    curves.Figure = Undrawn


def small(method: str = "rcmae", **changes) -> c.Recipe:
    """A recipe that trains in a second: 16 px, patch 4, two blocks. Keyword arguments replace fields of any
    section."""
    base = recipe_type(method)(
        steps=6,
        images=c.Images(size=16, crop_scale=(1.0, 1.0), flip=False),
        optim=c.Optim(batch_size=8, base_lr=0.03),
        probe=c.Probe(probes=0),
    )
    values = {"target_eps": 0.1, "local_crops": 2, "local_size": 8}
    values |= {"model": "vit_tiny_small_images", "width": 24, "depth": 2, "heads": 2}
    values |= {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2}
    values |= {"prototypes": 12, "head_width": 20, "embedding": 8}
    if changes.get("schedule", c.flat(base).get("schedule")) == "half-life":
        values["half_life"] = "2 steps"
    return c.changed(base, **{k: v for k, v in values.items() if k in c.flags(type(base))} | changes)


def method_for(recipe: c.Recipe, mean: float = 0.5, std: float = 0.25):
    """The method of a recipe, with weights from seed 0."""
    torch.manual_seed(0)
    channels = recipe.images.channels
    return rcmae.methods.METHODS[recipe.method](recipe, (mean,) * channels, (std,) * channels)


def batch_for(method, size: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random images and orders that fit a method."""
    g = torch.Generator().manual_seed(seed)
    h, w = method.recipe.images.shape
    if not isinstance(method, rcmae.methods.MAE):  # crops: the views of the method applied to random images
        draws = np.random.default_rng(seed)
        pictures = [
            draws.integers(0, 256, (h + 8, w + 4, method.recipe.images.channels), dtype=np.uint8)
            for _ in range(size)
        ]
        return default_collate(
            [method.views()(picture, rng(seed, 0, i)) for i, picture in enumerate(pictures)]
        )
    images = torch.randint(
        0, 256, (size, method.recipe.images.channels, h, w), dtype=torch.uint8, generator=g
    )
    batch = {
        "image": images,
        "order": torch.stack([torch.randperm(method.patches, generator=g) for _ in range(size)]),
    }
    if getattr(method.views(), "orders", ())[1:]:
        batch["teacher_order"] = torch.stack(
            [torch.randperm(method.patches, generator=g) for _ in range(size)]
        )
    return batch


@pytest.fixture(scope="session")
def reference() -> dict[str, torch.Tensor]:
    """The numbers recorded from the official RC-MAE code."""
    return load_file(GOLDEN / "rcmae_reference.safetensors")


def stop_at(monkeypatch, trainer: type, *steps: int) -> None:
    """Send a signal when a trainer has made one of these steps."""
    update = trainer.update

    def signaled(self, t):
        applied = update(self, t)
        if t.step + 1 in steps:
            signal.raise_signal(signal.SIGTERM)
        return applied

    monkeypatch.setattr(trainer, "update", signaled)


if mutation := os.environ.get("RCMAE_MUTATION"):  # see tests/mutate.py
    from tests.mutations import apply

    apply(mutation)
