"""One thread a worker; the shape annotations of methods, and of all that they import, are checked while the tests run."""

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
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "src")))  # what tests start is this checkout
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Undrawn(curves.Figure):
    """Of pages that nobody looks at: drawing those of a run takes longer than its training in most tests."""

    def savefig(self, file, **how) -> None:
        file.write("<svg></svg>")


Drawn, curves.Figure = curves.Figure, Undrawn


@pytest.fixture(scope="module")
def drawn():
    """Figures as they are, from the first test that asks for them to the end of its module: pages are shared in one."""
    curves.Figure = Drawn
    yield
    curves.Figure = Undrawn


def small(method: str = "rcmae", **changes) -> c.Recipe:
    """A recipe of a second: 16 px, patch 4, two blocks. Keyword arguments replace fields of any section."""
    base = recipe_type(method)(
        steps=6, images=c.Images(size=16, crop_scale=(1.0, 1.0), flip=False),
        optim=c.Optim(batch_size=8, base_lr=0.03), probe=c.Probe(probes=0),
    )  # fmt: skip
    own = {"target_eps": 0.1, "local_crops": 0 if method == "mocov3" else 2, "local_size": 8}
    own |= {"model": "vit_tiny_small_images", "width": 24, "depth": 2, "heads": 2}
    own |= {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2}
    own |= {"prototypes": 12, "head_width": 20, "embedding": 8}
    if changes.get("schedule", c.flat(base).get("schedule")) == "half-life":
        own["half_life"] = "2 steps"
    return c.changed(base, **{k: v for k, v in own.items() if k in c.flags(type(base))} | changes)


def method_for(recipe: c.Recipe, mean: float = 0.5, std: float = 0.25):
    """The method of a recipe with weights from seed 0."""
    torch.manual_seed(0)
    channels = recipe.images.channels
    return rcmae.methods.METHODS[recipe.method](recipe, (mean,) * channels, (std,) * channels)


def batch_for(method, size: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random images and orders that fit a method."""
    g = torch.Generator().manual_seed(seed)
    h, w = method.recipe.images.shape
    if not hasattr(method, "visible"):  # crops: what the method's own views make of random images
        draws = np.random.default_rng(seed)
        pictures = [draws.integers(0, 256, (h + 8, w + 4, method.recipe.images.channels), dtype=np.uint8) for _ in range(size)]
        return default_collate([method.views()(picture, rng(seed, 0, i)) for i, picture in enumerate(pictures)])
    images = torch.randint(0, 256, (size, method.recipe.images.channels, h, w), dtype=torch.uint8, generator=g)
    batch = {"image": images, "order": torch.stack([torch.randperm(method.patches, generator=g) for _ in range(size)])}
    if getattr(method.views(), "orders", ())[1:]:
        batch["teacher_order"] = torch.stack([torch.randperm(method.patches, generator=g) for _ in range(size)])
    return batch


@pytest.fixture(scope="session")
def reference() -> dict[str, torch.Tensor]:
    """The numbers recorded from the official RC-MAE code."""
    return load_file(GOLDEN / "rcmae_reference.safetensors")


def stop_at(monkeypatch, trainer: type, *steps: int) -> None:
    """A signal arrives when these steps of a trainer are made."""
    update = trainer.update

    def signaled(self, t):
        applied = update(self, t)
        if t.step + 1 in steps:
            signal.raise_signal(signal.SIGTERM)
        return applied

    monkeypatch.setattr(trainer, "update", signaled)


if broken := os.environ.get("RCMAE_BREAK"):
    from tests.breaks import BREAKS, put

    put(*BREAKS[broken][:2])
