"""How far a weight passes signals on better than errors."""

import pytest
import torch

from ocs.weight.error import SAMPLE, alignment


def test_random_weights_pass_on_both_alike() -> None:
    torch.manual_seed(0)
    for shape in ((64, 200), (100, 16, 3, 3), (4 * SAMPLE + 3, 96)):
        assert alignment(torch.randn(shape)) == pytest.approx(1, abs=0.05)


def test_it_is_what_the_next_layer_sees_of_signals_over_errors() -> None:
    """Of inputs that a layer of the same Gram matrix gives, over inputs of as much power in all directions."""
    torch.manual_seed(0)
    w = torch.randn(60, 3) @ torch.randn(3, 40)
    among = (w @ w.T).square().sum() / w.square().sum() ** 2
    assert alignment(w) == pytest.approx(float(among / (1 / 60 + 1 / 40)), rel=1e-4)
    assert alignment(w) > 5
    assert alignment(1e-15 * w) == pytest.approx(alignment(w), rel=1e-4)
    assert alignment(w.numpy()) == alignment(w)


def test_groups_count_each_by_itself() -> None:
    torch.manual_seed(0)
    w = torch.randn(2, 30, 2, 1) * torch.ones(1, 1, 1, 50) + 0.1 * torch.randn(2, 30, 2, 50)
    of_each = [alignment(part.reshape(30, -1)) for part in w]
    assert alignment(w.reshape(60, 2, 50), groups=2) == pytest.approx(sum(of_each) / 2)


def test_some_rows_tell_of_the_others() -> None:
    torch.manual_seed(0)
    w = torch.randn(8 * SAMPLE, 5) @ torch.randn(5, 64)
    among = (w @ w.T).square().sum() / w.square().sum() ** 2
    assert alignment(w) == pytest.approx(float(among / (1 / len(w) + 1 / 64)), rel=0.15)


@pytest.mark.parametrize(("shape", "groups"), [((1, 8), 1), ((6, 1, 3, 3), 6), ((4, 0), 1), ((0, 4), 1)])
def test_where_there_is_nothing_to_compare(shape: tuple[int, ...], groups: int) -> None:
    assert alignment(torch.randn(shape), groups) == 2.0


def test_zeros_agree_on_nothing() -> None:
    assert alignment(torch.zeros(4, 8)) == 0.0
