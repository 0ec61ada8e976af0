"""LSTM, GRU and RNN step by step, in torch's operations, for products that no kernel of torch's has.

A step takes what the input gives to each gate and what the hidden state does, both [N, gates H] with their biases, and
the states [N, H]: (h,), or (h, c) of an LSTM. Gates are in torch's order.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

States = tuple[Tensor, ...]  # (h,), or (h, c) of an LSTM


def lstm_step(from_input: Tensor, from_hidden: Tensor, states: States) -> States:
    """Compute the next (o tanh(c), c), before any projection."""
    i, f, g, o = (from_input + from_hidden).chunk(4, -1)
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(from_input: Tensor, from_hidden: Tensor, states: States) -> States:
    """Compute the next h: the reset gate meets what the hidden state gives, its bias included."""
    (r, z, n), (r_h, z_h, n_h) = from_input.chunk(3, -1), from_hidden.chunk(3, -1)
    z = (z + z_h).sigmoid()
    n = (n + (r + r_h).sigmoid() * n_h).tanh()
    return ((1 - z) * n + z * states[0],)


def tanh_step(from_input: Tensor, from_hidden: Tensor, states: States) -> States:
    """Compute the next h of an RNN with tanh."""
    return ((from_input + from_hidden).tanh(),)


def relu_step(from_input: Tensor, from_hidden: Tensor, states: States) -> States:
    """Compute the next h of an RNN with ReLU."""
    return ((from_input + from_hidden).relu(),)


# by torch's kernel, in the order in which the operator `recurrent` numbers cells
STEPS = {"lstm": lstm_step, "gru": gru_step, "rnn_tanh": tanh_step, "rnn_relu": relu_step}


def run_sequence(
    from_input: Tensor, sizes: Sequence[int], states: States, step: Callable[[Tensor, States], States], *, reverse: bool
) -> tuple[Tensor, States]:
    """Run one layer in one direction over all steps.

    Args:
        from_input: what the input gives to each gate, [rows, gates H], the rows of one step after those of another.
        sizes: how many sequences take part in each step, the first ones of all: N, or fewer from step to step.
        states: the initial states, each [N, H].
        step: computes the next states of as many sequences as it gets.
        reverse: from the last step to the first.

    Returns:
        The hidden states after each step, [rows, H] as the input has them, and the final states of each sequence.
    """
    if not len(sizes):
        raise RuntimeError("a recurrent layer's input has no steps: use sequences of at least one")
    outputs, rows = [], from_input.split(sizes)
    for x in reversed(rows) if reverse else rows:
        n = x.shape[0]
        moved = step(x, tuple(state[:n] for state in states))
        outputs.append(moved[0])
        if n < states[0].shape[0]:  # the other sequences have ended, or not yet begun
            moved = tuple(torch.cat([new, old[n:]]) for new, old in zip(moved, states, strict=True))
        states = moved
    return torch.cat(outputs[::-1] if reverse else outputs), states
