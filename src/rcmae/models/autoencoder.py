"""The auto-encoder, and the named model sizes."""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from ..config import Images, Network, broken
from ..errors import ConfigError, refuse
from .decoder import Decoder
from .encoder import Encoder, WithEncoder, build_vit, timm_vit
from .patches import gather_tokens


@dataclass(frozen=True, kw_only=True)
class AutoencoderNetwork(Network):
    """The encoder, a plain timm Vision Transformer, and the decoder for pre-training."""

    decoder_width: int | None = None
    "decoder width; default: that of the named size"
    decoder_depth: int | None = None
    "decoder blocks; default: those of the named size"
    decoder_heads: int | None = None
    "decoder attention heads; default: those of the named size"


@dataclass(frozen=True)
class Size:
    """A named size: patch side, then (width, depth, heads) of encoder and decoder."""

    patch: int
    encoder: tuple[int, int, int]
    decoder: tuple[int, int, int]


# Encoder and decoder sizes as paired in the RC-MAE reference code; `vit_tiny_small_images` is ours, for 32 to
# 64 px.
SIZES = {
    "vit_tiny_small_images": Size(4, (128, 6, 4), (64, 2, 2)),
    "vit_tiny_patch16": Size(16, (192, 12, 3), (128, 2, 4)),
    "vit_small_patch16": Size(16, (384, 12, 6), (256, 4, 8)),
    "vit_base_patch16": Size(16, (768, 12, 12), (512, 8, 16)),
    "vit_large_patch16": Size(16, (1024, 24, 16), (512, 8, 16)),
    "vit_huge_patch14": Size(14, (1280, 32, 16), (512, 8, 16)),
}


class Autoencoder(WithEncoder):
    """The network that masked auto-encoding trains."""

    def __init__(self, encoder: Encoder, decoder: Decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(
        self, patches: Float[Tensor, "b n p"], order: Int[Tensor, "b n"], visible: int
    ) -> Float[Tensor, "b m p"]:
        """Predictions for the m hidden patches; the first `visible` patches in `order` are encoded."""
        ids = order[:, :visible]
        return self.decoder(self.encoder(gather_tokens(patches, ids), ids), order)


def build_encoder(images: Images, network: Network) -> Encoder:
    """The encoder of a recipe. Raises ConfigError with all sizes that do not fit together."""
    name = network.model
    if name.startswith("timm:"):
        fixed = [k for k in ("patch", "width", "depth", "heads") if getattr(network, k) is not None]
        if fixed or network.registers:
            raise ConfigError(
                f"{name} already determines {', '.join(fixed or ['registers'])}: leave that out"
            )
        return Encoder(timm_vit(name.removeprefix("timm:"), size=images.shape, channels=images.channels))
    if name not in SIZES:
        raise ConfigError(
            f"unknown model {name!r}; known are {', '.join(SIZES)} and timm:NAME (`rcmae list`)"
        )
    size = SIZES[name]
    patch = network.patch or size.patch
    width, depth, heads = _given(network, "", size.encoder)
    _check(images.shape, patch, "", width, heads)
    vit = build_vit(
        size=images.shape,
        channels=images.channels,
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        registers=network.registers,
    )
    return Encoder(vit)


def build(images: Images, network: AutoencoderNetwork) -> Autoencoder:
    """The auto-encoder of a recipe. Raises ConfigError as `build_encoder` does."""
    encoder = build_encoder(images, network)
    defaults = SIZES[network.model].decoder if network.model in SIZES else (256, 4, 8)
    width, depth, heads = _given(network, "decoder_", defaults)
    _check(images.shape, encoder.patch, "decoder_", width, heads)
    decoder = Decoder(
        inputs=encoder.width,
        prefix=encoder.prefix,
        grid=encoder.grid,
        values=encoder.patch**2 * images.channels,
        width=width,
        depth=depth,
        heads=heads,
    )
    return Autoencoder(encoder, decoder)


def _given(network: Network, part: str, defaults: tuple[int, int, int]) -> Iterator[int]:
    """Width, depth and heads of a part, as given or by default."""
    for name, default in zip(("width", "depth", "heads"), defaults, strict=True):
        yield getattr(network, part + name) or default


def _check(shape: tuple[int, int], patch: int, part: str, width: int, heads: int) -> None:
    h, w = shape
    rules = [
        (h % patch == 0 == w % patch, f"size {h} x {w} is not a multiple of the patch, {patch}"),
        ((h // patch) * (w // patch) > 1, f"size {h} x {w} holds fewer than two patches of {patch}"),
        (width % heads == 0, f"{part}width {width} is not a multiple of {part}heads, {heads}"),
        (width % 4 == 0, f"{part}width {width} is not a multiple of 4"),
    ]
    refuse(broken(rules))
