"""Names in reports and files are those of the model inside its wrappers, which go on working."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ocs

pytestmark = pytest.mark.usefixtures("one_thread")


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "both": lambda model: compiled(nn.DataParallel(model)),
    "checkpoint": checkpoint_wrapper,
}
x = torch.randn(2, 3, 6, 6)


class Net(nn.Module):
    """A block that may be wrapped, too."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = nn.Module.eval) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.body[1].running_mean.uniform_(0, 1)
        self.body[3] = wrap(self.body[3])
        self.body = wrap(self.body)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("case", WRAPPERS)
@torch.no_grad()
def test_names_are_those_of_the_model_inside(case: str, inside: bool, tmp_path: Path) -> None:
    wrap, plain = WRAPPERS[case], Net().eval()
    model = wrap(Net(wrap) if inside else Net()).eval()
    before = model(x)
    options = {"wbits": 4, "abits": 8, "skip": None, "fold_bn": True, "correct_bias": True, "recipe": "best"}
    expected = ocs.quantize(plain, calibration=[x], **options)
    report = ocs.quantize(model, calibration=ocs.calibrate(model, [x]), **options)
    assert [line.name for line in report.layers] == [line.name for line in expected.layers]
    assert report.batch_norms == expected.batch_norms == {"body.1": ""}
    torch.testing.assert_close(model(x), plain(x))
    assert not torch.equal(model(x), before)
    ocs.save(model, tmp_path / "file")
    assert torch.equal(ocs.load(tmp_path / "file", Net().eval())(x), plain(x))
    other = wrap(Net(wrap) if inside else Net()).eval()
    assert ocs.load(tmp_path / "file", other) is other
    torch.testing.assert_close(other(x), plain(x))


def test_norms_inside_are_measured() -> None:
    plain, model = Net().eval(), nn.DataParallel(Net().eval())
    ocs.reestimate_batchnorm(plain, [x])
    ocs.reestimate_batchnorm(model, [x], reference=None)
    assert torch.equal(model.module.body[1].running_var, plain.body[1].running_var)
    a, b = (ocs.synthesize(each, (3, 6, 6), images=2, steps=2)[0] for each in (plain, model))
    assert torch.equal(a, b)


def test_a_wrapped_layer_cannot_replace_itself() -> None:
    with pytest.raises(TypeError, match="which cannot replace itself in place"):
        ocs.quantize(nn.DataParallel(nn.Linear(3, 3)))
