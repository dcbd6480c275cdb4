"""Names of parameters in transformers' ViT and ViTMAE, and in timm's Vision Transformer with the official
decoder of MAE: one table for both directions.

transformers keeps queries, keys and values apart, timm and MAE store them as one matrix, `qkv`.
"""

import re

import torch
from torch import Tensor

from ..errors import ConfigError

State = dict[str, Tensor]

_STACKS = {"blocks": "vit.encoder.layer", "decoder_blocks": "decoder.decoder_layers"}

_PARTS = {
    "norm1": "layernorm_before",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"Parts of a block."

_OTHERS = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "head": "classifier",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}

_FIRST = "embeddings.patch_embeddings.projection.weight"
"The parameter by which a network of transformers is recognized."

_NEWER = {
    r"^(vit\.)layers\.": r"\1encoder.layer.",
    r"^decoder\.decoder_encoder\.layer\.": "decoder.decoder_layers.",
    r"\.attention\.q_proj\.": ".attention.attention.query.",
    r"\.attention\.k_proj\.": ".attention.attention.key.",
    r"\.attention\.v_proj\.": ".attention.attention.value.",
    r"\.attention\.o_proj\.": ".attention.output.dense.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
}
"Names in transformers 5, of modules and (the second) in files that it saves, to those in published files."

_Table = dict[str, str]


def _renamed(name: str, stacks: _Table, parts: _Table, others: _Table) -> str | None:
    """A name by the tables; None for one that they do not have."""
    if name in others:
        return others[name]
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if module in others:
        return f"{others[module]}.{kind}"
    for stack, other in stacks.items():
        index, _, part = module.removeprefix(f"{stack}.").partition(".")
        if index.isdecimal() and part in parts:
            return f"{other}.{index}.{parts[part]}.{kind}"
    return None


def to_transformers(state: State) -> State:
    """The weights of a timm ViT, with an official decoder or without, by their names in
    `ViTMAEForPreTraining` and `ViTForImageClassification`, which those in published files are. Raises
    ConfigError, which names a parameter that transformers' classes do not have."""
    result = {}
    for name, value in state.items():
        split = {name: value}
        if ".attn.qkv." in name:
            split = {
                name.replace("qkv", part): rows.clone()
                for part, rows in zip("qkv", value.chunk(3), strict=True)
            }
        for timm_name, rows in split.items():
            other = _renamed(timm_name, _STACKS, _PARTS, _OTHERS)
            if other is None:
                raise ConfigError(f"transformers' ViT has no {name}, so this network cannot be one")
            result[other] = rows
    return result


def from_transformers(state: State) -> State:
    """Weights with names of transformers' ViT or ViTMAE, possibly after prefixes, by the names of timm and of
    the official decoder after the same prefixes; other weights as they are."""
    first = next((name for name in state if f".{name}".endswith(f".{_FIRST}")), None)
    if first is None:
        return state
    prefix = first.removesuffix(_FIRST).removesuffix("vit.")
    tables = [{other: name for name, other in table.items()} for table in (_STACKS, _PARTS, _OTHERS)]
    result = {}
    for name, value in state.items():
        inner = name.removeprefix(prefix)
        if not inner.startswith(("vit.", "decoder.", "classifier.")):
            inner = f"vit.{inner}"  # ViTModel alone
        for pattern, published in _NEWER.items():
            inner = re.sub(pattern, published, inner)
        result[prefix + (_renamed(inner, *tables) or inner.removeprefix("vit."))] = value
    for name in [name for name in result if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        shapes = {result[part].shape for part in parts if part in result}
        if all(part in result for part in parts) and len(shapes) == 1 and shapes != {()}:
            result[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([result.pop(part) for part in parts])
    return result
