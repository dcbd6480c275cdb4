"""How much of its width a representation uses: numbers that need no labels. Compare them within one method, not between methods."""

import torch
from jaxtyping import Float
from torch import Tensor


def health(features: Float[Tensor, "n d"]) -> dict[str, float]:
    """RankMe, alpha-ReQ, uniformity and spread of pooled features, one row an image.

    `rankme`: exp of the entropy of the singular values' shares (Garrido et al., 2023, arXiv 2210.02885), from 1 to d.
    `alpha_req`: how fast the eigenvalues of the covariance fall, as the exponent of a power law fitted to ranks 2 to d/2 (Agrawal
    et al., 2022); about 1 is said to be good, far above it few directions are left, far below it there is noise.
    `uniformity`: log mean exp(-2 |z_i - z_j|^2) of unit features (Wang and Isola, 2020, arXiv 2005.10242); 0 is collapse.
    `spread`: root mean square distance from the mean feature, over the root mean square length; 0 is collapse.
    """
    z = features.double()
    n, d = z.shape
    shares = torch.linalg.eigvalsh(z.T @ z).clamp_min(0).sqrt()
    centred = z - z.mean(0)
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred / n).flip(0)
    used = eigenvalues[1 : max(4, min(n, d) // 2)]
    unit = z[:512] / z[:512].norm(dim=1, keepdim=True).clamp_min(1e-12)
    distances = torch.pdist(unit)
    return {
        "rankme": effective_rank(shares),
        "alpha_req": -slope(torch.arange(2, len(used) + 2).double().log(), used.clamp_min(1e-30).log()),
        "uniformity": (-2 * distances**2).exp().mean().log().item(),
        "spread": (centred.square().sum() / z.square().sum().clamp_min(1e-30)).sqrt().item(),
    }


def lidar(features: Float[Tensor, "n q d"], delta: float = 1e-4) -> float:
    """LiDAR (Thilak et al., 2024, arXiv 2312.04000): the effective rank of what tells n images apart once what differs between q
    views of one image is divided out. Our views are masks, so no augmentation is needed.

    `delta` is added to the within-image covariance, in units of its mean eigenvalue.
    """
    z = features.double()
    means = z.mean(1)
    between, within = means - means.mean(0), z - means[:, None]
    b = between.T @ between / (len(z) - 1)
    w = torch.einsum("nqd,nqe->de", within, within) / (len(z) * (z.shape[1] - 1))
    w = w + (delta * w.trace() / len(w)).clamp_min(1e-30) * torch.eye(len(w), dtype=w.dtype, device=w.device)
    values, vectors = torch.linalg.eigh(w)
    white = vectors * values.rsqrt() @ vectors.T
    return effective_rank(torch.linalg.eigvalsh(white @ b @ white).clamp_min(0))


def effective_rank(values: Float[Tensor, " d"]) -> float:
    """exp of the entropy of the values' shares: d for equal ones, 1 when one holds all (or there is nothing)."""
    shares = values / values.sum().clamp_min(1e-30)
    return (-torch.xlogy(shares, shares).sum()).exp().item()


def slope(x: Float[Tensor, " k"], y: Float[Tensor, " k"]) -> float:
    """Of the line of least squares."""
    x = x - x.mean()
    return ((x * (y - y.mean())).sum() / x.square().sum()).item()
