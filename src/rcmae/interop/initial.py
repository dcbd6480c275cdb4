"""Starting pre-training from existing weights (`--init`), whatever their images, patches and statistics."""

import copy
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..config import Network
from ..engine.checkpoint import newest
from ..errors import CheckpointError
from ..methods.base import Method
from ..methods.recipes import load_recipe
from ..models.autoencoder import SIZES
from ..models.backbone import Backbone, Statistics
from .huggingface import model_type, read_folder
from .load import is_bare, load
from .official import our_name
from .weights import State, mismatches, read_weights

AnyNetwork = TypeVar("AnyNetwork", bound=Network)


class Initial(NamedTuple):
    """Weights to start from."""

    encoder: Backbone
    decoder: State | None
    "by the names in `Decoder`"

    @property
    def digest(self) -> str:
        """SHA-256 of the encoder's weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.encoder.vit.state_dict().items()):
            digest.update(name.encode() + value.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()


def read_initial(name: str, which: str = "teacher") -> Initial:
    """The weights that `name` denotes, as for `load`: of the teacher, if there is one. Raises as `load`."""
    logger = logging.getLogger("rcmae")
    level, path = logger.level, Path(name)
    try:
        logger.setLevel(logging.ERROR)  # `load` would say that it leaves the decoder out
        encoder = load(name, which)
    finally:
        logger.setLevel(level)
    if is_bare(path) or model_type(path):
        weights = read_weights(path) if is_bare(path) else read_folder(path).weights
        return Initial(encoder, _part(_with_our_names(weights.select(which)), "decoder."))
    file = path / "weights.safetensors"
    if not file.exists() and (checkpoint := newest(path / "checkpoints", logger.warning)):
        file = checkpoint / "model.safetensors"
    if not file.exists():
        return Initial(encoder, None)
    state = load_file(file)
    prefixes = ("teacher.model.", "teacher.") if which == "teacher" else ()
    decoders = (_part(state, f"{prefix}decoder.") for prefix in (*prefixes, "student."))
    return Initial(encoder, next((each for each in decoders if each), None))


def _part(state: Mapping[str, Tensor], prefix: str) -> State | None:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or None


def _with_our_names(state: State) -> State:
    return {our_name(name): value for name, value in state.items() if name != "decoder_pos_embed"}


def with_network_of(name: str, network: AnyNetwork) -> AnyNetwork:
    """A recipe's network in the shape of the weights that `name` denotes, and with these as the initial ones.
    Raises as `load`."""
    reset: dict[str, Any] = dict.fromkeys(("patch", "width", "depth", "heads"))
    reset |= {"registers": 0, "init": name}
    if name.startswith("timm:"):
        return replace(network, **reset | {"model": name})
    recipe = Path(name) / "recipe.toml"
    if recipe.exists():
        of_run = load_recipe(str(recipe)).network
        shared = {f.name for f in fields(network)} & {f.name for f in fields(of_run)}
        return replace(network, **{f: getattr(of_run, f) for f in shared} | {"init": name})
    vit = read_initial(name).encoder.vit
    return replace(network, **reset | _shape(vit))


def _shape(vit: VisionTransformer) -> dict[str, Any]:
    """The model and what differs from it; the model of the nearest width, so that the decoder fits."""
    heads: int = vit.blocks[0].attn.num_heads  # type: ignore[union-attr, assignment]  # an Attention
    shape = {"width": vit.embed_dim, "depth": len(vit.blocks), "heads": heads}
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
    that it computes the same of the same image.
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
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    channels = new.proj.in_channels
    if weight.shape[1] != channels:
        state["patch_embed.proj.weight"] = adapt_input_conv(channels, weight)
        changes.append(f"{weight.shape[1]} channels adapted to {channels}")
    else:
        weight, bias = _restandardized(weight, bias, backbone.statistics, statistics)
        state |= {"patch_embed.proj.weight": weight, "patch_embed.proj.bias": bias}
    return state, changes


def _restandardized(
    weight: Float[Tensor, "d c p p"], bias: Float[Tensor, " d"], old: Statistics, new: Statistics
) -> tuple[Float[Tensor, "d c p p"], Float[Tensor, " d"]]:
    """The convolution whose result on images that are standardized by `new` is that of the given one on the
    same images standardized by `old`."""
    if torch.equal(torch.tensor(old), torch.tensor(new)):  # in float32, as in files
        return weight, bias
    (old_mean, old_std), (mean, std) = (torch.tensor(s, dtype=torch.float64) for s in (old, new))
    shift = torch.einsum("dcij,c->d", weight.double(), (mean - old_mean) / old_std)
    scaled = weight.double() * (std / old_std).view(1, -1, 1, 1)
    return scaled.to(weight.dtype), (bias.double() + shift).to(bias.dtype)
