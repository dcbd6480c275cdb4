"""The layouts of the official MAE and RC-MAE checkpoints: names in, names out.

Their encoder has timm's parameter names at the top level and their decoder the prefix `decoder_`.
"""

import argparse
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..config import Images, to_toml
from ..engine.checkpoint import write_folder
from ..errors import CheckpointError, ConfigError, first_line
from ..methods.mae import MAERecipe
from ..methods.mean_teacher import TeacherSettings
from ..methods.rcmae import RCMAERecipe
from ..models.autoencoder import SIZES, Autoencoder, AutoencoderNetwork, build
from ..models.backbone import IMAGENET, Backbone
from ..models.classifier import Classifier
from .timm_export import PLAIN, export

State = dict[str, Tensor]

_DECODER = {"decoder_embed": "embed", "decoder_blocks": "blocks", "decoder_norm": "norm", "decoder_pred": "pred"}


def ours(name: str) -> str:
    """The name of an official parameter in `Autoencoder`."""
    head, dot, tail = name.partition(".")
    if name == "mask_token":
        return "decoder.mask_token"
    return f"decoder.{_DECODER[head]}{dot}{tail}" if head in _DECODER else f"encoder.vit.{name}"


def load_official(model: nn.Module, state: State) -> None:
    """Fill `model` (an Autoencoder) from official names, all or nothing. Raises CheckpointError naming what does not fit."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    new = {ours(name): value for name, value in state.items() if name != "decoder_pos_embed"}
    own = model.state_dict()
    problems = [f"lacks {k}" for k in own.keys() - new.keys()] + [f"has unknown {k}" for k in new.keys() - own.keys()]
    problems += [
        f"{k} is {tuple(new[k].shape)}, not {tuple(own[k].shape)}" for k in own.keys() & new.keys() if new[k].shape != own[k].shape
    ]
    if problems:
        raise CheckpointError(f"these weights do not fit the model: {'; '.join(sorted(problems)[:4])}")
    model.load_state_dict(new)


@dataclass(frozen=True)
class Official:
    """What an official file holds: weights of the student, of the teacher (RC-MAE only), and what it says of itself."""

    student: State
    teacher: State | None
    args: dict[str, Any]
    epoch: Any


def read_pth(path: Path) -> Official:
    """Read an official `.pth`, running no code from it: tensors, plain containers and argparse.Namespace only.

    Raises CheckpointError when the file is missing, is no such checkpoint, or holds anything else.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of files that are then refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise CheckpointError(f"{path} does not exist") from e
    except pickle.UnpicklingError as e:
        raise CheckpointError(f"{path} holds Python objects other than weights and was not read, for safety") from e
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as e:
        raise CheckpointError(f"{path} is not a checkpoint of torch: {first_line(e)}") from e
    if not isinstance(content, dict) or not ({"student", "model"} & content.keys()):
        found = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} has neither `student` nor `model` (found: {found}); is it an MAE or RC-MAE checkpoint?")
    args = content.get("args")
    return Official(
        student=_weights(content.get("student", content.get("model")), path),
        teacher=_weights(content["teacher"], path) if "teacher" in content else None,
        args=vars(args) if isinstance(args, argparse.Namespace) else {},
        epoch=content.get("epoch"),
    )


def _weights(state: Any, path: Path) -> State:
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{path}: its weights are not a dict of named tensors")
    broken = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise CheckpointError(f"{path}: {broken[0]} is not finite; it is of no use")
    return {k.removeprefix("module."): v for k, v in state.items()}


def shape_of(state: State, heads: tuple[int, int] | None = None) -> tuple[Images, AutoencoderNetwork]:
    """The images and the network that official weights were made for, read off their shapes.

    Attention heads leave no trace in the shapes: they come from the named size of the same widths, or from `heads`
    (encoder, decoder). Raises CheckpointError when neither says.
    """
    try:
        width, channels, patch, _ = state["patch_embed.proj.weight"].shape
        patches = state["pos_embed"].shape[1] - 1
        decoder_width = state["decoder_embed.weight"].shape[0]
        depth, decoder_depth = (1 + max(int(k.split(".")[1]) for k in state if k.startswith(p)) for p in ("blocks.", "decoder_blocks."))
    except KeyError as e:
        raise CheckpointError(f"the weights lack {e}; an encoder without its decoder is not a pre-training checkpoint") from e
    except (ValueError, IndexError) as e:
        raise CheckpointError("the names and shapes of the weights are not those of an official MAE or RC-MAE checkpoint") from e
    if heads is not None and min(heads) < 1:
        raise ConfigError(f"heads must be 1 or more, not {min(heads)}")
    if heads is None:
        known = {(s.encoder[0], s.decoder[0]): (s.encoder[2], s.decoder[2]) for s in SIZES.values()}
        if (width, decoder_width) not in known:
            raise CheckpointError(
                f"widths {width} and {decoder_width} are of no named size, and heads cannot be read off weights; "
                "give --heads and --decoder-heads"
            )
        heads = known[width, decoder_width]
    network = AutoencoderNetwork(
        model="vit_base_patch16", patch=patch, width=width, depth=depth, heads=heads[0],
        decoder_width=decoder_width, decoder_depth=decoder_depth, decoder_heads=heads[1],
    )  # fmt: skip
    for name, s in SIZES.items():
        full = (s.patch, s.encoder, s.decoder)
        if full == (patch, (width, depth, heads[0]), (decoder_width, decoder_depth, heads[1])):
            network = AutoencoderNetwork(model=name)
    return Images(size=patch * round(patches**0.5), channels=channels), network


def autoencoder(state: State, heads: tuple[int, int] | None = None) -> tuple[Autoencoder, Images, AutoencoderNetwork]:
    """Official weights as our model, with the settings that build it."""
    images, network = shape_of(state, heads)
    model = build(images, network)
    load_official(model, state)
    return model, images, network


def official_backbone(file: Path, which: str = "teacher", heads: int | None = None) -> Backbone:
    """The encoder of an official `.pth`, with its decoder or without (as MAE's published encoders). Raises CheckpointError.

    The student is what there is where there is no teacher. Attention heads: see `plain_backbone`.
    """
    official = read_pth(file)
    state = official.teacher if which == "teacher" and official.teacher is not None else official.student
    return plain_backbone({k: v for k, v in state.items() if not k.startswith("decoder_") and k != "mask_token"}, file, heads)


def plain_backbone(state: State, source: Path, heads: int | None = None) -> Backbone:
    """An encoder from weights alone, under timm's names; a head is left out. Raises CheckpointError naming what does not fit.

    Weights do not tell their attention heads: without `heads`, those of the named size of this width are taken, else one for 64 channels.
    Nor do they tell the statistics of their images: ImageNet's are taken.
    """
    state = {k: v for k, v in state.items() if not k.startswith(("head.", "fc_norm."))}
    return Backbone(_plain_vit(state, source, heads, num_classes=0, global_pool=""), *IMAGENET)


def plain_classifier(state: State, source: Path, heads: int | None = None) -> Classifier | None:
    """Likewise a classifier, as MAE's fine-tuned checkpoints are; None for weights without a head."""
    if "head.weight" not in state or state["head.weight"].ndim != 2:
        return None
    pool = {"global_pool": "avg", "fc_norm": True} if "fc_norm.weight" in state else {"global_pool": "token"}
    return Classifier(_plain_vit(state, source, heads, num_classes=len(state["head.weight"]), **pool), *IMAGENET)


def _plain_vit(state: State, source: Path, heads: int | None, **head: Any) -> VisionTransformer:
    try:
        width, channels, patch, _ = state["patch_embed.proj.weight"].shape
        front = sum(state[k].shape[1] for k in ("cls_token", "reg_token") if k in state)
        grid = round((state["pos_embed"].shape[1] - front) ** 0.5)
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    except (KeyError, ValueError, IndexError) as e:
        raise CheckpointError(f"{source} does not hold a Vision Transformer under timm's names: {first_line(e)} is missing or odd") from e
    if channels != 3:
        raise CheckpointError(f"{source} is for {channels} channels, and does not say by which mean and deviation; export it from its run")
    if heads is not None and heads < 1:
        raise ConfigError(f"heads must be 1 or more, not {heads}")
    heads = heads or {s.encoder[0]: s.encoder[2] for s in SIZES.values()}.get(width) or width // 64
    if not heads or width % heads:
        raise CheckpointError(f"{source} has width {width}; its attention heads cannot be read off the weights: give --heads")
    vit = timm.create_model(
        PLAIN, img_size=patch * grid, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, class_token="cls_token" in state,
        reg_tokens=state["reg_token"].shape[1] if "reg_token" in state else 0,
        final_norm="norm.weight" in state or "fc_norm.weight" in state, **head,
    )  # fmt: skip
    own = vit.state_dict()
    problems = [f"lacks {k}" for k in own.keys() - state.keys()] + [f"has unknown {k}" for k in state.keys() - own.keys()]
    problems += [f"{k} is {tuple(v.shape)}, not {tuple(own[k].shape)}" for k, v in state.items() if k in own and v.shape != own[k].shape]
    if problems:
        raise CheckpointError(f"{source} is not a plain Vision Transformer: {'; '.join(sorted(problems)[:4])}")
    vit.load_state_dict({k: v.float() for k, v in state.items()})
    return vit


def import_pth(file: Path, out: Path, heads: tuple[int, int] | None = None) -> list[str]:
    """Turn an official `.pth` into a folder laid out like a run: recipe.toml, weights.safetensors, export/.

    `weights.safetensors` holds encoders and decoders under our names (student.*, teacher.*). Returns what was done, in lines.
    Raises CheckpointError, ConfigError (the folder exists) or StorageError.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another folder with --out")
    official = read_pth(file)
    model, images, network = autoencoder(official.student, heads)
    if images.channels != 3:
        raise CheckpointError(f"{file} is for {images.channels} channels, and does not say by which mean and deviation; 3 can be imported")
    models = {"student": model}
    if official.teacher is not None:
        models["teacher"], *_ = autoencoder(official.teacher, heads)
    recipe = MAERecipe(images=images, network=network)
    if official.teacher is not None:
        recipe = RCMAERecipe(images=images, network=network, teacher=TeacherSettings(schedule="constant"))
    weights = {f"{who}.{k}": v.contiguous() for who, m in models.items() for k, v in m.state_dict().items()}
    write_folder(out, {"recipe.toml": to_toml(recipe).encode(), "weights.safetensors": save(weights)})
    for who, m in models.items():
        about = {
            "method": recipe.method,
            "network": who,
            "source": file.name,
            "epoch": official.epoch if isinstance(official.epoch, int) else None,
        }
        export(Backbone(m.encoder.vit, *IMAGENET), out / "export" / who, about)
    width, depth = model.encoder.width, len(model.encoder.vit.blocks)
    best = out / "export" / ("teacher" if official.teacher is not None else "student")
    return [
        f"{file}: official {'RC-MAE (student and teacher)' if official.teacher is not None else 'MAE'}, "
        f"ViT {width} x {depth}, patch {model.encoder.patch}, {images.size} px, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        f"wrote {out}",
        f'load it: timm.create_model("local-dir:{best}", pretrained=True)',
    ]
