"""The layouts of the official MAE and RC-MAE checkpoints: names in, names out.

Their encoder has timm's parameter names at the top level and their decoder the prefix `decoder_`.
"""

import argparse
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Images, Network
from ..errors import CheckpointError
from ..models.autoencoder import SIZES, Autoencoder, build

State = dict[str, Tensor]

_DECODER = {"decoder_embed": "embed", "decoder_blocks": "blocks", "decoder_norm": "norm", "decoder_pred": "pred"}
_POSITIONS = ("pos_embed", "decoder_pos_embed")


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
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise CheckpointError(f"{path} does not exist") from e
    except pickle.UnpicklingError as e:
        raise CheckpointError(f"{path} holds Python objects other than weights and was not read, for safety") from e
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as e:
        raise CheckpointError(f"{path} is not a checkpoint of torch: {str(e).splitlines()[0] if str(e) else 'empty'}") from e
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
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: its weights are not a dict of tensors")
    return {k.removeprefix("module."): v for k, v in state.items()}


def shape_of(state: State, heads: tuple[int, int] | None = None) -> tuple[Images, Network]:
    """The images and the network that official weights were made for, read off their shapes.

    Attention heads leave no trace in the shapes: they come from the named size of the same widths, or from `heads`
    (encoder, decoder). Raises CheckpointError when neither says.
    """
    try:
        width, channels, patch, _ = state["patch_embed.proj.weight"].shape
        patches = state["pos_embed"].shape[1] - 1
        decoder_width = state["decoder_embed.weight"].shape[0]
    except KeyError as e:
        raise CheckpointError(f"the weights lack {e}; an encoder without its decoder is not a pre-training checkpoint") from e
    depth, decoder_depth = (1 + max(int(k.split(".")[1]) for k in state if k.startswith(p)) for p in ("blocks.", "decoder_blocks."))
    if heads is None:
        known = {(s.encoder[0], s.decoder[0]): (s.encoder[2], s.decoder[2]) for s in SIZES.values()}
        if (width, decoder_width) not in known:
            raise CheckpointError(
                f"widths {width} and {decoder_width} are of no named size, and heads cannot be read off weights; "
                "give --heads and --decoder-heads"
            )
        heads = known[width, decoder_width]
    network = Network(
        model="vit_base_patch16", patch=patch, width=width, depth=depth, heads=heads[0],
        decoder_width=decoder_width, decoder_depth=decoder_depth, decoder_heads=heads[1],
    )  # fmt: skip
    for name, s in SIZES.items():
        full = (s.patch, s.encoder, s.decoder)
        if full == (patch, (width, depth, heads[0]), (decoder_width, decoder_depth, heads[1])):
            network = Network(model=name)
    return Images(size=patch * round(patches**0.5), channels=channels), network


def autoencoder(state: State, heads: tuple[int, int] | None = None) -> tuple[Autoencoder, Images, Network]:
    """Official weights as our model, with the settings that build it."""
    images, network = shape_of(state, heads)
    model = build(images, network)
    load_official(model, state)
    return model, replace(images), network
