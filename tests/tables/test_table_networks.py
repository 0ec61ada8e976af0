"""The float networks of the paper's tables: torchvision's and ResNet-20, from files, by name, at random, or refused."""

from __future__ import annotations

import os
from pathlib import Path

import data
import networks
import pytest
import torch
from data import CIFAR10, Preset, normalize
from fashion_mnist import ResNet20
from networks import load_network
from test_table_data import SMALL, Malicious, one_line
from zoo import torchvision_models

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", networks.PAPER)
def test_paper_networks(name: str) -> None:
    before = torch.random.get_rng_state()
    network = load_network(name.lower(), "imagenet", "random")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert network.name == name
    assert not network.model.training
    size = (342, 299) if name == "Inception-V3" else (256, 224)
    assert network.preset == Preset(*size, SMALL.mean, SMALL.std)
    with torch.inference_mode():
        assert network.model(torch.zeros(1, 3, 75, 75)).shape == (1, 1000)
    if name == "DenseNet-121":  # the smallest
        torch.manual_seed(5)
        assert load_network("densenet121", "imagenet", "random").identity == network.identity


def old_densenet(state: dict) -> dict:
    """Under the names in torchvision's file."""
    return {key.replace("norm1", "norm.1").replace("conv2", "conv.2"): value for key, value in state.items()}


@pytest.mark.parametrize(
    ("name", "change"),
    [("DenseNet-121", old_densenet), ("squeezenet1_1", lambda state: {"model": state, "epoch": 90})],
)
def test_torchvision_network_from_a_file(name: str, change: object, tmp_path: Path) -> None:
    network = load_network(name, "imagenet", "random")
    state = {key: value + 1 for key, value in network.model.state_dict().items()}
    torch.save(change(state), tmp_path / "x.pth")
    ours = load_network(name, "imagenet", tmp_path / "x.pth")
    assert ours.name == name
    assert ours.identity != network.identity
    assert all(torch.equal(value, state[key]) for key, value in ours.model.state_dict().items())


def test_inception_file_holds_what_its_builder_makes(tmp_path: Path) -> None:
    """Also heads that only training runs, and images in another range than ours."""
    theirs = torchvision_models().inception_v3(weights=None, init_weights=False, transform_input=True).eval()
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    ours = load_network("Inception-V3", "imagenet", tmp_path / "x.pth").model
    x = torch.randn(1, 3, 75, 75)
    with torch.inference_mode():
        assert torch.equal(ours(x), theirs(x))
    assert not any("ux" in key for key in ours.state_dict())


def test_torchvision_weights_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    random = load_network("mobilenet_v2", "imagenet", "random")
    entries = torchvision_models().MobileNet_V2_Weights
    for seed, entry in enumerate((entries.IMAGENET1K_V1, entries.IMAGENET1K_V2)):
        state = {key: value + seed for key, value in random.model.state_dict().items()}
        torch.save(state, tmp_path / "checkpoints" / Path(entry.url).name)
    first, second = load_network("mobilenet_v2", "imagenet"), load_network("mobilenet_v2", "imagenet", "DEFAULT")
    assert first.identity == random.identity != second.identity
    assert (first.preset.resize, second.preset.resize) == (256, 232)
    for text in ("IMAGENET1K_V2", "MobileNet_V2_Weights.IMAGENET1K_V2"):
        assert load_network("mobilenet_v2", "imagenet", text).identity == second.identity
    with pytest.raises(
        ValueError, match=r"no such file; torchvision's for mobilenet_v2 are IMAGENET1K_V1, IMAGENET1K_V2"
    ):
        load_network("mobilenet_v2", "imagenet", "ResNet50_Weights.IMAGENET1K_V2")


def test_failed_download_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise torch.hub.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    with pytest.raises(
        ValueError, match=r"squeezenet1_1-.*not known.*get it elsewhere and give it as --weights FILE"
    ) as e:
        load_network("squeezenet1_1", "imagenet")
    one_line(e)


@pytest.mark.parametrize(
    ("name", "dataset", "weights", "message"),
    [
        ("ResNet-5", "imagenet", None, "no network 'ResNet-5'; did you mean ResNet-50"),
        ("densenet12", "imagenet", None, "densenet121"),
        ("\u00a7", "imagenet", None, "did you mean"),
        ("ResNet-50", "cifar10", None, "did you mean ResNet-20"),
        ("ResNet-20", "mnist", None, "expected one of imagenet, cifar10, fashion-mnist"),
        ("ResNet-20", "cifar10", None, "give a trained one as --weights FILE"),
        ("ResNet-20", "cifar10", "nowhere.pth", "nowhere.pth: not readable as weights"),
        ("ResNet-50", "imagenet", "nowhere.pth", "nowhere.pth: no such file; torchvision's for ResNet-50 are"),
    ],
)
def test_networks_refuse(name: str, dataset: str, weights: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_network(name, dataset, weights)
    one_line(error)


def akamaster(state: dict) -> dict:
    """As the common repository for CIFAR's ResNets saves them."""
    return {
        "state_dict": {f"module.{key.replace('fc.', 'linear.')}": value for key, value in state.items()},
        "best": 91.7,
    }


@pytest.mark.parametrize(
    "change", [dict, akamaster, lambda state: {k: v for k, v in state.items() if "num_b" not in k}]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_resnet20_from_a_file(change: object, suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(3)
    theirs, path = ResNet20(in_channels=3), tmp_path / f"resnet20{suffix}"
    state = change(theirs.state_dict())
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state.get("state_dict", state), path)
    network = load_network("ResNet-20", "cifar10", path)
    assert network.preset == CIFAR10
    assert network.identity == networks._digest(theirs)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(network.model(x), theirs.eval()(x))


def test_resnet20_of_fashion_mnist_and_at_random() -> None:
    bundled = load_network("resnet20", "fashion-mnist")
    x, y = data.fashion_mnist("calibration")[:128]
    with torch.inference_mode():
        assert (bundled.model(normalize(x, bundled.preset)).argmax(1) == y).float().mean() > 0.9
    assert bundled.name == "ResNet-20"
    assert load_network("ResNet-20", "fashion-mnist", networks.WEIGHTS).identity == bundled.identity
    assert load_network("ResNet-20", "fashion-mnist", "random").identity != bundled.identity
    assert load_network("ResNet-20", "cifar10", "random").model.conv1.in_channels == 3


def test_files_of_something_else(tmp_path: Path) -> None:
    def message(dataset: str = "cifar10", suffix: str = ".pth") -> str:
        with pytest.raises(ValueError, match=str(tmp_path / "x")) as error:
            load_network("ResNet-20", dataset, tmp_path / f"x{suffix}")
        return one_line(error)

    def save(content: object) -> None:
        torch.save(content, tmp_path / "x.pth")

    state = ResNet20(in_channels=3).state_dict()
    save(state)
    assert message("fashion-mnist").endswith("not the weights of ResNet-20; of another shape: conv1.weight")
    save({f"net.{key}": value for key, value in state.items()})
    assert "missing: conv1.weight, bn1.weight, bn1.bias, bn1.running_mean and 9" in message()
    assert "; unexpected: net.conv1.weight, " in message()
    for content in ([1, 2], {"epoch": 3}, {"state_dict": {"conv1.weight": "text"}}):
        save(content)
        assert "no state dict" in message()
    save(ResNet20())  # a pickled model
    assert "not readable as weights" in message()
    save(Malicious(os.mkdir, str(tmp_path / "mark")))
    assert "not readable as weights" in message()
    assert not (tmp_path / "mark").exists()
    for content in (b"", b"version https://git-lfs.github.com/spec/v1", b"PK\3\4 and so on"):
        for suffix in (".pth", ".safetensors"):
            (tmp_path / f"x{suffix}").write_bytes(content)
            assert "not readable as weights" in message(suffix=suffix)
