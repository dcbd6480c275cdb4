"""How hard is the embedded set? `python -m benchmarks.digits_difficulty [--epochs N]` writes results/digits_difficulty.json.

Raw pixels and an untrained encoder under a linear probe, a small supervised network on all training images, and the time to
draw one.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from rcmae.data.digits import GENERATOR, DigitsSource, scene, set_hash
from rcmae.data.sources import open_source
from rcmae.engine.run import describe_machine
from rcmae.methods import METHODS
from rcmae.methods.recipes import load_recipe
from rcmae.models.backbone import IMAGENET
from rcmae.tasks.probe import percent, probe_set

ROOT = Path(__file__).parent.parent


def supervised(train: DigitsSource, test: DigitsSource, epochs: int) -> float:
    """Accuracy in percent of four convolutions trained with labels."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in ((3, 32), (32, 64), (64, 64), (64, 64)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 4, 10))
    x, y = (torch.from_numpy(s.images).permute(0, 3, 1, 2).float() / 255 for s in (train, test))
    labels = torch.from_numpy(train.labels)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    steps = epochs * (len(x) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for part in torch.randperm(len(x))[: len(x) // 128 * 128].split(128):
            nn.functional.cross_entropy(net(x[part]), labels[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with torch.no_grad():
        return 100 * (net.eval()(y).argmax(1).numpy() == test.labels).mean().item()


def contact_sheet(path: Path) -> None:
    """Single digits above, scenes below."""
    singles = DigitsSource("train", 64).images.reshape(4, 16, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(128, 512, 3)
    scenes = np.concatenate([scene(0, "train", i)[0] for i in range(4)], 1)
    sheet = Image.fromarray(np.concatenate([singles, np.full((8, 512, 3), 255, np.uint8), scenes]))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(path, optimize=True)


def main() -> None:
    """Measure, write JSON and the contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    epochs = parser.parse_args().epochs
    recipe = load_recipe("embedded")
    start = time.perf_counter()
    train = open_source("embedded:digits", size=recipe.images.size)
    milliseconds = 1000 * (time.perf_counter() - start) / len(train)
    torch.manual_seed(recipe.seed)
    method = METHODS["mae"](recipe, *IMAGENET)
    probes = probe_set(train, recipe)
    cpu = torch.device("cpu")
    result = {
        "raw_pixels": percent(probes.pixels())["linear"], "untrained": percent(probes.backbone(method.backbone(), cpu, "fp32"))["linear"],
        "supervised": supervised(train, DigitsSource("test", 4000), epochs), "epochs": epochs, "ms_per_image": milliseconds,
        "generator": GENERATOR, "set_hash": set_hash(), "machine": describe_machine(cpu, "fp32"),
    }  # fmt: skip
    (ROOT / "results" / "digits_difficulty.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    contact_sheet(ROOT / "docs" / "img" / "digits.png")


if __name__ == "__main__":
    main()
