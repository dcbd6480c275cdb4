"""A plain implementation of RC-MAE: the oracle of tests/test_reference.py and the baseline of
benchmarks/step.py.

It is not optimized: all patches are embedded by a convolution, tokens return to their order for the decoder,
all patches are predicted, both losses are means over a mask, the teacher is updated tensor by tensor, and the
losses are read after every step.
"""

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmae.models.autoencoder import Autoencoder


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class PlainAutoencoder(nn.Module):
    """A masked autoencoder with a copy of our weights (class token, no registers)."""

    def __init__(self, ours: Autoencoder):
        super().__init__()
        vit, decoder = ours.encoder.vit, ours.decoder
        width, dwidth = vit.embed_dim, decoder.embed.out_features
        assert vit.cls_token is not None and vit.pos_embed is not None
        self.patch = ours.encoder.patch
        self.conv = nn.Conv2d(vit.in_chans, width, self.patch, self.patch)
        self.cls, self.positions = (
            nn.Parameter(vit.cls_token.detach().clone()),
            vit.pos_embed.detach().clone(),
        )
        heads, dheads = (cast(Any, blocks[0]).attn.num_heads for blocks in (vit.blocks, decoder.blocks))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in vit.blocks))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.embed = nn.Linear(width, dwidth)
        self.mask_token = nn.Parameter(decoder.mask_token.detach().clone())
        self.dpositions = torch.cat([torch.zeros(1, dwidth), cast(Tensor, decoder.positions)])[None]
        self.dblocks = nn.Sequential(*(Block(dwidth, dheads) for _ in decoder.blocks))
        self.dnorm, self.pred = nn.LayerNorm(dwidth, eps=1e-6), nn.Linear(dwidth, decoder.pred.out_features)
        names, parameters = self.names(), dict(ours.named_parameters())
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(parameters[names[name]])

    def names(self) -> dict[str, str]:
        """The name in `Autoencoder` of each parameter."""
        fixed = {
            "conv": "encoder.vit.patch_embed.proj",
            "norm": "encoder.vit.norm",
            "embed": "decoder.embed",
            "dnorm": "decoder.norm",
            "pred": "decoder.pred",
        }
        names = {"cls": "encoder.vit.cls_token", "mask_token": "decoder.mask_token"}
        inner = {
            "qkv": "attn.qkv",
            "proj": "attn.proj",
            "fc1": "mlp.fc1",
            "fc2": "mlp.fc2",
            "norm1": "norm1",
            "norm2": "norm2",
        }
        for name, _ in self.named_parameters():
            head, *rest = name.split(".")
            if head in ("blocks", "dblocks"):
                blocks = "encoder.vit.blocks" if head == "blocks" else "decoder.blocks"
                names[name] = f"{blocks}.{rest[0]}.{inner[rest[1]]}.{rest[2]}"
            elif head in fixed:
                names[name] = f"{fixed[head]}.{rest[0]}"
        return names

    def forward(self, images: Tensor, order: Tensor, visible: int) -> Tensor:
        """Predict all patches from standardized images and the order of their patches, visible ones first."""
        b, n = order.shape
        x = self.conv(images).flatten(2).transpose(1, 2) + self.positions[:, 1:]  # [b, n, d]
        index = order[:, :visible, None].expand(-1, -1, x.shape[2])
        x = torch.gather(x, 1, index)  # [b, v, d]
        x = torch.cat([(self.cls + self.positions[:, :1]).expand(b, -1, -1), x], 1)  # [b, 1 + v, d]
        x = self.embed(self.norm(self.blocks(x)))  # [b, 1 + v, w]
        patches = torch.cat([x[:, 1:], self.mask_token.expand(b, n - visible, -1)], 1)  # [b, n, w]
        back = torch.argsort(order, 1)[:, :, None].expand(-1, -1, x.shape[2])
        x = torch.cat([x[:, :1], torch.gather(patches, 1, back)], 1) + self.dpositions  # [b, 1 + n, w]
        prediction: Tensor = self.pred(self.dnorm(self.dblocks(x)))
        return prediction[:, 1:]  # [b, n, p]


def target_of(images: Tensor, patch: int, eps: float) -> Tensor:
    """All patches [b, n, p], each standardized by itself, values in the order (row, column, channel)."""
    x = F.unfold(images, patch, stride=patch).transpose(1, 2)  # [b, n, c * patch^2]
    x = x.unflatten(2, (images.shape[1], patch * patch)).transpose(2, 3).flatten(2)  # [b, n, patch^2 * c]
    return (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True) + eps).sqrt()


class PlainStep:
    """Student, teacher and optimizer; a call is a training step."""

    def __init__(
        self,
        ours: Autoencoder,
        visible: int,
        gamma: float = 1.0,
        momentum: float = 0.996,
        eps: float = 1e-6,
        lr: float = 1e-3,
    ):
        self.student = PlainAutoencoder(ours)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.visible, self.gamma, self.momentum, self.eps = visible, gamma, momentum, eps
        matrices = [p for p in self.student.parameters() if p.ndim > 1]
        vectors = [p for p in self.student.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))

    def loss(self, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Total, reconstruction and consistency loss of standardized images."""
        hidden = torch.ones_like(order, dtype=images.dtype).scatter_(1, order[:, : self.visible], 0.0)
        prediction = self.student(images, order, self.visible)
        with torch.no_grad():
            teacher_prediction = self.teacher(images, order, self.visible)
        target = target_of(images, self.student.patch, self.eps)
        reconstruction = ((prediction - target).square().mean(2) * hidden).sum() / hidden.sum()
        consistency = ((prediction - teacher_prediction).square().mean(2) * hidden).sum() / hidden.sum()
        return reconstruction + self.gamma * consistency, reconstruction, consistency

    def __call__(self, images: Tensor, order: Tensor) -> list[float]:
        losses = self.loss(images, order)
        losses[0].backward()
        norms = [p.grad.norm() for p in self.student.parameters() if p.grad is not None]
        norm = torch.stack(norms).norm()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                t.mul_(self.momentum).add_((1 - self.momentum) * s)
        return [v.item() for v in (*losses, norm)]
