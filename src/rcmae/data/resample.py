"""Batched resizing on any device, with the results of torchvision's bicubic resizing of 8-bit images with
antialiasing.

Each image is multiplied by a matrix of integer weights along the width, then along the height; the sums are
rounded to 8 bits. The upper and lower halves of weights are multiplied separately, so that sums of less than
1,024 products (a reduction by less than 250) are exact in float32, and factors in TF32 and bfloat16 too: the
results do not depend on the order of a sum or the device. Letters: b images, o output pixels, i input pixels
along a side.
"""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

BITS = 22
"Most fractional bits of a weight."


def resize(
    images: UInt8[Tensor, "b c h w"],
    heights: Int[Tensor, " b"],
    widths: Int[Tensor, " b"],
    shape: tuple[int, int],
) -> UInt8[Tensor, "b c oh ow"]:
    """The first `heights` x `widths` pixels of each image, resized to `shape` (height, width)."""
    along = _weighted(images.transpose(2, 3), widths, shape[1])  # [b, c, ow, h]
    return _weighted(along.transpose(2, 3), heights, shape[0])


def _weighted(
    images: UInt8[Tensor, "b c i x"], lengths: Int[Tensor, " b"], size: int
) -> UInt8[Tensor, "b c {size} x"]:
    weights, bits = weights_of(lengths, size, images.shape[2])
    sums = _product(weights.unsqueeze(1), images.float() - 128)  # [b, 1, o, i] @ [b, c, i, x]
    offset = 128 * weights.sum(2) + 2 ** (bits[:, None] - 1)  # [b, o]; the second term rounds
    sums = (sums + offset[:, None, :, None]) >> bits[:, None, None, None]
    return sums.clamp(0, 255).to(torch.uint8)


def _product(weights: Int[Tensor, "*a o i"], values: Float[Tensor, "*b i x"]) -> Int[Tensor, "*b o x"]:
    """The matrix product of integers of 16 bits and of 8 bits, both with the sign."""
    upper = (weights + 128) >> 8
    lower = weights - 256 * upper
    return 256 * (upper.float() @ values).long() + (lower.float() @ values).long()


def weights_of(
    lengths: Int[Tensor, " b"], size: int, padded: int
) -> tuple[Int[Tensor, "b {size} {padded}"], Int[Tensor, " b"]]:
    """Integer weights of each of `padded` input pixels, of which `lengths` exist, in each of `size` output
    pixels, and the number of their fractional bits."""
    scale = lengths.double().unsqueeze(1) / size  # [b, 1], input pixels per output pixel
    reach = scale.clamp_min(1)
    center = scale * (torch.arange(size, device=lengths.device) + 0.5)  # [b, o]
    first = (center - 2 * reach + 0.5).long().clamp_min(0)
    last = torch.minimum((center + 2 * reach + 0.5).long(), lengths.unsqueeze(1))
    taps = torch.arange(padded, device=lengths.device)
    inside = (taps >= first.unsqueeze(2)) & (taps < last.unsqueeze(2))  # [b, o, i]
    distance = (taps - center.unsqueeze(2) + 0.5) * (1 / reach).unsqueeze(2)
    weights = torch.where(inside, _cubic(distance.abs()), 0)
    weights = weights / weights.sum(2, keepdim=True)
    # As many bits as 16-bit integers hold.
    largest = weights.amax((1, 2)).unsqueeze(1)
    fitting = (largest * 2.0 ** torch.arange(1, BITS + 1, device=lengths.device) + 0.5).floor() < 2**15
    bits = fitting.sum(1)
    scaled = weights * 2.0 ** bits[:, None, None]
    return (scaled + 0.5 * scaled.sign()).trunc().long(), bits


def _cubic(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Keys' cubic kernel with a = -0.5, of distances."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
