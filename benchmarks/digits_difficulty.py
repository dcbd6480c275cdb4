"""How hard is the bundled set? `python -m benchmarks.digits_difficulty [--epochs N]`.

Linear probes of raw pixels and of a randomly initialized encoder, a small supervised network trained on all
images, and the time to draw an image. Writes results/digits_difficulty.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks import ROOT, markdown
from rcmae.data.digits import GENERATOR, DigitsSource, scene, set_hash
from rcmae.data.sources import open_source
from rcmae.engine.run import describe_machine
from rcmae.methods import METHODS
from rcmae.methods.recipes import load_recipe
from rcmae.models.backbone import IMAGENET
from rcmae.tasks.probe import accuracies, probe_set


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


def table(results: dict[str, Any]) -> str:
    """The baselines of the bundled set."""
    rows = [
        ["linear probe on raw pixels", f"{results['raw_pixels']:.1f} %"],
        ["linear probe on a randomly initialized encoder", f"{results['random_init']:.1f} %"],
        [
            f"four convolutions trained with labels, {results['epochs']} epochs",
            f"{results['supervised']:.1f} %",
        ],
        ["time to draw an image", f"{results['ms_per_image']:.2f} ms"],
        ["version, hash", f"{results['generator']}, `{results['set_hash'][:16]}`"],
    ]
    return markdown.table(["", ""], rows)


def contact_sheet(path: Path) -> None:
    """A picture of single digits above scenes."""
    singles = DigitsSource("train", 64).images.reshape(4, 16, 32, 32, 3)
    singles = singles.transpose(0, 2, 1, 3, 4).reshape(128, 512, 3)
    scenes = np.concatenate([scene(0, "train", i)[0] for i in range(4)], 1)
    sheet = Image.fromarray(np.concatenate([singles, np.full((8, 512, 3), 255, np.uint8), scenes]))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(path, optimize=True)


def main() -> None:
    """Measure, write JSON and the contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    epochs = parser.parse_args().epochs
    recipe = load_recipe("bundled")
    start = time.perf_counter()
    train = open_source("bundled:digits", size=recipe.images.size)
    milliseconds = 1000 * (time.perf_counter() - start) / len(train)
    assert isinstance(train, DigitsSource)
    torch.manual_seed(recipe.seed)
    method = METHODS["mae"](recipe, *IMAGENET)
    probes = probe_set(train, recipe)
    assert probes is not None, "the bundled set has labels"
    cpu = torch.device("cpu")
    results = {
        "raw_pixels": accuracies(probes.pixels())["linear"],
        "random_init": accuracies(probes.backbone(method.backbone(), cpu, "fp32"))["linear"],
        "supervised": supervised(train, DigitsSource("test", 4000), epochs),
        "epochs": epochs,
        "ms_per_image": milliseconds,
        "generator": GENERATOR,
        "set_hash": set_hash(),
        "machine": describe_machine(cpu, "fp32"),
    }
    (ROOT / "results" / "digits_difficulty.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    contact_sheet(ROOT / "docs" / "img" / "digits.png")


if __name__ == "__main__":
    main()
