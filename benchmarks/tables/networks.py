"""The tables' float networks: torchvision's for ImageNet, ResNet-20 for CIFAR-10, it and a ViT for Fashion-MNIST."""

from __future__ import annotations

import difflib
import hashlib
import pickle
import re
import sys
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from data import CIFAR10, FASHION_MNIST, NAMES, Preset
from fashion_mnist import VIT_WEIGHTS, WEIGHTS, ResNet20, ViT
from torch import Tensor, nn
from zoo import torchvision_models

PAPER = {"VGG16-BN": "vgg16_bn", "ResNet-50": "resnet50", "DenseNet-121": "densenet121", "Inception-V3": "inception_v3"}
RESNET20, VIT, CALLED_VIT = "ResNet-20", "ViT", "ViT-called"
PREFERRED = "IMAGENET1K_V1"  # trained with the recipes of the paper's time
WITH_TRAINING_HEADS = ("inception_v3", "googlenet")
TRAINING_HEADS = ("AuxLogits.", "aux1.", "aux2.")

# Names of weights in files that other versions and repositories wrote, and ours.
RENAMED = (
    (r"^module\.", ""),  # saved from within nn.DataParallel
    (r"^linear\.", "fc."),  # the last layer of many a CIFAR ResNet
    (r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)", r"\1"),  # torchvision's DenseNets, whose files are older
)


@dataclass(frozen=True)
class Network:
    """A float network to be quantized.

    name: the paper's where it has one, else torchvision's; model: in eval mode, on the CPU; preset: what it expects
    of images; identity: SHA-256 of its state, in hex.
    """

    name: str
    model: nn.Module
    preset: Preset
    identity: str


def load_network(name: str, dataset: str, weights: str | Path | None = None) -> Network:
    """A network and its weights.

    Args:
        name: The paper's name or, for imagenet, torchvision's.
        dataset: "imagenet", "cifar10" or "fashion-mnist".
        weights: A file (.safetensors, or .pth and the like for torch.load); "random", the same each time; for imagenet
            the name of torchvision's, to be downloaded. None: IMAGENET1K_V1, or what is bundled for Fashion-MNIST.

    Raises:
        ValueError: No such network, dataset or weights; a file of something else; a download that failed.
    """
    if dataset not in NAMES:
        raise ValueError(f"dataset {dataset!r}: expected one of {', '.join(NAMES)}")
    make = _torchvision if dataset == "imagenet" else _small
    name, model, preset = make(name, dataset, weights)
    return Network(name, model.eval(), preset, _digest(model))


def _torchvision(name: str, _: str, weights: str | Path | None) -> tuple[str, nn.Module, Preset]:
    models = torchvision_models()
    name, ours = _known_name(name, {**PAPER, **{other: other for other in models.list_models(module=models)}})
    members = models.get_model_weights(ours).__members__
    entries = {text: entry for key, entry in members.items() for text in (key, str(entry))}
    preferred = members.get(PREFERRED) or next(iter(members.values()))
    entry = preferred if weights is None else entries.get(str(weights))
    if not entry and weights != "random" and not Path(weights).is_file():
        raise ValueError(f"weights {weights}: no such file; torchvision's for {name} are {', '.join(members)}")
    preset = _preset(entry or preferred)
    model = _random(lambda: models.get_model(ours, weights=None, **_options(ours, preset, weights == "random")))
    if weights != "random":
        _load(model, _download(entry) if entry else _read(Path(weights)), str(entry or weights), name)
    return name, model, preset


def _options(name: str, preset: Preset, random: bool) -> dict[str, Any]:
    """What torchvision builds a pretrained network with, less the heads that only training runs."""
    if name in WITH_TRAINING_HEADS:
        return {"transform_input": True, "init_weights": random, "aux_logits": False}
    return {"image_size": preset.crop} if name.startswith("vit_") else {}


def _preset(entry: Any) -> Preset:
    """Of one of torchvision's weights."""
    theirs = entry.transforms()
    (resize,), (crop,) = theirs.resize_size, theirs.crop_size
    return Preset(resize, crop, tuple(theirs.mean), tuple(theirs.std), theirs.interpolation.value)


def _small(name: str, dataset: str, weights: str | Path | None) -> tuple[str, nn.Module, Preset]:
    bundled: dict[str, Path | None] = {RESNET20: None}
    if dataset == "fashion-mnist":
        bundled = {RESNET20: WEIGHTS, VIT: VIT_WEIGHTS, CALLED_VIT: VIT_WEIGHTS}
    name, _ = _known_name(name, {known: known for known in bundled} | {"resnet20": RESNET20})
    preset = CIFAR10 if dataset == "cifar10" else FASHION_MNIST
    weights = bundled[name] if weights is None else weights
    if weights is None:
        raise ValueError("no ResNet-20 for CIFAR-10 comes with this repository; give a trained one as --weights FILE")
    model = _random({VIT: ViT, CALLED_VIT: called_vit}.get(name, lambda: ResNet20(len(preset.mean))))
    if weights != "random":
        _load(model, _read(Path(weights)), str(weights), name)
    return name, model, preset


class CalledEncoderLayer(nn.Module):
    """A pre-norm nn.TransformerEncoderLayer with GELU that calls its linear layers, as most transformers do."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        for name in ("self_attn", "linear1", "linear2", "norm1", "norm2"):
            setattr(self, name, getattr(layer, name))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, tokens, width] -> the same shape."""
        y = self.norm1(x)
        x = x + self.self_attn(y, y, y, need_weights=False)[0]
        return x + self.linear2(nn.functional.gelu(self.linear1(self.norm2(x))))


def called_vit() -> nn.Module:
    """Make the ViT of layers that are called, with the same names in its state."""
    model = ViT()
    encoder = nn.Sequential()
    encoder.layers = nn.Sequential(*map(CalledEncoderLayer, model.encoder.layers))
    encoder.norm = model.encoder.norm
    model.encoder = encoder
    return model


def _known_name(name: str, known: dict[str, str]) -> tuple[str, str]:
    """(the paper's name or torchvision's, torchvision's) of a network, in capitals or not."""
    lower = {other.lower(): other for other in known}
    if name.lower() not in lower:
        close = [lower[other] for other in difflib.get_close_matches(name.lower(), lower, 5, 0.5)] or sorted(known)[:5]
        raise ValueError(f"no network {name!r}; did you mean {', '.join(close)}?")
    found = known[lower[name.lower()]]
    return next((paper for paper, theirs in PAPER.items() if theirs == found), found), found


def _random(build: Any) -> nn.Module:
    """What `build` makes, the same each time, whatever random numbers were drawn before and leaving them alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def _download(entry: Any) -> dict[str, Tensor]:
    """The state of torchvision's weights, from its cache or the network."""
    try:
        return entry.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, map_location="cpu")
    except (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = f"{entry.url} cannot be downloaded to {torch.hub.get_dir()}/checkpoints ({error})"
        raise ValueError(f"{entry}: {reason}; get it elsewhere and give it as --weights FILE") from error


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, also from inside a checkpoint."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: not readable as weights ({reason}); save a state_dict() with torch.save") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: no state dict, which is names and tensors; save a state_dict() with torch.save")
    return state


def _load(model: nn.Module, state: dict[str, Tensor], source: str, name: str) -> None:
    """The state into the model, all of it."""
    for key in list(state):
        renamed = key
        for pattern, replacement in RENAMED:
            renamed = re.sub(pattern, replacement, renamed)
        value = state.pop(key)
        if not renamed.startswith(TRAINING_HEADS):
            state[renamed] = value
    own = model.state_dict()
    problems = {
        "missing": [key for key in own if key not in state and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [key for key in own if key in state and own[key].shape != state[key].shape],
    }
    if any(problems.values()):
        text = "; ".join(f"{what}: {_some(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(f"{source}: not the weights of {name}; {text}")
    model.load_state_dict(state, strict=False)  # the counters of old batch norms may be missing


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return ", ".join(keys[:4]) + more


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.contiguous().numpy())
    return digest.hexdigest()
