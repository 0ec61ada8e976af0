"""Convolutions that standardize their weight at every call, timm's and BiT's: as plain ones with the weight they use.

Each filter has its mean taken away and is divided by its deviation (Qiao et al. 2019, arXiv 1903.10520), and in scaled
ones multiplied by a gain (Brock et al. 2021, arXiv 2101.08692). That depends on the weight alone, so once is enough.
"""

import torch
from torch import Tensor, nn

_KINDS = {
    "std_conv": ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"),  # of timm
    "modeling_bit": ("WeightStandardizedConv2d",),  # of transformers
}
_NOT_PLAIN = {"eps", "gain", "gain_init", "scale", "same_pad", "pad"}  # what a plain convolution has not


def made_permanent(module: nn.Module) -> nn.Module | None:
    """Make the plain convolution that computes what this one does; None where it is none that standardizes its weight.

    Nor is there one where it pads its input by its size.
    """
    kind = type(module)
    if kind.__name__ not in _KINDS.get(kind.__module__.rpartition(".")[2], ()) or "weight" not in module._parameters:
        return None
    if module.weight is None or "forward" in vars(module) or getattr(module, "same_pad", False) or module._modules:
        return None
    plain = nn.Conv2d.__new__(nn.Conv2d)
    vars(plain).update({name: value for name, value in vars(module).items() if name not in _NOT_PLAIN})
    weight = nn.Parameter(standardized_weight(module), module.weight.requires_grad)
    vars(plain)["_parameters"] = {"weight": weight, "bias": module.bias}
    return plain


def standardized_weight(module: nn.Module) -> Tensor:
    """Compute the weight that the convolution uses; in float64, rounded once."""
    weight = module.weight.detach().double()
    variance, mean = torch.var_mean(weight.flatten(1), 1, correction=0)
    factor = (variance + module.eps).rsqrt()
    if "gain" in module._parameters:
        factor = factor * module.gain.detach().double().flatten() * module.scale
    shape = (-1, *[1] * (weight.dim() - 1))
    return ((weight - mean.view(shape)) * factor.view(shape)).to(module.weight.dtype)
