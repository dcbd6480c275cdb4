"""Reading official MAE and RC-MAE checkpoints.

Their encoder has timm's parameter names at the top level, and their decoder the prefix `decoder_`.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import save

from ..config import Images, to_toml
from ..engine.checkpoint import write_folder
from ..errors import CheckpointError, ConfigError
from ..methods.mae import MAERecipe, MAESettings
from ..methods.mean_teacher import TeacherSettings
from ..methods.rcmae import RCMAERecipe
from ..models.autoencoder import SIZES, Autoencoder, AutoencoderNetwork, build
from ..models.backbone import IMAGENET, Backbone, Statistics
from .names import State
from .plain import GIVE_SIZE, grid_of
from .timm_export import export
from .weights import Weights, mismatches

MAE_LICENSE = "CC BY-NC 4.0"
"The license of the weights that the authors of MAE and RC-MAE published."

LICENSE_NOTE = f"the weights that the authors of MAE and RC-MAE published are {MAE_LICENSE}: non-commercial"

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


def with_our_names(state: State) -> State:
    """Official weights by their names in `Autoencoder`, without the fixed positions of the decoder."""
    return {our_name(name): value for name, value in state.items() if name != "decoder_pos_embed"}


def official_state(model: Autoencoder) -> State:
    """The weights of a model by their official names, with the fixed positions of its decoder."""
    state: State = {}
    for name, value in model.state_dict().items():
        inner = name.removeprefix("encoder.vit.").removeprefix("decoder.")
        if name.startswith("decoder.") and inner != "mask_token":
            inner = f"decoder_{inner}"
        state[inner] = value.detach().cpu().float().contiguous()
    positions = model.decoder.positions
    state["decoder_pos_embed"] = torch.cat([positions.new_zeros(1, positions.shape[1]), positions])[None]
    return state


def load_official(model: Autoencoder, state: State) -> None:
    """Load official weights into a model. Raises CheckpointError, which names what does not
    fit, without changing the model."""
    positions = state.get("decoder_pos_embed")
    state = with_our_names(state)
    if problems := mismatches(state, model.state_dict()):
        raise CheckpointError(f"these weights do not fit the model: {problems}")
    # The decoder computes its positions, which are fixed; half precision rounds by less than 1e-3.
    ours = model.decoder.positions
    if positions is not None and (
        positions[0, 1:].shape != ours.shape or not torch.allclose(positions[0, 1:], ours, atol=1e-2)
    ):
        if not positions.any():
            raise CheckpointError("decoder_pos_embed is zero: this decoder was trained without positions")
        raise CheckpointError(f"decoder_pos_embed is not that of images of this shape; {GIVE_SIZE}")
    model.load_state_dict(state)


def shape_of(
    state: State, heads: tuple[int, int] | None = None, size: tuple[int, int] | None = None
) -> tuple[Images, AutoencoderNetwork]:
    """The settings of images and network, derived from the shapes of official weights.

    The shapes do not reveal the numbers of attention heads: they are those of the named size of the same
    widths, or `heads` (encoder, decoder). Nor do they reveal the height and width of the images: `size`, or a
    square. Raises CheckpointError if both are missing.
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
    rows, columns = grid_of({patches}, (patch, patch), size, "the checkpoint")
    height = None if rows == columns else rows * patch
    return Images(size=columns * patch, height=height, channels=channels), network


def autoencoder(
    state: State, heads: tuple[int, int] | None = None, size: tuple[int, int] | None = None
) -> tuple[Autoencoder, Images, AutoencoderNetwork]:
    """An `Autoencoder` with official weights, and its settings. Raises CheckpointError as `shape_of` and
    `load_official` do."""
    images, network = shape_of(state, heads, size)
    model = build(images, network)
    load_official(model, state)
    return model, images, network


def license_of(file: Path, weights: Weights) -> str:
    """The license of the published weights, for a pickle with the layout or the name of one; otherwise
    empty."""
    named = re.match(r"(rc-?)?mae_(pretrain|finetuned|visualize)", file.name)
    published = named or "decoder_pos_embed" in weights.student
    return MAE_LICENSE if published and file.suffix != ".safetensors" else ""


def write_import(
    weights: Weights,
    source: Path,
    out: Path,
    heads: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    settings: MAESettings = MAESettings(),
    statistics: Statistics = IMAGENET,
    license: str = "",
) -> list[str]:
    """Write official weights as a folder with the layout of a run: recipe.toml, weights.safetensors, export/.

    `weights.safetensors` contains encoders and decoders with our names (student.*, teacher.*). Returns a
    summary in lines. Raises CheckpointError, ConfigError or StorageError.
    """
    if weights.teacher is not None and "teacher" not in weights.prefixes[1]:
        raise CheckpointError(
            f"{source} has {' and '.join(p.rstrip('.') for p in weights.prefixes)} instead of the student "
            "and the teacher of RC-MAE; save the one to import as a file of its own"
        )
    model, images, network = autoencoder(weights.student, heads, size)
    if images.channels != 3:
        raise CheckpointError(
            f"{source} is for {images.channels} channels of unknown mean and standard deviation; only 3 can "
            "be imported"
        )
    models = {"student": model}
    if weights.teacher is not None:
        models["teacher"], *_ = autoencoder(weights.teacher, heads, size)
    recipe = MAERecipe(images=images, network=network, mae=settings)
    if weights.teacher is not None:
        teacher = TeacherSettings(schedule="constant")
        recipe = RCMAERecipe(images=images, network=network, mae=settings, teacher=teacher)
    tensors = {f"{name}.{k}": v.contiguous() for name, m in models.items() for k, v in m.state_dict().items()}
    write_folder(out, {"recipe.toml": to_toml(recipe).encode(), "weights.safetensors": save(tensors)})
    for name, m in models.items():
        metadata = {
            "method": recipe.method,
            "network": name,
            "source": source.name,
            "epoch": weights.epoch if isinstance(weights.epoch, int) else None,
        }
        backbone = Backbone(m.encoder.vit, *statistics)
        backbone.license = license
        export(backbone, out / "export" / name, metadata)
    pixels = " x ".join(map(str, dict.fromkeys(images.shape)))
    width, depth = model.encoder.width, len(model.encoder.vit.blocks)
    best = out / "export" / ("teacher" if weights.teacher is not None else "student")
    return [
        f"{source}: {'RC-MAE (student and teacher)' if weights.teacher is not None else 'MAE'}, "
        f"ViT {width} x {depth}, patch {model.encoder.patch}, {pixels} px, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        f"wrote {out}",
        f'load it: timm.create_model("local-dir:{best}", pretrained=True)',
    ]
