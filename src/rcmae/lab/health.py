"""Label-free metrics of how many dimensions a representation uses. Compare them within a method, not between
methods."""

import torch
from jaxtyping import Float
from torch import Tensor


def health(features: Float[Tensor, "n d"]) -> dict[str, float]:
    """RankMe, alpha-ReQ, uniformity and spread of pooled features, one row per image.

    `rankme`: exp of the entropy of the normalized singular values (Garrido et al., 2023, arXiv 2210.02885),
    from 1 to d. `alpha_req`: exponent of a power law fitted to the covariance's eigenvalues of ranks 2 to d/2
    (Agrawal et al., 2022); about 1 is reported to be good, much more means that few directions are used, much
    less means noise. `uniformity`: log mean exp(-2 |z_i - z_j|^2) of unit features (Wang and Isola, 2020,
    arXiv 2005.10242); 0 is collapse. `spread`: RMS distance from the mean feature over the RMS norm; 0 is
    collapse.
    """
    z = features.double()
    n, d = z.shape
    singular_values = torch.linalg.eigvalsh(z.T @ z).clamp_min(0).sqrt()
    centered = z - z.mean(0)
    eigenvalues = torch.linalg.eigvalsh(centered.T @ centered / n).flip(0)
    fitted = eigenvalues[1 : max(4, min(n, d) // 2)]
    unit = z[:512] / z[:512].norm(dim=1, keepdim=True).clamp_min(1e-12)
    distances = torch.pdist(unit)
    return {
        "rankme": effective_rank(singular_values),
        "alpha_req": -slope(torch.arange(2, len(fitted) + 2).double().log(), fitted.clamp_min(1e-30).log()),
        "uniformity": (-2 * distances**2).exp().mean().log().item(),
        "spread": (centered.square().sum() / z.square().sum().clamp_min(1e-30)).sqrt().item(),
    }


def lidar(features: Float[Tensor, "n q d"], delta: float = 1e-4) -> float:
    """LiDAR (Thilak et al., 2024, arXiv 2312.04000): the effective rank of the covariance between n images,
    whitened by the covariance within the q views of an image. The views are masks, so no augmentation is
    needed.

    `delta`, in units of the mean eigenvalue, regularizes the covariance within images.
    """
    z = features.double()
    means = z.mean(1)  # [n, d]
    between, within = means - means.mean(0), z - means[:, None]
    b = between.T @ between / (len(z) - 1)  # [d, d]
    w = torch.einsum("nqd,nqe->de", within, within) / (len(z) * (z.shape[1] - 1))
    w = w + (delta * w.trace() / len(w)).clamp_min(1e-30) * torch.eye(len(w), dtype=w.dtype, device=w.device)
    values, vectors = torch.linalg.eigh(w)
    whitening = vectors * values.rsqrt() @ vectors.T
    return effective_rank(torch.linalg.eigvalsh(whitening @ b @ whitening).clamp_min(0))


def effective_rank(values: Float[Tensor, " d"]) -> float:
    """exp of the entropy of the normalized values: d if all are equal, 1 if all but one (or all) are 0."""
    fractions = values / values.sum().clamp_min(1e-30)
    return (-torch.xlogy(fractions, fractions).sum()).exp().item()


def slope(x: Float[Tensor, " k"], y: Float[Tensor, " k"]) -> float:
    """Slope of the least-squares line."""
    x = x - x.mean()
    return ((x * (y - y.mean())).sum() / x.square().sum()).item()
