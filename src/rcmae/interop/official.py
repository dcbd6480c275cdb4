"""Reading official MAE and RC-MAE checkpoints.

Their encoder has timm's parameter names at the top level, and their decoder the prefix `decoder_`.
"""

import argparse
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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

_DECODER = {
    "decoder_embed": "embed",
    "decoder_blocks": "blocks",
    "decoder_norm": "norm",
    "decoder_pred": "pred",
}


def our_name(name: str) -> str:
    """The name in `Autoencoder` of an official parameter."""
    prefix, dot, rest = name.partition(".")
    if name == "mask_token":
        return "decoder.mask_token"
    return f"decoder.{_DECODER[prefix]}{dot}{rest}" if prefix in _DECODER else f"encoder.vit.{name}"


def load_official(model: nn.Module, state: State) -> None:
    """Load official weights into `model`, an Autoencoder. Raises CheckpointError, which names what does not
    fit, without changing the model."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    state = {our_name(name): value for name, value in state.items() if name != "decoder_pos_embed"}
    if problems := _mismatches(state, model.state_dict()):
        raise CheckpointError(f"these weights do not fit the model: {problems}")
    model.load_state_dict(state)


def _mismatches(state: State, expected: State) -> str:
    """The first differences in names and shapes; empty if there are none."""
    problems = [f"lacks {k}" for k in expected.keys() - state.keys()]
    problems += [f"has unknown {k}" for k in state.keys() - expected.keys()]
    problems += [
        f"{k} is {tuple(state[k].shape)}, not {tuple(expected[k].shape)}"
        for k in expected.keys() & state.keys()
        if state[k].shape != expected[k].shape
    ]
    return "; ".join(sorted(problems)[:4])


@dataclass(frozen=True)
class Official:
    """The content of an official file: weights of student and teacher (RC-MAE only), and metadata."""

    student: State
    teacher: State | None
    args: dict[str, Any]
    epoch: Any


def read_pth(path: Path) -> Official:
    """Read an official `.pth` without executing code from it: only tensors, plain containers and
    argparse.Namespace are allowed.

    Raises CheckpointError when the file is missing, is another kind of file, or contains other objects.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the pickle protocol of files that are rejected anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise CheckpointError(f"{path} does not exist") from e
    except pickle.UnpicklingError as e:
        raise CheckpointError(
            f"{path} contains Python objects other than weights and was not read, for safety"
        ) from e
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError) as e:
        raise CheckpointError(f"{path} is not a PyTorch checkpoint: {first_line(e)}") from e
    if not isinstance(content, dict) or not ({"student", "model"} & content.keys()):
        keys = list(content)[:6] if isinstance(content, dict) else [type(content).__name__]
        raise CheckpointError(
            f"{path} has neither `student` nor `model` (found: {', '.join(map(str, keys))}); is it an MAE or "
            "RC-MAE checkpoint?"
        )
    args = content.get("args")
    return Official(
        student=_weights(content.get("student", content.get("model")), path),
        teacher=_weights(content["teacher"], path) if "teacher" in content else None,
        args=vars(args) if isinstance(args, argparse.Namespace) else {},
        epoch=content.get("epoch"),
    )


def _weights(state: Any, path: Path) -> State:
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise CheckpointError(f"{path}: its weights are not a dict of named tensors")
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(f"{path}: {name} is not finite, so the checkpoint is unusable")
    return {k.removeprefix("module."): v for k, v in state.items()}


def shape_of(state: State, heads: tuple[int, int] | None = None) -> tuple[Images, AutoencoderNetwork]:
    """The settings of images and network, derived from the shapes of official weights.

    The shapes do not reveal the numbers of attention heads: they are those of the named size of the same
    widths, or `heads` (encoder, decoder). Raises CheckpointError if both are missing.
    """
    try:
        width, channels, patch, _ = state["patch_embed.proj.weight"].shape
        patches = state["pos_embed"].shape[1] - 1
        decoder_width = state["decoder_embed.weight"].shape[0]
        depth, decoder_depth = (
            1 + max(int(k.split(".")[1]) for k in state if k.startswith(p))
            for p in ("blocks.", "decoder_blocks.")
        )
    except KeyError as e:
        raise CheckpointError(
            f"the weights lack {e}; an encoder without its decoder is not a pre-training checkpoint"
        ) from e
    except (ValueError, IndexError) as e:
        raise CheckpointError(
            "the names and shapes of the weights are not those of an official MAE or RC-MAE checkpoint"
        ) from e
    if heads is not None and min(heads) < 1:
        raise ConfigError(f"heads must be 1 or more, not {min(heads)}")
    if heads is None:
        known = {(s.encoder[0], s.decoder[0]): (s.encoder[2], s.decoder[2]) for s in SIZES.values()}
        if (width, decoder_width) not in known:
            raise CheckpointError(
                f"widths {width} and {decoder_width} are those of no named size, and the weights do not "
                "reveal the attention heads; give --heads and --decoder-heads"
            )
        heads = known[width, decoder_width]
    network = AutoencoderNetwork(
        model="vit_base_patch16",
        patch=patch,
        width=width,
        depth=depth,
        heads=heads[0],
        decoder_width=decoder_width,
        decoder_depth=decoder_depth,
        decoder_heads=heads[1],
    )
    for name, s in SIZES.items():
        full = (s.patch, s.encoder, s.decoder)
        if full == (patch, (width, depth, heads[0]), (decoder_width, decoder_depth, heads[1])):
            network = AutoencoderNetwork(model=name)
    return Images(size=patch * round(patches**0.5), channels=channels), network


def autoencoder(
    state: State, heads: tuple[int, int] | None = None
) -> tuple[Autoencoder, Images, AutoencoderNetwork]:
    """An `Autoencoder` with official weights, and its settings."""
    images, network = shape_of(state, heads)
    model = build(images, network)
    load_official(model, state)
    return model, images, network


def official_backbone(file: Path, which: str = "teacher", heads: int | None = None) -> Backbone:
    """The encoder of an official `.pth`, which may lack a decoder, as MAE's published encoders do. Raises
    CheckpointError.

    Without a teacher, it is always the student. For `heads` see `plain_backbone`.
    """
    official = read_pth(file)
    state = official.teacher if which == "teacher" and official.teacher is not None else official.student
    return plain_backbone(
        {k: v for k, v in state.items() if not k.startswith("decoder_") and k != "mask_token"}, file, heads
    )


def plain_backbone(state: State, source: Path, heads: int | None = None) -> Backbone:
    """An encoder from bare weights with timm's names; a head is dropped. Raises CheckpointError, which names
    what does not fit.

    Without `heads`, which the weights do not reveal, there are as many as in the named size of this width, or
    one per 64 channels. The statistics of the images are assumed to be ImageNet's.
    """
    state = {k: v for k, v in state.items() if not k.startswith(("head.", "fc_norm."))}
    return Backbone(_plain_vit(state, source, heads, num_classes=0, global_pool=""), *IMAGENET)


def plain_classifier(state: State, source: Path, heads: int | None = None) -> Classifier | None:
    """As `plain_backbone`, for a classifier such as MAE's fine-tuned checkpoints; None for weights without a
    head."""
    if "head.weight" not in state or state["head.weight"].ndim != 2:
        return None
    pool = {"global_pool": "avg", "fc_norm": True} if "fc_norm.weight" in state else {"global_pool": "token"}
    return Classifier(
        _plain_vit(state, source, heads, num_classes=len(state["head.weight"]), **pool), *IMAGENET
    )


def _plain_vit(state: State, source: Path, heads: int | None, **head: Any) -> VisionTransformer:
    try:
        width, channels, patch, _ = state["patch_embed.proj.weight"].shape
        prefix = sum(state[k].shape[1] for k in ("cls_token", "reg_token") if k in state)
        grid = round((state["pos_embed"].shape[1] - prefix) ** 0.5)
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    except (KeyError, ValueError, IndexError) as e:
        raise CheckpointError(
            f"{source} is not a Vision Transformer with timm's names: {first_line(e)} is missing or invalid"
        ) from e
    if channels != 3:
        raise CheckpointError(
            f"{source} is for {channels} channels of unknown mean and standard deviation; export it from its "
            "run"
        )
    if heads is not None and heads < 1:
        raise ConfigError(f"heads must be 1 or more, not {heads}")
    heads = heads or {s.encoder[0]: s.encoder[2] for s in SIZES.values()}.get(width) or width // 64
    if not heads or width % heads:
        raise CheckpointError(
            f"{source} has width {width}, and the weights do not reveal the attention heads; give --heads"
        )
    vit = timm.create_model(
        PLAIN,
        img_size=patch * grid,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        class_token="cls_token" in state,
        reg_tokens=state["reg_token"].shape[1] if "reg_token" in state else 0,
        final_norm="norm.weight" in state or "fc_norm.weight" in state,
        **head,
    )
    if problems := _mismatches(state, vit.state_dict()):
        raise CheckpointError(f"{source} is not a plain Vision Transformer: {problems}")
    vit.load_state_dict({k: v.float() for k, v in state.items()})
    return cast(VisionTransformer, vit)


def import_pth(file: Path, out: Path, heads: tuple[int, int] | None = None) -> list[str]:
    """Convert an official `.pth` to a folder with the layout of a run: recipe.toml, weights.safetensors,
    export/.

    `weights.safetensors` contains encoders and decoders with our names (student.*, teacher.*). Returns a
    summary in lines. Raises CheckpointError, ConfigError (the folder exists) or StorageError.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another folder with --out")
    official = read_pth(file)
    model, images, network = autoencoder(official.student, heads)
    if images.channels != 3:
        raise CheckpointError(
            f"{file} is for {images.channels} channels of unknown mean and standard deviation; only 3 can be "
            "imported"
        )
    models = {"student": model}
    if official.teacher is not None:
        models["teacher"], *_ = autoencoder(official.teacher, heads)
    recipe = MAERecipe(images=images, network=network)
    if official.teacher is not None:
        recipe = RCMAERecipe(images=images, network=network, teacher=TeacherSettings(schedule="constant"))
    weights = {f"{name}.{k}": v.contiguous() for name, m in models.items() for k, v in m.state_dict().items()}
    write_folder(out, {"recipe.toml": to_toml(recipe).encode(), "weights.safetensors": save(weights)})
    for name, m in models.items():
        metadata = {
            "method": recipe.method,
            "network": name,
            "source": file.name,
            "epoch": official.epoch if isinstance(official.epoch, int) else None,
        }
        export(Backbone(m.encoder.vit, *IMAGENET), out / "export" / name, metadata)
    width, depth = model.encoder.width, len(model.encoder.vit.blocks)
    best = out / "export" / ("teacher" if official.teacher is not None else "student")
    return [
        f"{file}: official {'RC-MAE (student and teacher)' if official.teacher is not None else 'MAE'}, "
        f"ViT {width} x {depth}, patch {model.encoder.patch}, {images.size} px, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        f"wrote {out}",
        f'load it: timm.create_model("local-dir:{best}", pretrained=True)',
    ]
