"""The model card of an exported network: what it is, how it was trained and measured, how to load it."""

import re
import tomllib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .. import __version__
from ..config import how_many
from ..data.views import center_share
from ..engine.console import clock
from ..engine.metrics import BASELINES, KINDS, of_kind, read_metrics
from ..engine.run import read_json
from ..models.autoencoder import Autoencoder
from ..models.backbone import Backbone
from ..models.blueprint import heads_of
from ..models.classifier import Classifier
from .autoencoders import run_of


def card(
    source: str,
    to: str,
    network: Backbone | Classifier,
    metadata: dict[str, Any],
    model: Autoencoder | None = None,
    labels: bool = False,
) -> bytes:
    """README.md of a network exported from `source` in the format `to`, with what is known of its run;
    `model` is its auto-encoder, if that is exported, and `labels` whether there is a labels.json."""
    run = run_of(Path(source)) if Path(source).exists() else None
    machine = read_json(run / "machine.json") if run else {}
    lines = read_metrics(run) if run else []
    recipe = (run / "recipe.toml").read_text(encoding="utf-8") if run else ""
    settings = tomllib.loads(recipe)
    trained_on = machine.get("data")
    if isinstance(trained_on, dict):  # of a run of fine-tuning
        trained_on = trained_on.get("train")
    vit = network.vit
    seconds = [line["seconds"] for line in of_kind(lines, "train") if "seconds" in line]
    environment = Environment(
        loader=PackageLoader("rcmae.interop", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template("card.md.j2").render(
        version=__version__,
        to=to,
        name=run.resolve().name if run else Path(source).name,
        summary=_summary(network, model, metadata),
        resizing=_resizing(network.shape),
        classes=vit.num_classes,
        labels=labels,
        with_decoder=model is not None,
        networks=metadata.get("networks", []),
        method=metadata.get("method") or settings.get("method", ""),
        width=vit.embed_dim,
        channels=network.channels,
        height=network.shape[0],
        side=network.shape[1],
        mean=[round(v, 6) for v in network.statistics[0]],
        std=[round(v, 6) for v in network.statistics[1]],
        license=network.license,
        recipe=_without_folders(recipe) if machine else "",
        recipe_hash=metadata.get("recipe_hash") or machine.get("recipe_hash", ""),
        data=Path(str((machine.get("about") or {}).get("data") or settings.get("data", ""))).name
        if machine
        else "",
        data_hash=_hash(metadata.get("data"), trained_on),
        images=machine.get("images") or machine.get("train_images"),
        backbone=metadata.get("backbone", ""),
        initial=Path(str((machine.get("initial_weights") or {}).get("name", ""))).name,
        step=metadata.get("step"),
        batch=settings.get("optim", {}).get("batch_size") or settings.get("batch_size"),
        time=clock(seconds[-1]) if seconds else "",
        device=machine.get("cpu") if machine.get("device") == "cpu" else machine.get("device"),
        cores=machine.get("cores") if machine.get("device") == "cpu" else None,
        results=_results(run, lines, machine) if run else [],
    )
    return text.encode()


def _summary(network: Backbone | Classifier, model: Autoencoder | None, metadata: dict[str, Any]) -> str:
    """What the network is, in sentences."""
    vit, (height, width) = network.vit, network.shape
    what = "A backbone that turns images into features"
    if vit.num_classes:
        what = f"A classifier of {how_many(vit.num_classes, 'class')}"
    elif model is not None:
        what = "A masked auto-encoder with its decoder"
    patch = " x ".join(map(str, dict.fromkeys(vit.patch_embed.patch_size)))
    count = sum(p.numel() for p in (model or vit).parameters())
    parameters = f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"
    named = "network" in metadata and not vit.num_classes
    networks = metadata.get("networks") or [metadata.get("network")] * named
    blocks, heads = how_many(len(vit.blocks), "block"), how_many(heads_of(vit), "head")
    text = (
        f"{what}: a Vision Transformer of width {vit.embed_dim}, with {blocks} of {heads} and patch {patch}"
    )
    text += f", {parameters} parameters, for images of {network.channels} x {height} x {width} px."
    text += f" It has the weights of the {' and the '.join(networks)}." if networks else ""
    return text + (f" Imported from {metadata['source']}." if metadata.get("source") else "")


def _resizing(shape: tuple[int, int]) -> str:
    """How an image becomes one of this height and width."""
    (height, width), share = shape, center_share(shape)
    if height != width:
        return f"Resize (bicubic) and crop the center of {height} x {width} px."
    if share == 1:
        return f"Resize the shorter side to {height} px (bicubic) and crop the center."
    return f"Resize the shorter side to {height / share:.0f} px (bicubic) and crop the center of {height} px."


def _hash(*values: Any) -> str:
    """The beginning of the first value that is a hash; empty if none is."""
    return next((str(v)[:16] for v in values if re.fullmatch("[0-9a-f]{16,}", str(v))), "")


def _without_folders(recipe: str) -> str:
    """A recipe without the folders of its data and weights, which may name users."""
    return re.sub(r'(?m)^(data|val|init) = ".*[/\\\\]([^/\\\\"]+)"$', r'\1 = "\2"', recipe)


def _results(run: Path, lines: list[dict[str, Any]], machine: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured: the measurement, the network, and the result with the number of images."""
    rows = []
    baseline = next(iter(of_kind(lines, "baseline")), {})
    probes = of_kind(lines, "probe")
    for line in (baseline, probes[-1] if probes else {}):
        for network, scores in line.items():
            if isinstance(scores, dict):
                label = BASELINES.get(network, network)
                rows += [
                    (KINDS[k], label, f"{v:.1f} %") for k, v in scores.items() if k in KINDS and v is not None
                ]
    rows.sort(key=lambda row: [*KINDS.values()].index(row[0]))
    if scored := of_kind(lines, "val"):
        accuracy, images = scored[-1]["accuracy"], machine.get("test_images", 0)
        rows.append(("accuracy", "classifier", f"{accuracy:.1f} % of {images:,} test images"))
    for file in sorted([*run.glob("evaluate/*.json"), *run.glob("evaluate/*/evaluate/*.json")]):
        record = read_json(file)
        if "top1" in (record.get("metrics") or {}):
            result = f"{record['metrics']['top1']:.1f} % of {record.get('test_images', 0):,} images"
            rows.append((f"{record['task']}, {Path(str(record['data'])).name}", record["network"], result))
    return rows
