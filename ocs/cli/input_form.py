"""What a model is called with: the shape of an example, and how an image becomes one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ocs.nn.convolution import CONVOLUTIONS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's and most of timm's have it


@dataclass(frozen=True)
class InputForm:
    """One input of a model.

    shape: of a batch of one. names: of forward's arguments, where it takes them by name. words: the vocabulary, where
    the input is numbers of words, else 0. mean, std: by channel, of pixels in [0, 1]. share: of an image's shorter side
    that is seen. guess: why the shape is only a guess, "" where it is known.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...] = ()
    words: int = 0
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    share: float = 0.875
    interpolation: str = "bilinear"
    guess: str = ""


def guessed_form(module: nn.Module) -> InputForm | None:
    """Guess an input by the first layer of a model; None where nothing tells."""
    sizes: dict[int, tuple[int, ...]] = {1: (1024,), 2: (224, 224), 3: (16, 112, 112)}
    for name, layer in module.named_modules():
        if isinstance(layer, CONVOLUTIONS):
            shape = (1, layer.in_channels, *sizes[len(layer.kernel_size)])
        elif isinstance(layer, nn.Linear):
            shape = (1, layer.in_features)
        elif isinstance(layer, nn.Embedding):
            return InputForm((1, 32), words=layer.num_embeddings, guess=f"by {name or 'the model'}, an Embedding")
        elif isinstance(layer, nn.RNNBase):
            shape = (1, 32, layer.input_size) if layer.batch_first else (32, 1, layer.input_size)
        else:
            continue
        return InputForm(shape, guess=f"by {name or 'the model'}, a {type(layer).__name__}")
    return None


def pretrained_form(config: Mapping[str, Any]) -> InputForm:
    """Read timm's description of what a network was trained on."""
    return InputForm(
        (1, *config.get("input_size", (3, 224, 224))),
        mean=tuple(config.get("mean", MEAN)),
        std=tuple(config.get("std", STD)),
        share=float(config.get("crop_pct") or 0.875),
        interpolation=str(config.get("interpolation", "bilinear")),
    )
