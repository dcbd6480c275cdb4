"""Starting pre-training from existing weights (`--init`), whatever their images, patches and statistics."""

import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..config import Network
from ..errors import CheckpointError
from ..methods.base import Method
from ..methods.recipes import load_recipe
from ..models.autoencoder import SIZES
from ..models.backbone import Backbone, Statistics
from ..models.blueprint import heads_of
from .huggingface import model_type, read_folder
from .load import is_bare, load
from .official import LICENSE_NOTE, MAE_LICENSE, license_of, with_our_names
from .plain import plain_backbone
from .weights import State, mismatches, read_weights, weights_of_run

AnyNetwork = TypeVar("AnyNetwork", bound=Network)


class Initial(NamedTuple):
    """Weights to start from."""

    encoder: Backbone
    decoder: State | None
    "by the names in `Decoder`"
    notes: list[str]
    "what was assumed of them, and their license if it is another's, in phrases"


def read_initial(name: str) -> Initial:
    """The weights that `name` denotes, as for `load`: of the teacher, if there is one. Raises as `load`."""
    path, state, notes, prefix = Path(name), State(), list[str](), "decoder."
    if is_bare(path):
        weights = read_weights(path)
        encoder, assumed = plain_backbone(weights.select("teacher"), path)
        encoder.license = license_of(path, weights)
        state, notes = with_our_names(weights.select("teacher")), [assumed]
    elif model_type(path):
        folder = read_folder(path)
        encoder, (assumed, *_) = folder.backbone()
        state, notes = with_our_names(folder.weights.student), [assumed]
    else:
        encoder = load(name)
        if (path / "recipe.toml").exists():
            _, state = weights_of_run(path)
            teachers = "teacher.model.decoder."
            prefix = teachers if any(k.startswith(teachers) for k in state) else "student.decoder."
    if encoder.license:
        notes.append(
            LICENSE_NOTE if encoder.license == MAE_LICENSE else f"their license is {encoder.license}"
        )
    decoder = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return Initial(encoder.eval(), decoder or None, notes)


def with_network_of(name: str, network: AnyNetwork) -> AnyNetwork:
    """A recipe's network in the shape of the weights that `name` denotes, and with these as the initial ones.
    Raises as `load`."""
    reset: dict[str, Any] = dict.fromkeys(("patch", "width", "depth", "heads"))
    reset |= {"registers": 0, "init": name}
    if name.startswith("timm:"):
        return replace(network, **reset | {"model": name})
    vit, recipe = read_initial(name).encoder.vit, Path(name) / "recipe.toml"
    if recipe.exists():
        of_run = load_recipe(str(recipe)).network
        shared = {f.name for f in fields(network)} & {f.name for f in fields(of_run)}
        return replace(network, **{f: getattr(of_run, f) for f in shared} | {"init": name})
    return replace(network, **reset | _shape(vit))


def _shape(vit: VisionTransformer) -> dict[str, Any]:
    """The model and what differs from it; the model of the nearest width, so that the decoder fits."""
    shape = {"width": vit.embed_dim, "depth": len(vit.blocks), "heads": heads_of(vit)}
    name = min(SIZES, key=lambda name: abs(SIZES[name].encoder[0] - vit.embed_dim))
    usual = dict(zip(shape, SIZES[name].encoder, strict=True)) | {"patch": SIZES[name].patch}
    shape["patch"] = vit.patch_embed.patch_size[0]
    differing = {key: value for key, value in shape.items() if value != usual[key]}
    return {"model": name, "registers": vit.num_reg_tokens} | differing


def initialize(method: Method, initial: Initial, name: str) -> list[str]:
    """Replace the random weights of a new method by `initial`: those of the encoder, adapted to its images,
    patches and statistics, and of the decoder if it has one of these sizes. The teacher becomes a copy of the
    student. Returns what was changed and what is new, in phrases.

    Raises CheckpointError, which names what does not fit, before anything is changed.
    """
    source, encoder = method.ema_source, method.ema_source.encoder
    state, changes = adapted(initial.encoder, encoder.vit, method.statistics)
    changes = initial.notes + changes
    if problems := mismatches(state, encoder.vit.state_dict()):
        raise CheckpointError(
            f"the weights of {name} do not fit this network: {problems}; leave out --model and its sizes"
        )
    encoder.vit.load_state_dict(state)
    if (decoder := getattr(source, "decoder", None)) is not None:
        if initial.decoder is None:
            changes.append("the decoder is new")
        elif problems := mismatches(initial.decoder, decoder.state_dict()):
            changes.append(f"the decoder is new, since that of these weights has other sizes ({problems})")
        else:
            decoder.load_state_dict(initial.decoder)
            changes.append("with their decoder")
    if method.teacher is not None:
        method.teacher.model.load_state_dict(source.state_dict())
    return changes


@torch.no_grad()
def adapted(backbone: Backbone, like: VisionTransformer, statistics: Statistics) -> tuple[State, list[str]]:
    """The weights of a backbone for a ViT with the images, patches and channels of `like` whose images are
    standardized by `statistics`, and what was changed, in phrases.

    Positions are interpolated and patches resized by timm. Other statistics change the patch embedding so
    that it computes the same of the same image. Raises CheckpointError for channels that cannot be adapted.
    """
    vit, changes = copy.deepcopy(backbone.vit), []
    old, new = vit.patch_embed, like.patch_embed
    if old.patch_size != new.patch_size:
        changes.append(f"patches resized from {old.patch_size[0]} to {new.patch_size[0]} px")
    if old.grid_size != new.grid_size:
        changes.append(
            "positions interpolated from {} x {} to {} x {}".format(*old.grid_size, *new.grid_size)
        )
    if old.patch_size != new.patch_size or old.img_size != new.img_size:
        vit.set_input_size(new.img_size, new.patch_size)
    state = dict(vit.state_dict())
    weight, bias = state["patch_embed.proj.weight"], state.get("patch_embed.proj.bias")
    channels = new.proj.in_channels
    if weight.shape[1] != channels:
        if weight.shape[1] != 3:
            raise CheckpointError(
                f"these weights are for {weight.shape[1]} channels; only those for 3 can be adapted: give "
                f"--channels {weight.shape[1]}"
            )
        state["patch_embed.proj.weight"] = adapt_input_conv(channels, weight)
        changes.append(f"{weight.shape[1]} channels adapted to {channels}")
    elif bias is not None:
        weight, bias = _restandardized(weight, bias, backbone.statistics, statistics)
        state |= {"patch_embed.proj.weight": weight, "patch_embed.proj.bias": bias}
    elif not _equal(backbone.statistics, statistics):
        changes.append("other statistics not adapted, as their patch embedding has no bias")
    return state, changes


def _equal(one: Statistics, other: Statistics) -> bool:
    return torch.equal(torch.tensor(one), torch.tensor(other))  # in float32, as in files


def _restandardized(
    weight: Float[Tensor, "d c p p"], bias: Float[Tensor, " d"], old: Statistics, new: Statistics
) -> tuple[Float[Tensor, "d c p p"], Float[Tensor, " d"]]:
    """The convolution whose result on images that are standardized by `new` is that of the given one on the
    same images standardized by `old`."""
    if _equal(old, new):
        return weight, bias
    (old_mean, old_std), (mean, std) = (torch.tensor(s, dtype=torch.float64) for s in (old, new))
    shift = torch.einsum("dcij,c->d", weight.double(), (mean - old_mean) / old_std)
    scaled = weight.double() * (std / old_std).view(1, -1, 1, 1)
    return scaled.to(weight.dtype), (bias.double() + shift).to(bias.dtype)
