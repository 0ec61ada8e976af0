"""What each kind of batch gives to a model's forward, and the errors that name batch and layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ocs

N, T = 4, 5
x, y = torch.randn(N, 8), torch.arange(N)
ids, mask = torch.randint(9, (N, T)), torch.ones(N, T)
image = torch.randn(3, 16, 16)


class Seen(nn.Module):
    """Keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(8, 8), []

    def run(self, *arguments: Any) -> None:
        self.seen.append(arguments)
        self.layer(x)


class One(Seen):
    def forward(self, x: Tensor) -> None:
        self.run(x)


class WithFlag(Seen):
    def forward(self, x: Tensor, features: bool = False) -> None:
        self.run(x, features)


class Two(Seen):
    def forward(self, ids: Tensor, mask: Tensor) -> None:
        self.run(ids, mask)


class Optional(Seen):
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> None:
        self.run(ids, mask)


class AllOptional(Seen):
    def forward(self, ids: Tensor | None = None, mask: Tensor | None = None, labels: Tensor | None = None) -> None:
        self.run(ids, mask)


class Images(Seen):
    def forward(self, images: list[Tensor], targets: list[dict] | None = None) -> None:
        self.run(images, targets)


class ImagesByName(Seen):
    def forward(self, images, targets=None) -> None:
        self.run(images, targets)


class Anything(Seen):
    def forward(self, *args: Any) -> None:
        self.run(*args)


CALLS: list[tuple[type[Seen], Any, tuple]] = [
    (One, x, (x,)),
    (One, (x, y), (x,)),
    (One, [x, y], (x,)),
    (One, (x, x), (x,)),  # an autoencoder's
    (One, (x,), (x,)),
    (One, [x], (x,)),
    (One, ({"x": x}, y), (x,)),
    (WithFlag, (x, y), (x, False)),
    (WithFlag, (x, x), (x, False)),
    (Two, (ids, mask), (ids, mask)),
    (Two, [ids, mask], (ids, mask)),
    (Two, (ids, mask, y), (ids, mask)),
    (Two, {"mask": mask, "ids": ids}, (ids, mask)),
    (Optional, (ids,), (ids, None)),
    (Optional, (ids, y), (ids, None)),
    (Optional, {"ids": ids, "mask": mask}, (ids, mask)),
    (Optional, ({"ids": ids, "mask": mask}, y), (ids, mask)),
    (AllOptional, (torch.randn(N, 3, 8, 8), y), (torch.Tensor, None)),
    (Images, [image], ([image], None)),
    (Images, [image, image[:, :9]], ([image, image[:, :9]], None)),
    (Images, ([image, image], [{}, {}]), ([image, image], None)),
    (Images, ((image, image), ({}, {})), ((image, image), None)),
    (Images, {"images": [image]}, ([image], None)),
    (ImagesByName, [image], ([image], None)),
    (ImagesByName, [torch.stack([image] * 2)], (torch.Tensor, None)),
    (Anything, (x, y), (x,)),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(("kind", "batch", "expected"), CALLS)
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, torch.compile])
def test_forward_gets_what_it_requires(
    kind: type[Seen], batch: Any, expected: tuple, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    model = kind()
    ocs.calibrate(wrap(model), [batch])
    ((*arguments,),) = model.seen
    assert len(arguments) == len(expected)
    for argument, value in zip(arguments, expected, strict=True):
        assert isinstance(argument, Tensor) if value is Tensor else same(argument, value)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a is b or torch.equal(a, b)
    return type(a) is type(b) and (all(map(same, a, b)) if isinstance(a, list | tuple) else a == b)


def test_a_loader_of_ids_and_masks() -> None:
    model = Two()
    ocs.quantize(model, abits=8, calibration=DataLoader(TensorDataset(ids, mask), batch_size=2))
    assert [[part.shape for part in parts] for parts in model.seen] == [[(2, T), (2, T)]] * 2


@pytest.mark.parametrize(
    ("kind", "batch", "message"),
    [
        (Optional, (ids, mask), r"part 1 may be an argument of forward\(ids.*, mask.*\) or the target: give dicts of"),
        (Optional, [ids, ids], r"; {'ids': \.\.\., 'mask': \.\.\.}$"),
        (AllOptional, (ids, mask), r"part 1 may be an argument of forward\(ids.*, mask.*\) or the target"),
        (AllOptional, (ids, mask, y), "it gave 3 things at once, and part 1 may be an argument"),
        (Anything, (x, x), r"part 1 may be an argument of forward\(\*args.*\) or the target: give dicts of arguments"),
        (One, (x, y, y), "it gave 3 things at once: use a callable that runs the model on them, or dicts"),
        (Two, (ids, mask, y, y), "it gave 4 things at once"),
        (One, ({"x": x}, y, y), "it gave 3 things at once"),
        (One, (), "it gave 0 things at once"),
        (Two, (ids, mask.numpy()), "it gave a numpy array"),
        (Two, (ids,), "missing 1 required positional argument: 'mask'"),
        (One, {"z": x}, "unexpected keyword argument 'z'"),
    ],
)
def test_what_is_not_clear_is_asked(kind: type[Seen], batch: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as error:
        ocs.calibrate(kind(), [{"ids": ids, "mask": mask} if kind is not One and kind is not Anything else x, batch])
    assert str(error.value).startswith("data, batch 1: ")


def test_one_pair_is_no_two_batches() -> None:
    with pytest.raises(TypeError, match=r"calibration is one \(batch, target\) pair: put it in a list"):
        ocs.quantize(Optional(), abits=8, calibration=(ids, mask))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.lstm(x)


WIDTHS = [
    (nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 5), "0: its input has 5 channels, it needs 8"),
    (nn.Sequential(nn.Conv2d(8, 4, 3, groups=2)), torch.randn(2, 3, 9, 9), "0: its input has 3 channels, it needs 8"),
    (nn.Sequential(nn.ConvTranspose1d(8, 4, 3)), torch.randn(2, 3, 9), "0: its input has 3 channels, it needs 8"),
    (Recurrent(), torch.randn(2, 2, 5), "lstm: its input has 5 channels, it needs 8"),
]


@pytest.mark.parametrize(("model", "batch", "message"), WIDTHS)
def test_a_wrong_width_names_layer_batch_and_channels(model: nn.Module, batch: Tensor, message: str) -> None:
    fits = batch.movedim(1 if batch.dim() > 2 and isinstance(model, nn.Sequential) else -1, 0)
    right = fits.new_zeros(8, *fits.shape[1:]).movedim(
        0, 1 if batch.dim() > 2 and isinstance(model, nn.Sequential) else -1
    )
    with pytest.raises(ValueError, match=f"^{re.escape(f'data, batch 2: {message}')}$"):
        ocs.calibrate(model, [right, right, batch])


def test_layers_that_nobody_watches_are_named_too() -> None:
    """The first convolution stays float, and sees the batch first."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match=r"^calibration, batch 0: 0: its input has 4 channels, it needs 3$"):
        ocs.quantize(model, abits=8, calibration=[torch.randn(1, 4, 9, 9)])
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(3, 8, 3))
    with pytest.raises(ValueError, match=r"^data, batch 0: 1: its input has 2 channels, it needs 3$"):
        ocs.reestimate_batchnorm(model, [torch.randn(9, 2, 9, 9)])


def test_other_errors_keep_their_kind_and_get_a_note() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == N:
                raise KeyError("broken")
            return x + torch.zeros(3)

    model = nn.Sequential(nn.Linear(8, 8), Broken())
    with pytest.raises(RuntimeError, match="size of tensor") as error:
        ocs.calibrate(model, [x[1:]])
    assert error.value.__notes__ == ["in 1", "in data, batch 0"]
    with pytest.raises(KeyError, match="broken") as error:
        ocs.calibrate(model, [x])
    assert error.value.__notes__ == ["in data, batch 0"]


def test_a_loader_that_fails_names_the_batch() -> None:
    def batches() -> Iterator[Tensor]:
        yield x
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire") as error:
        ocs.calibrate(One(), batches())
    assert error.value.__notes__ == ["in data, batch 1"]
