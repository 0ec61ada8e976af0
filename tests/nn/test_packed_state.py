"""States of packed layers: they travel, and whatever is wrong with one is said and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ocs
from ocs.nn.packed.weight import PackedWeight

pytestmark = pytest.mark.usefixtures("one_thread")


def quantized(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 24), nn.LSTM(24, 10), nn.Conv2d(4, 6, 3, groups=2)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p[..., :1] *= 5
    ocs.quantize(net, **{"wbits": 4, "r": 0.3, "skip": None, "granularity": "channel"} | options)
    return net


def packed(**options: Any) -> nn.Sequential:
    return ocs.pack(quantized(**options))


def on_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("assign", [False, True])
def test_round_trip(assign: bool) -> None:
    net, other = packed(), packed()
    for layer in other:
        for tensor in layer.state_dict().values():
            tensor.zero_()
    keys = other.load_state_dict(copy.deepcopy(net.state_dict()), assign=assign)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert same(net.state_dict(), other.state_dict())
    x = torch.randn(3, 40)
    assert torch.equal(net[0](x), other[0](x))


def test_what_it_holds() -> None:
    """Codes, scales and the channels of the copies: no float weight, and nothing twice."""
    state = packed().state_dict()
    assert [name for name in state if name.startswith("0.")] == ["0.bias", "0.weight_packed", "0.scale", "0.copies"]
    assert {name: state[f"1.{name}_hh_l0"].dtype for name in ("scale", "copies")} == {
        "scale": torch.float32, "copies": torch.int32
    }  # fmt: skip
    assert state["1.weight_hh_l0_packed"].dtype == torch.uint8


def test_onto_the_meta_device_and_back() -> None:
    net = packed()
    state, other = net.state_dict(), copy.deepcopy(net).to("meta")
    assert other[0](torch.empty(3, 40, device="meta")).shape == (3, 24)
    assert other[0].weight.shape == (24, 40)
    assert "packed in" in repr(other)
    other.load_state_dict(state, assign=True)
    assert torch.equal(other[0].weight, net[0].weight)
    other = copy.deepcopy(net).to("meta").to_empty(device="cpu")
    other.load_state_dict(state)
    assert same(other.state_dict(), state)


BAD: dict[str, dict[str, Callable[[Tensor], object]]] = {
    "codes out of range": {"0.weight_packed": lambda t: torch.full_like(t, 255)},
    "codes out of range, gapless": {"2.weight_packed": lambda t: torch.full_like(t, 255)},
    "too few codes": {"0.weight_packed": lambda t: t[:-1]},
    "too many codes": {"1.weight_hh_l0_packed": lambda t: torch.cat([t, t])},
    "signed codes": {"0.weight_packed": lambda t: t.view(torch.int8)},
    "codes of floats": {"0.weight_packed": lambda t: t.float()},
    "no codes": {"0.weight_packed": lambda t: None},
    "no scale": {"0.scale": lambda t: None},
    "no copies": {"1.copies_ih_l0": lambda t: None},
    "negative scale": {"0.scale": lambda t: -t},
    "scale of zero": {"0.scale": lambda t: t * 0},
    "infinite scale": {"1.scale_hh_l0": lambda t: t / 0},
    "unknown scale": {"2.scale": lambda t: t * torch.nan},
    "one scale for all": {"0.scale": lambda t: t[0]},
    "copy of no channel": {"0.copies": lambda t: t + 40},
    "copy of a negative channel": {"0.copies": lambda t: t * 0 - 1},
    "copy of another group": {"2.copies": lambda t: t.flip(0)},
    "fractions of channels": {"0.copies": lambda t: t + 0.5},
    "another number of copies": {"0.copies": lambda t: t[1:]},
    "on the meta device in part": {"0.scale": on_meta},
    "a list": {"0.copies": Tensor.tolist},
    "sparse": {"0.weight_packed": Tensor.to_sparse},
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_each_tensor_is_checked(case: str, assign: bool) -> None:
    net = packed()
    before, state = copy.deepcopy(net.state_dict()), net.state_dict()
    for name, damage in BAD[case].items():
        state[name] = damage(state[name])
        if state[name] is None:
            del state[name]
    layer = next(iter(BAD[case])).partition(".")[0]
    with pytest.raises(RuntimeError, match=rf"\n\t{layer}: \w+ (is|has|must be|without) "):
        net.load_state_dict(state, assign=assign, strict=False)
    assert same(net.state_dict(), before)


@pytest.mark.parametrize("strict", [False, True])
def test_a_state_of_the_other_form_says_what_to_do(strict: bool) -> None:
    ours, theirs = packed(), quantized()
    with pytest.raises(RuntimeError, match=r"0: the state is of a model that is not packed: .*call ocs.unpack on this"):
        ours.load_state_dict(theirs.state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match=r"1: the state is of a packed model: .*call ocs.pack on this one first"):
        theirs.load_state_dict(ours.state_dict(), strict=strict)
    assert ocs.pack(theirs).load_state_dict(ours.state_dict())


@pytest.mark.parametrize("options", [{"wbits": 5}, {"r": 0.1}, {"granularity": "tensor"}])
def test_a_state_of_other_options_is_refused(options: dict[str, Any]) -> None:
    net, other = packed(), packed(**options)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        net.load_state_dict(other.state_dict())
    assert same(net.state_dict(), before)


def test_of_another_input_grid() -> None:
    net, other = (packed(abits=bits, act_scale="dynamic", skip=["1", "2"]) for bits in (8, 4))
    with pytest.raises(RuntimeError, match=r"input_form is .*: the state is of another input"):
        net.load_state_dict(other.state_dict(), strict=False)


def test_part_of_a_state() -> None:
    net, state = packed(), packed().state_dict()
    part = {name: tensor for name, tensor in state.items() if not name.startswith("0.")}
    assert len(net.load_state_dict(part, strict=False).missing_keys) == 4


# --- Sums of halves ---------------------------------------------------------------------------------------------------


def halves(bits: int) -> tuple[Tensor, Tensor]:
    """Integers [16, 30 + 8] of 30 channels of which 8 are split once, and their source."""
    generator = torch.Generator().manual_seed(bits)
    most = 2 ** (bits - 1) - 1
    sums = torch.randint(-most, most + 1, (16, 30), generator=generator)
    sums[:, :8] = torch.randint(-2 * most, 2 * most + 1, (16, 8), generator=generator)
    ints = torch.cat([sums[:, :8] >> 1, sums[:, 8:], (sums[:, :8] + 1) >> 1], 1)
    return ints.to(torch.int8), torch.cat([torch.arange(30), torch.arange(8)])


BYTES = {2: (192, 192), 3: (320, 256), 4: (320, 320), 5: (448, 384), 6: (512, 448), 7: (640, 512)}  # of both forms


@pytest.mark.parametrize("bits", range(2, 9))
def test_halves_are_added_up_where_that_takes_less(bits: int) -> None:
    """38 columns take ten lines, 30 sums in one bit more take eight; 8 bits have none more."""
    ints, source = halves(bits)
    weight = PackedWeight.of(ints, torch.tensor(0.5), source, bits, 1, 30)
    as_they_are, added_up = BYTES.get(bits, (640, 999))
    assert weight.form.added_up == (added_up < as_they_are)
    assert weight.form.packed_bytes() == weight.codes.numel() == min(as_they_are, added_up)
    assert torch.equal(weight.integers(), ints)
    assert torch.equal(weight.source(), source)
    expected = torch.ops.ocs.fold(ints, torch.tensor(0.5), source, 1, 30)
    assert torch.equal(weight.folded(), expected)
    x = torch.randn(5, 30)
    torch.testing.assert_close(weight.multiply(x, None), x @ expected.t(), rtol=1e-5, atol=1e-4)


def test_what_is_no_halves_is_kept_as_it_is() -> None:
    ints, source = halves(4)
    apart = torch.cat([ints[:, :30], -ints[:, 30:]], 1)
    twice = source.clone()
    twice[-1] = 0  # split twice
    for each, of in ((apart, source), (ints, twice)):
        weight = PackedWeight.of(each, torch.tensor(0.5), of, 4, 1, 30)
        assert not weight.form.added_up
        assert torch.equal(weight.integers(), each)
        assert torch.equal(weight.source(), of)
