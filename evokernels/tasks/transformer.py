"""A small causal transformer that predicts the next character."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.nn import functional

from evokernels.tasks.texts import CONTEXT

__all__ = ["CharTransformer"]

WIDTH = 128
HEADS = 4
LAYERS = 2
INIT_STD = 0.02  # of all weight matrices, Radford et al. 2019 (GPT-2)


class CharTransformer(nn.Module):
    """2 layers of width 128 with 4 heads and learned positions, normalised before each part.

    The fourth network of the source system, which leaves its details open: they are those of
    GPT-2 (Radford et al. 2019, section 2.3), without dropout.

    Args:
        classes: number of different characters.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(classes, WIDTH)
        self.positions = nn.Parameter(torch.empty(CONTEXT, WIDTH))
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, classes)
        nn.init.normal_(self.positions, std=INIT_STD)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                # what is added to the residual stream, so that its variance is that of one layer
                added = name.endswith(("attention.out", "mlp.2"))
                nn.init.normal_(module.weight, std=INIT_STD / (2 * LAYERS if added else 1) ** 0.5)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, classes) of the characters after each of x, int64 (B, T), T at most 64."""
        embedded = self.characters(x) + self.positions[: x.shape[1]]
        return self.head(self.norm(self.layers(embedded)))


class Layer(nn.Module):
    """Attention and a perceptron, each added to what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, 128) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Every position reads itself and what comes before."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, 128) to the same shape."""
        heads = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH // HEADS))  # (B, T, 3, 4, 32)
        # Torch's attention on a CPU takes three times as long in bfloat16 as in float32, backward
        # above all (2.14, a processor with AVX512-BF16): autocast must not choose that there.
        on_cpu = x.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if on_cpu else contextlib.nullcontext():
            q, k, v = (heads.float() if on_cpu else heads).permute(2, 0, 3, 1, 4)
            read = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(read.transpose(1, 2).flatten(-2))  # from (B, 4, T, 32)
