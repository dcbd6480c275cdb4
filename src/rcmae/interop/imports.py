"""Conversion of the checkpoints of others to folders that rcmae and timm load."""

from pathlib import Path

from ..errors import ConfigError
from ..methods.mae import MAESettings
from ..models.backbone import IMAGENET, Statistics
from ..models.classifier import Classifier
from .autoencoders import mae_settings
from .huggingface import model_type, read_folder
from .load import load, load_classifier
from .official import LICENSE_NOTE, MAE_LICENSE, license_of, write_import
from .timm_export import export
from .weights import read_weights


def import_weights(
    source: Path,
    out: Path,
    heads: int | None = None,
    decoder_heads: int | None = None,
    size: tuple[int, int] | None = None,
) -> list[str]:
    """Convert a checkpoint of MAE or RC-MAE (a file, or a folder of transformers) to a folder `out` that
    `load` and timm load, and return a summary in lines.

    With a decoder, it has the layout of a run: recipe.toml, weights.safetensors with encoders and decoders by
    our names (student.*, teacher.*), and export/. An encoder alone is written to export/student, a classifier
    to export/classifier. `heads`, `decoder_heads` and `size` (height, width) are for files, whose weights do
    not reveal them. Raises CheckpointError, ConfigError (the folder exists) or StorageError.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another folder with --out")
    settings = MAESettings()
    statistics: Statistics = IMAGENET
    pair = None if heads is None or decoder_heads is None else (heads, decoder_heads)
    if source.is_dir() and model_type(source):
        folder = read_folder(source)
        weights, pair, size, license = folder.weights, folder.heads, folder.size, folder.license
        settings, statistics = mae_settings(folder), folder.statistics or IMAGENET
    elif source.is_dir():
        raise ConfigError(f"{source} is not a folder of transformers; `rcmae export` converts others")
    else:
        weights = read_weights(source)
        license = license_of(source, weights)
    note = [LICENSE_NOTE] * (license == MAE_LICENSE)
    if any(name.startswith("decoder_embed.") for name in weights.student):
        if (heads is None) != (decoder_heads is None):
            raise ConfigError("give --heads and --decoder-heads together")
        return write_import(weights, source, out, pair, size, settings, statistics, license) + note
    classified = load_classifier(source, heads=heads, size=size)
    network = classified[0] if classified else load(source, heads=heads, size=size)
    path = out / "export" / ("classifier" if isinstance(network, Classifier) else "student")
    export(network, path, {"source": source.name}, classes=classified[1] if classified else ())
    return [
        f"{source}: "
        + (f"a classifier of {network.vit.num_classes} classes" if classified else "an encoder"),
        f"wrote {out}",
        f'load it: timm.create_model("local-dir:{path}", pretrained=True)',
    ]
