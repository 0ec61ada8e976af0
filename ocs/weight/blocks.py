"""A scale for each output channel and block of input channels (granularity="group"): which block a channel is in.

Blocks are `group` expanded channels wide: a weight's own C channels first, then its n copies in blocks of their own;
the last block of either may be narrower. All groups of a grouped convolution are cut alike. A scale is [O, B].
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ocs.kernels.constants import TILE_CHANNELS

GROUP_STEP = TILE_CHANNELS  # of which groups are multiples, as products with packed weights cut them


def count_blocks(channels: int, copies: int, group: int) -> int:
    """Count the blocks of each output channel."""
    return -(-channels // group) - (-copies // group)


def blocks_of(channels: int, copies: int, group: int) -> NDArray[np.int64]:
    """Tell the block of each expanded channel, int64 [C + n]."""
    own, others = np.arange(channels) // group, np.arange(copies) // group
    return np.concatenate([own, -(-channels // group) + others])


def dequantize_weight(ints: Tensor, scale: Tensor, channels: int, group: int) -> Tensor:
    """Dequantize a weight int8 [O, C + n, ...] to float32. group: of channels, where scale is [O, B] and not [] or [O].

    channels: C.
    """
    if scale.dim() < 2:
        return torch.ops.ocs.dequantize(ints, scale)
    block = torch.from_numpy(blocks_of(channels, ints.shape[1] - channels, group)).to(ints.device)
    of_column = scale.index_select(1, block)
    return ints.float() * of_column.view(*of_column.shape, *[1] * (ints.dim() - 2))


def fold_weight(ints: Tensor, scale: Tensor, source: Tensor, groups: int, channels: int, group: int) -> Tensor:
    """Dequantize a weight to float32 [O, C, ...], its copies added back onto their source channel."""
    if scale.dim() < 2:
        return torch.ops.ocs.fold(ints, scale, source, groups, channels)
    expanded = dequantize_weight(ints, scale, channels, group)
    own, copies = expanded.unflatten(0, (groups, len(ints) // groups)).tensor_split([channels], 2)
    first = channels * torch.arange(groups, device=source.device)[:, None]
    within = (source.view(groups, -1)[:, channels:] - first).view(groups, 1, -1, *[1] * (ints.dim() - 2))
    return own.scatter_add(2, within.expand_as(copies), copies).flatten(0, 1)
