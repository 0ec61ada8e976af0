"""Make everything in assets/fashion-mnist again: train the networks, copy the test images, pick calibration images.

    apt-get install dataset-fashion-mnist
    python examples/train_fashion_mnist.py --data /usr/share/datasets/fashion-mnist
    python examples/train_fashion_mnist.py --data /usr/share/datasets/fashion-mnist --network vit

About half an hour each on two cores. The last epoch's weights are kept: no test image takes part in any choice.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import struct
from pathlib import Path

import torch
import torch.nn.functional as F
from fashion_mnist import ASSETS, VIT_WEIGHTS, WEIGHTS, ResNet20, ViT, count_correct, load, normalize, read_idx
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

CALIBRATION_IMAGES = 512


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 [N, 28, 28] -> [N, 32, 32]: padded, shifted by up to two pixels each way, mirrored half of the time."""
    n = len(images)
    padded = F.pad(images, (4, 4, 4, 4))
    rows, columns = (torch.randint(0, 5, (n, 1), generator=generator) + torch.arange(32) for _ in range(2))
    mirrored = torch.rand((n, 1), generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def network(name: str, lr: float | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network, and SGD with Nesterov momentum or AdamW to train it."""
    if name == "vit":
        model = ViT()
        return model, torch.optim.AdamW(model.parameters(), lr=lr or 2e-3, weight_decay=0.05)
    model = ResNet20().to(memory_format=torch.channels_last)
    return model, torch.optim.SGD(model.parameters(), lr=lr or 0.2, momentum=0.9, weight_decay=5e-4, nesterov=True)


def train(data: Path, name: str, epochs: int, batch: int, lr: float | None, seed: int) -> nn.Module:
    """On a one-cycle schedule; prints the test accuracy after each epoch."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images = read_idx(data / "train-images-idx3-ubyte.gz")
    labels = read_idx(data / "train-labels-idx1-ubyte.gz").long()
    test = load("t10k", data)
    model, optimizer = network(name, lr)
    steps = len(images) // batch
    peak = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=epochs * steps)
    for epoch in range(1, epochs + 1):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for i in tqdm(range(steps), f"epoch {epoch}/{epochs}", leave=False, mininterval=5):
            picked = order[i * batch : (i + 1) * batch]
            x = normalize(augment(images[picked], generator))
            loss = F.cross_entropy(model(x), labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        print(
            f"epoch {epoch}: loss {loss.item():.3f}, test top-1 {count_correct(model, *test) / 100:.2f} %", flush=True
        )
    return model


def write_idx(path: Path, data: Tensor) -> None:
    """A gzipped idx file without a time stamp, so that the same images give the same bytes."""
    header = struct.pack(f">4B{data.dim()}i", 0, 0, 8, data.dim(), *data.shape)
    path.write_bytes(gzip.compress(header + data.numpy().tobytes(), 9, mtime=0))


def write_images(data: Path, seed: int) -> None:
    """The test images as they are, and a random few training images for calibration."""
    ASSETS.mkdir(parents=True, exist_ok=True)
    images = read_idx(data / "train-images-idx3-ubyte.gz")
    labels = read_idx(data / "train-labels-idx1-ubyte.gz")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_IMAGES]
    write_idx(ASSETS / "calibration-images-idx3-ubyte.gz", images[order])
    write_idx(ASSETS / "calibration-labels-idx1-ubyte.gz", labels[order])
    for part in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        shutil.copyfile(data / part, ASSETS / part)


def main() -> None:
    """Write the images, train, and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four idx.gz files of Fashion-MNIST")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--network", choices=("resnet20", "vit"), default="resnet20", help="%(default)s")
    parser.add_argument("--lr", type=float, help="peak of the one-cycle schedule; 0.2, of vit 0.002")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_images(args.data, args.seed)
    model = train(args.data, args.network, args.epochs, args.batch, args.lr, args.seed)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, VIT_WEIGHTS if args.network == "vit" else WEIGHTS)


if __name__ == "__main__":
    main()
