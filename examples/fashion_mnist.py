"""Fashion-MNIST and two networks trained on it: the models and data that the demo, tests and benchmarks share.

The images are the data set's own idx files, padded from 28 x 28 to 32 x 32 with the black background, so that the
ResNet-20 is He et al.'s CIFAR form (arXiv 1512.03385, section 4.2) with one input channel instead of three. The vision
transformer (Dosovitskiy et al., arXiv 2010.11929) stands for networks with LayerNorm and attention.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "fashion-mnist"
WEIGHTS, VIT_WEIGHTS = ASSETS / "resnet20.safetensors", ASSETS / "vit.safetensors"
CLASSES = 10
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, pixels in [0, 1]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a parameter-free shortcut (He et al.'s option A)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.stride = channels // in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in_channels, H, W] -> [N, channels, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1:  # subsample, and fill the new channels with zeros
            new = y.shape[1] - x.shape[1]
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, new // 2, new - new // 2))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """16-32-64 channels, three blocks each: 19 convolutions and one linear layer, 0.27 million weights."""

    def __init__(self, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16), BasicBlock(16, 16))
        self.layer2 = nn.Sequential(BasicBlock(16, 32), BasicBlock(32, 32), BasicBlock(32, 32))
        self.layer3 = nn.Sequential(BasicBlock(32, 64), BasicBlock(64, 64), BasicBlock(64, 64))
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in_channels, 32, 32] -> logits [N, 10]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class ViT(nn.Module):
    """Patches of 4 x 4, four pre-norm layers of width 64 with four heads, mean over tokens: 0.14 million weights."""

    def __init__(self, width: int = 64, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.position = nn.Parameter(torch.empty(64, width).normal_(std=0.02))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 1, 32, 32] -> logits [N, 10]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.encoder(tokens).mean(1))


def read_idx(path: str | Path) -> Tensor:
    """The uint8 tensor in a gzipped idx file: images [N, 28, 28] or labels [N]."""
    data = gzip.decompress(Path(path).read_bytes())
    rank = data[3]
    if data[:3] != b"\0\0\x08" or not 1 <= rank <= 4:
        raise ValueError(f"{path}: not an idx file of unsigned bytes (starts with {data[:4].hex()})")
    shape = np.frombuffer(data, ">i4", rank, offset=4).tolist()
    if len(data) != 4 + 4 * rank + int(np.prod(shape)):
        raise ValueError(f"{path}: {len(data)} bytes do not hold the {shape} that its header promises")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape).copy())


def load(split: str, folder: Path = ASSETS) -> tuple[Tensor, Tensor]:
    """Images, normalized float32 [N, 1, 32, 32] in channels-last, and labels int64 [N].

    split: the file prefix: "t10k" (test), "calibration" (512 training images) or "train" (not shipped).
    """
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    return normalize(F.pad(images, (2, 2, 2, 2))), labels.long()


def normalize(images: Tensor) -> Tensor:
    """uint8 [N, H, W] -> float32 [N, 1, H, W] with zero mean and unit variance over the training set."""
    x = images.unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD)
    return x.contiguous(memory_format=torch.channels_last)


def load_model(weights: Path = WEIGHTS) -> nn.Module:
    """A trained float model, WEIGHTS or VIT_WEIGHTS, in eval mode and channels-last."""
    from safetensors.torch import load_file

    model = ViT() if weights.stem == VIT_WEIGHTS.stem else ResNet20()
    model.load_state_dict(load_file(weights))
    return model.eval().to(memory_format=torch.channels_last)


@torch.inference_mode()
def count_correct(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> int:
    """How many of the images the model puts in the right class (top-1)."""
    pairs = zip(images.split(batch), labels.split(batch), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs)
