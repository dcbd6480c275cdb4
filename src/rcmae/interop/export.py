"""Export of networks in the formats of other libraries, each with a model card."""

import json
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors.torch import save

from ..engine.checkpoint import write_folder
from ..errors import ConfigError
from ..methods.mae import MAESettings
from ..models.autoencoder import Autoencoder
from ..models.backbone import Backbone
from ..models.blueprint import difference, heads_of
from ..models.classifier import Classifier
from . import huggingface, programs, timm_export
from .autoencoders import load_autoencoders
from .card import card
from .load import LOCAL, load, load_classifier, metadata_of
from .names import State
from .official import autoencoder, official_state

Format = Literal["timm", "hf", "torch-export", "onnx", "official"]


def export(
    source: str | Path,
    to: Format,
    out: str | Path,
    network: Literal["student", "teacher"] | None = None,
    decoder: bool = False,
    heads: int | None = None,
    decoder_heads: int | None = None,
    size: tuple[int, int] | None = None,
) -> Path:
    """Write a network as a new folder `out` with a model card, README.md, and return the folder.

    `source` is anything that `load` takes, or a run of fine-tuning; a network with a classification head is
    exported with it. `to` is a format: "timm"; "hf", for transformers; "torch-export" and "onnx", programs
    that take images [b, c, h, w] in 0 to 1; "official", the names of the MAE and RC-MAE code. With `decoder`,
    "hf" is a ViTMAEForPreTraining. `network` is the teacher by default, if there is one; "official" has both.
    `heads`, `decoder_heads` and `size` (height, width) are for bare weights, which do not reveal them.

    Raises ConfigError for a network that the format does not have, CheckpointError or StorageError.
    """
    source, out = str(source), Path(out)
    if to not in get_args(Format):
        raise ConfigError(f"--to must be one of {', '.join(get_args(Format))}, not {to!r}")
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another folder with --out")
    if decoder and to not in ("hf", "official"):
        raise ConfigError(f"--decoder is for --to hf (official always has it), not for {to}")
    if to == "official" or decoder:
        return _with_decoder(source, to, out, network, heads, decoder_heads, size)
    which = network or "teacher"
    metadata, classes = metadata_of(source, which), list[str]()
    model: Backbone | Classifier
    if classifier := load_classifier(source, which, heads, size):
        model, classes = classifier
    else:
        model = load(source, which, heads, size=size)
    metadata = _kept(metadata, model)
    if to == "timm":
        files = timm_export.files(model, metadata, classes=classes)
    elif to == "hf":
        files = huggingface.files(model, metadata, classes)
    else:
        files = programs.torch_program(model) if to == "torch-export" else programs.onnx_program(model)
        if classes:
            files["labels.json"] = json.dumps(classes, indent=1).encode()
    readme = card(source, to, model, metadata, labels="labels.json" in files)
    write_folder(out, files | {"README.md": readme})
    return out


def _with_decoder(
    source: str,
    to: Format,
    out: Path,
    network: Literal["student", "teacher"] | None,
    heads: int | None,
    decoder_heads: int | None,
    size: tuple[int, int] | None,
) -> Path:
    if (heads is None) != (decoder_heads is None):
        raise ConfigError("give --heads and --decoder-heads together")
    pair = None if heads is None or decoder_heads is None else (heads, decoder_heads)
    models, settings = load_autoencoders(Path(source.removeprefix(LOCAL)), pair, size)
    if network is not None and network not in models:
        raise ConfigError(f"{source} has no {network}; it has the {' and '.join(models)}")
    which = network or [*models][-1]
    backbone = load(source, which, heads, size=size)
    metadata = _kept(metadata_of(source, which), backbone)
    if to == "official":
        chosen = {which: models[which]} if network or len(models) == 1 else models
        metadata["networks"] = [*chosen]
        files = {"model.safetensors": save(_official(chosen))}
    else:
        files = _mae(backbone, metadata, models[which], settings)
    write_folder(out, files | {"README.md": card(source, to, backbone, metadata, models[which])})
    return out


def _mae(
    backbone: Backbone, metadata: dict[str, Any], model: Autoencoder, settings: MAESettings
) -> dict[str, bytes]:
    normalized = settings.target == "normalized"
    return huggingface.files(backbone, metadata, (), model, settings.mask_ratio, normalized)


def _official(models: dict[str, Autoencoder]) -> State:
    """The weights of one network by their official names, or those of both after "student." and
    "teacher."."""
    tensors: State = {}
    for name, model in models.items():
        state = official_state(model)
        heads = heads_of(model.encoder), heads_of(model.decoder)
        again, *_ = autoencoder(state, heads, model.encoder.vit.patch_embed.img_size)
        if different := difference(model, again):
            raise ConfigError(f"the official code would build another network: {different}")
        tensors |= {f"{name}." * (len(models) > 1) + k: v for k, v in state.items()}
    return tensors


def _kept(metadata: dict[str, Any], model: Backbone | Classifier) -> dict[str, Any]:
    """The metadata with names instead of paths of this machine, and with the license of the weights, if
    it is another's."""
    paths = {key: Path(str(metadata[key])).name for key in ("backbone", "data", "val") if metadata.get(key)}
    return metadata | paths | ({"license": model.license} if model.license else {})
