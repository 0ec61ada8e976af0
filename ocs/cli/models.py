"""MODEL on the command line: torchvision:NAME, timm:NAME, hf:FOLDER or module:factory, as a float nn.Module."""

import difflib
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ocs.cli.input_form import InputForm, guessed_form, pretrained_form
from ocs.cli.say import Notes, UsageError
from ocs.cli.weights import check_file, put_weights

FORMS = "torchvision:NAME, timm:NAME, hf:FOLDER or module:factory"
PRETRAINED = "pretrained"  # as --weights: those that torchvision or timm has by that name
RANDOM = "random"  # those of an architecture alone, into which a quantized file is loaded


@dataclass(frozen=True)
class Loaded:
    """A float model in eval mode, what it is called with, and where its weights are from."""

    model: str  # MODEL
    module: nn.Module
    form: InputForm | None
    weights: str  # the name of a file, PRETRAINED, RANDOM, or "" where MODEL brings them


def is_model(text: str) -> bool:
    """Tell whether a text has the form of MODEL."""
    kind, colon, name = text.partition(":")
    parts = kind.split(".")
    return bool(colon and name) and parts[-1] != "py" and all(part.isidentifier() for part in parts)


def as_model(text: str) -> str:
    """Check the form of MODEL."""
    if not is_model(text):
        raise UsageError(f"{text!r} is no MODEL: use {FORMS}")
    return text


def load_model(model: str, weights: str | None, notes: Notes) -> Loaded:
    """Build a MODEL, with weights from a file, those it is known by (PRETRAINED), those it brings, or random ones."""
    as_model(model)
    if weights not in (None, PRETRAINED, RANDOM):
        check_file(weights)
    kind, _, name = model.partition(":")
    make = _MAKERS.get(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, form, origin = _from_factory(model, weights) if make is None else make(name, weights)
    if weights not in (None, PRETRAINED, RANDOM):
        put_weights(module, weights, notes)
        origin = Path(weights).name
    if origin == RANDOM:
        notes.add(f"{model}: its weights are random (seed 0): --weights FILE gives others")
    return Loaded(model, module.eval(), form or guessed_form(module), origin)


def without_values(model: str, weights: str | None) -> tuple[nn.Module | str, InputForm | None]:
    """Build a MODEL whose weights stay in files, on the meta device (of transformers, name it), and what it takes."""
    kind, _, name = model.partition(":")
    if kind == "hf":
        _needed("transformers", lambda: _beside_torchvision("transformers"))
        from ocs.hf import on_meta

        return name, _form_of(on_meta(Path(name), None)) if (Path(name) / "config.json").is_file() else None
    if weights in (None, PRETRAINED):
        raise UsageError(f"{model} --stream: say where its weights are: --weights, a safetensors file or a folder")
    with torch.device("meta"):
        loaded = load_model(model, RANDOM, Notes(shown=False))
    return loaded.module, loaded.form


Made = tuple[nn.Module, InputForm | None, str]


# --- torchvision and timm ---------------------------------------------------------------------------------------------

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, Tensor dets_scale, Tensor s_scale, float iou_threshold) -> Tensor",
)
_LIBRARIES: list[torch.library.Library] = []  # a library's definitions live as long as it does


def torchvision_module(name: str) -> ModuleType:
    """Import a module of torchvision; under a CPU torch a wheel linked against CUDA registers no operators.

    Their schemas suffice to import it. They are defined only where the plain import failed.
    """
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _LIBRARIES:
            raise
    for each in [each for each in sys.modules if each.split(".")[0] == "torchvision"]:
        del sys.modules[each]
    library = torch.library.Library("torchvision", "DEF")
    for schema in _OPERATORS:
        library.define(schema)
    _LIBRARIES.append(library)
    return importlib.import_module(name)


def _torchvision(name: str, weights: str | None) -> Made:
    models = _needed("torchvision", lambda: torchvision_module("torchvision.models"))
    known = models.list_models()
    if name not in known:
        raise ValueError(_unknown(f"torchvision:{name}", name, known))
    default = getattr(models.get_model_weights(name), "DEFAULT", None)
    parameters = signature(models.get_model_builder(name)).parameters
    own: dict[str, Any] = {"weights_backbone": None} if "weights_backbone" in parameters else {}
    if name in ("inception_v3", "googlenet"):  # these two normalize again, and warn of slow initialization
        own |= {"transform_input": True, "init_weights": weights is None}
    module = models.get_model(name, weights=None, **own)
    if weights == PRETRAINED:
        if default is None:
            raise ValueError(f"torchvision:{name}: there are no pretrained weights")
        shown = bool(sys.stderr and sys.stderr.isatty())
        module.load_state_dict(default.get_state_dict(progress=shown, check_hash=True, weights_only=True))
    return module, _preset_form(default), PRETRAINED if weights == PRETRAINED else RANDOM


def _preset_form(weights: Any) -> InputForm:
    """Read how torchvision prepares images for these weights; of other than classification the sizes are a guess."""
    preset = None if weights is None else weights.transforms()
    if not all(hasattr(preset, each) for each in ("crop_size", "resize_size", "mean", "std")):
        return InputForm((1, 3, 224, 224), guess="torchvision says none")
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    how = str(getattr(preset.interpolation, "value", "bilinear"))
    return InputForm((1, 3, crop, crop), (), 0, tuple(preset.mean), tuple(preset.std), crop / resize, how)


def _timm(name: str, weights: str | None) -> Made:
    timm = _needed("timm", lambda: _beside_torchvision("timm"))
    if ":" in name or name.partition(".")[0] not in timm.list_models():
        raise ValueError(_unknown(f"timm:{name}", name, timm.list_models()))
    module = timm.create_model(name, pretrained=weights == PRETRAINED)
    return module, pretrained_form(module.pretrained_cfg), PRETRAINED if weights == PRETRAINED else RANDOM


def _beside_torchvision(name: str) -> ModuleType:
    """Import a package that imports torchvision where there is one."""
    if find_spec("torchvision") is not None:
        torchvision_module("torchvision")
    return importlib.import_module(name)


def _unknown(model: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 3)
    return f"{model}: there is no such network" + (f"; near it: {', '.join(near)}" if near else "")


def _needed(package: str, importer: Any) -> Any:
    try:
        return importer()
    except ImportError as error:
        raise ImportError(f"{package}: it cannot be imported ({error}): pip install {package}") from error


# --- transformers -----------------------------------------------------------------------------------------------------


def _hf(name: str, weights: str | None) -> Made:
    _no_pretrained(f"hf:{name}", weights)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"hf:{name}: there is no {folder / 'config.json'}; give a folder of save_pretrained")
    transformers = _needed("transformers", lambda: _beside_torchvision("transformers"))
    transformers.utils.logging.set_verbosity_error()
    if not (sys.stderr and sys.stderr.isatty()):
        transformers.utils.logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(name, **local)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        kind = transformers.AutoModel
    if weights is None and any(folder.glob("*.safetensors")):
        module, origin = kind.from_pretrained(name, use_safetensors=True, **local), ""
    elif weights is None and any(folder.glob("*.bin")):
        raise ValueError(f"hf:{name}: its weights are pickled: name them, --weights {next(folder.glob('*.bin'))}")
    else:
        module = kind.from_config(config) if kind is transformers.AutoModel else kind(config)
        origin = RANDOM
    if hasattr(module.config, "use_cache"):
        module.config.use_cache = False
    return module, _form_of(module), origin


def _form_of(module: Any) -> InputForm | None:
    """Tell what a model of transformers takes: words or images."""
    config, name = module.config, module.main_input_name
    if name == "input_ids":
        names = (name, "decoder_input_ids") if getattr(config, "is_encoder_decoder", False) else (name,)
        return InputForm((1, 32), names, words=config.get_text_config().vocab_size)
    if name == "pixel_values":
        size = getattr(config, "image_size", 224)
        sizes = tuple(size) if isinstance(size, list | tuple) else (size, size)
        half = (0.5, 0.5, 0.5)
        return InputForm((1, getattr(config, "num_channels", 3), *sizes), (name,), 0, half, half, 1.0, "bicubic")
    return None


# --- A factory of the user's ------------------------------------------------------------------------------------------


def _from_factory(model: str, weights: str | None) -> Made:
    """Call a factory in a module of the current folder, or of what is installed."""
    _no_pretrained(model, weights)
    module_name, _, path = model.partition(":")
    with _here():
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise
            raise ValueError(f"{model}: there is no module {module_name} here or installed; use {FORMS}") from error
        for name in path.split("."):
            if not hasattr(found, name):
                raise ValueError(f"{model}: {module_name} has no {path}")
            found = getattr(found, name)
        made = found if isinstance(found, nn.Module) else _called(model, found)
    if not isinstance(made, nn.Module):
        raise TypeError(f"{model}: it gives {type(made).__name__}, no nn.Module")
    config = getattr(made, "pretrained_cfg", None)  # timm's
    return made, pretrained_form(config) if isinstance(config, dict) else None, ""


def _called(model: str, factory: Any) -> Any:
    if not callable(factory):
        raise TypeError(f"{model}: it is {type(factory).__name__}: use a callable without arguments, or an nn.Module")
    torch.manual_seed(0)  # once more: the import of its module may have drawn numbers, but the first time only
    try:
        return factory()
    except Exception as error:
        error.add_note(f"in {model}, called without arguments")
        raise


@contextmanager
def _here() -> Iterator[None]:
    """Let modules in the current folder be imported, as `python -m` does."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _no_pretrained(model: str, weights: str | None) -> None:
    if weights == PRETRAINED:
        raise UsageError(f"--weights {PRETRAINED} is for torchvision: and timm:, and {model} brings its own: leave it")


_MAKERS = {"torchvision": _torchvision, "timm": _timm, "hf": _hf}
