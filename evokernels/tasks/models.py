"""The two small networks of the source system, and what else image networks are made of."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["CifarCNN", "ConvNet", "Residual", "SmallCNN"]


class ConvNet(nn.Module):
    """A network for images in two parts, both of modules in a row."""

    features: nn.Sequential
    classifier: nn.Sequential

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, 10) of normalised images (N, C, H, W)."""
        return self.classifier(self.features(x))


class SmallCNN(ConvNet):
    """For grey images (N, 1, 28, 28); 824,458 parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 256),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(256, classes),
        )


class CifarCNN(ConvNet):
    """For colour images (N, 3, 32, 32); 2,168,554 parameters.

    The source system says that there is one batch norm in each block, not where: here it follows
    the block's first convolution.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(*_block(3, 32), *_block(32, 64))
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * 8 * 8, 512),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(512, classes),
        )


def _block(channels_in: int, channels: int) -> list[nn.Module]:
    """Two convolutions, then half the height and width."""
    return [
        nn.Conv2d(channels_in, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
    ]


class Residual(nn.Module):
    """An image and what two convolutions make of it: x + conv3x3(relu(conv3x3(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU()
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) → the same."""
        return x + self.second(self.relu(self.first(x)))
