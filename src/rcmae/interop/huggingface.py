"""Folders of transformers: `ViTModel`, `ViTForImageClassification` and `ViTMAEForPreTraining`, with the
names of parameters that transformers 4 and 5 read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from ..data.views import center_share
from ..errors import CheckpointError, ConfigError, first_line
from ..models.autoencoder import Autoencoder
from ..models.backbone import Backbone, Statistics
from ..models.blueprint import difference, heads_of
from ..models.classifier import Classifier
from .names import State, to_transformers
from .official import MAE_LICENSE, autoencoder, official_state
from .plain import plain_backbone, plain_classifier, plain_vit
from .timm_export import FILES
from .weights import Weights, read_weights

KINDS = ("vit", "vit_mae")
"The values of model_type in config.json that are read."

EPSILON = 1e-6
"The epsilon of layer norms in timm and in the code of MAE."


@dataclass(frozen=True)
class Folder:
    """A folder of transformers with its settings, where config.json leaves them out by transformers'
    defaults."""

    path: Path
    config: dict[str, Any]
    weights: Weights
    statistics: Statistics | None
    "None without a preprocessor_config.json"

    @property
    def heads(self) -> tuple[int, int]:
        """The attention heads of encoder and decoder."""
        return (
            int(self.config.get("num_attention_heads", 12)),
            int(self.config.get("decoder_num_attention_heads", 16)),
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        size = self.config.get("image_size", 224)
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def classes(self) -> list[str]:
        """The names of a classifier's outputs, if they have any."""
        names = {int(k): str(v) for k, v in (self.config.get("id2label") or {}).items()}
        return [] if names.get(0) in (None, "LABEL_0") else [names.get(i, str(i)) for i in range(len(names))]

    @property
    def license(self) -> str:
        """Of the weights, if it is known: that of the published ones for a ViTMAE of unknown origin."""
        ours = self.config.get("rcmae")
        if isinstance(ours, dict):
            return str(ours.get("license", ""))
        return MAE_LICENSE if self.config["model_type"] == "vit_mae" else ""

    def backbone(self) -> tuple[Backbone, list[str]]:
        """The encoder, and phrases on what was assumed, taken and left out. Raises CheckpointError."""
        backbone, text = plain_backbone(
            self.weights.student, self.path, self.heads[0], self.size, self.statistics
        )
        self._describe(backbone)
        backbone.method = str((self.config.get("rcmae") or {}).get("method", ""))
        return backbone, [text, *self._report(backbone.vit.state_dict())]

    def classifier(self) -> tuple[Classifier, list[str]] | None:
        """The network with its head, likewise; None without a head."""
        plain = plain_classifier(self.weights.student, self.path, self.heads[0], self.size, self.statistics)
        if plain is None:
            return None
        model, text = plain
        self._describe(model)
        return model, [text, *self._report(model.vit.state_dict())]

    def _describe(self, network: Backbone | Classifier) -> None:
        network.license = self.license
        network.bits = (self.config.get("rcmae") or {}).get("bits")

    def _report(self, used: State) -> list[str]:
        epsilon = self.config.get("layer_norm_eps", 1e-12)
        rounded = [f"layer norms with epsilon {EPSILON:g} instead of {epsilon:g}"] * (epsilon != EPSILON)
        return [f"took {len(used)} tensors", *rounded, *self.weights.describe("student", used)]


def model_type(folder: Path) -> str:
    """What transformers calls the network in a folder; empty for folders of timm and rcmae."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return ""
    return (
        str(config.get("model_type", "")) if isinstance(config, dict) and "architecture" not in config else ""
    )


def read_folder(folder: Path) -> Folder:
    """Read a folder that transformers' `save_pretrained` wrote, or a downloaded one. Raises
    CheckpointError if it is of another kind, damaged, or in several files."""
    kind = model_type(folder)
    if kind not in KINDS:
        raise CheckpointError(
            f"{folder} is a {kind} of transformers; of its networks, {' and '.join(KINDS)} are read"
        )
    try:
        config = json.loads((folder / "config.json").read_bytes())
        if (activation := config.get("hidden_act", "gelu")) != "gelu":
            raise CheckpointError(f"{folder} has the activation {activation}; only gelu is read")
        if not 0 < (epsilon := float(config.get("layer_norm_eps", 1e-12))) <= EPSILON:
            raise CheckpointError(
                f"{folder} has layer norms with epsilon {epsilon:g}, and timm's with {EPSILON:g} would be "
                "another network"
            )
        file = next((folder / name for name in FILES if (folder / name).exists()), None)
        if file is None:
            parts = "; save its parts as one file" if [*folder.glob("*.index.json")] else ""
            raise CheckpointError(f"{folder} has a config.json, but {FILES[0]} is missing{parts}")
        result = Folder(folder, config, read_weights(file), _statistics(folder))
        width = len(result.weights.student.get("norm.bias", ()))
        if min(result.heads) < 1 or width % result.heads[0]:
            raise CheckpointError(
                f"{folder / 'config.json'} has {result.heads[0]} heads, which do not divide the width {width}"
            )
        _ = result.size, result.classes
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise CheckpointError(f"{folder / 'config.json'} is damaged: {first_line(e)}") from e
    return result


def _statistics(folder: Path) -> Statistics | None:
    path = folder / "preprocessor_config.json"
    try:
        config = json.loads(path.read_bytes())
        if not config.get("do_normalize", True):
            return (0.0,) * 3, (1.0,) * 3
        mean, std = (tuple(map(float, config[key])) for key in ("image_mean", "image_std"))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(
            f"{path} is damaged: {first_line(e)}; without it, ImageNet's are assumed"
        ) from e
    return mean, std


def files(
    network: Backbone | Classifier,
    metadata: dict[str, Any],
    classes: Sequence[str] = (),
    model: Autoencoder | None = None,
    mask_ratio: float = 0.75,
    normalized: bool = True,
) -> dict[str, bytes]:
    """The files that transformers loads: as ViTModel for a backbone, as ViTForImageClassification for a
    classifier, or, with its auto-encoder `model`, as ViTMAEForPreTraining; `metadata` is "rcmae" in
    config.json.

    The weights are read back as `rcmae.load` would: raises ConfigError if the result would be another
    network.
    """
    vit = network.vit
    state = {k: v.detach().cpu().float() for k, v in vit.state_dict().items()}
    if vit.num_classes and (vit.global_pool != "token" or "fc_norm.weight" in state):
        pooled = "the mean of the patches" if vit.global_pool == "avg" else vit.global_pool or "none"
        raise ConfigError(
            f"transformers' ViTForImageClassification reads the class token, this classifier {pooled}; "
            "its AutoModelForImageClassification loads the folder of --to timm, if timm is installed"
        )
    if missing := {"cls_token", "pos_embed", "norm.weight"} - state.keys():
        raise ConfigError(f"transformers' ViT needs {min(missing)}, which this network does not have")
    if vit.no_embed_class:
        raise ConfigError(
            "transformers' ViT gives the class token a position, which this network does not have"
        )
    heads, size, statistics = heads_of(vit), network.shape, network.statistics
    height, width = size
    patch = vit.patch_embed.patch_size
    config: dict[str, Any] = {
        "architectures": ["ViTForImageClassification" if vit.num_classes else "ViTModel"],
        "model_type": "vit",
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": heads,
        "intermediate_size": len(state["blocks.0.mlp.fc1.bias"]),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": EPSILON,
        "image_size": height if height == width else [height, width],
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "num_channels": network.channels,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "torch_dtype": "float32",
        "rcmae": metadata,
    }
    again: nn.Module
    if model is not None:
        if height != width:
            raise ConfigError(f"transformers' ViTMAE takes square images, not {height} x {width}")
        decoder = model.decoder
        state = official_state(model)
        decoder_heads = heads_of(decoder)
        config |= {
            "architectures": ["ViTMAEForPreTraining"],
            "model_type": "vit_mae",
            "decoder_hidden_size": decoder.embed.out_features,
            "decoder_num_hidden_layers": len(decoder.blocks),
            "decoder_num_attention_heads": decoder_heads,
            "decoder_intermediate_size": len(state["decoder_blocks.0.mlp.fc1.bias"]),
            "mask_ratio": mask_ratio,
            "norm_pix_loss": normalized,
        }
        tensors = to_transformers(state)
        again, *_ = autoencoder(state, (heads, decoder_heads), size)
    else:
        tensors = to_transformers(state)
        head = {"num_classes": vit.num_classes, "global_pool": vit.global_pool, "fc_norm": False}
        again, _ = plain_vit(state, Path("this network"), heads, size, statistics, **head)
    if different := difference(model or vit, again):
        raise ConfigError(f"transformers' ViT would be another network: {different}")
    if vit.num_classes:
        names = list(classes) or [f"LABEL_{i}" for i in range(vit.num_classes)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    elif model is None:  # as ViTModel saves itself
        tensors = {name.removeprefix("vit."): value for name, value in tensors.items()}
    return {
        "model.safetensors": save({k: v.contiguous() for k, v in tensors.items()}, {"format": "pt"}),
        "config.json": json.dumps(config, indent=1).encode(),
        "preprocessor_config.json": json.dumps(_preprocessor(network), indent=1).encode(),
    }


def _preprocessor(network: Backbone | Classifier) -> dict[str, Any]:
    """The evaluation crop and the standardization; images that are not square are resized as a whole."""
    height, width = network.shape
    mean, std = network.statistics
    config = {
        "do_resize": True,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    if height != width:
        return config | {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": height, "width": width},
        }
    return config | {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": round(height / center_share((height, width)))},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_convert_rgb": network.channels == 3,
    }
