"""Quantize while transformers loads a model: from_pretrained, save_pretrained and generate as with its own quantizers.

Importing this module registers the method "ocs" with transformers, so that folders that save_pretrained wrote are read
again. It needs `pip install torch-ocs[hf]`.

    import ocs.hf
    from transformers import AutoModelForCausalLM

    config = ocs.hf.OcsConfig(wbits=4, r=0.02, recipe="best")
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)
    model.save_pretrained("model-4bit")  # k bits for k bits, in shards as usual
    model = AutoModelForCausalLM.from_pretrained("model-4bit")
"""

import inspect
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    import transformers
    from transformers import AutoConfig, PreTrainedModel
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        f"ocs.hf needs transformers, whole: pip install torch-ocs[hf], or see what stops 'import torchvision' ({error})"
    ) from error

from ocs.errors import error_context
from ocs.formats.contents import full_name
from ocs.formats.reader import Reader
from ocs.formats.restore import quantized_replacements
from ocs.formats.shards import open_shards
from ocs.formats.storage import stored
from ocs.model.rewrite import exchange, module_slots
from ocs.model.targets import find_targets
from ocs.nn.base import QuantizedLayer
from ocs.nn.registry import replacement_of
from ocs.plan.options import Request
from ocs.quantization import quantize
from ocs.runtime.pack import pack

__all__ = ["OcsConfig", "OcsQuantizer"]

METHOD = "ocs"
_IGNORED = "_keys_to_ignore_on_load_{}"  # transformers' names of what it does not speak of
_NEEDS_DATA = ("calibration", "progress")  # no JSON, and not of the model


@register_quantization_config(METHOD)
class OcsConfig(QuantizationConfigMixin):
    """How from_pretrained quantizes a model: the options of ocs.quantize by name, as config.json then has them.

    What needs calibration is done with ocs.quantize, of a model in float; attach() lets that be saved.

    Args:
        packed: layers hold k-bit integers and our kernels multiply them (ocs.pack); False for the simulated layers of
            ocs.quantize, on any device.
        options: wbits, r, recipe ... of ocs.quantize, as far as JSON has them: numbers, strings, lists and dicts.

    Raises:
        ValueError: an option is out of range, needs calibration, or cannot be written as JSON.
        TypeError: there is no such option.

    Example:
        >>> OcsConfig(wbits=4, r=0.02, recipe="best").options
        {'wbits': 4, 'r': 0.02, 'recipe': 'best'}
    """

    def __init__(self, *, packed: bool = True, **options: Any) -> None:
        options = {name: value for name, value in options.items() if name != "quant_method"}
        allowed = [name for name in inspect.signature(quantize).parameters if name not in ("model", *_NEEDS_DATA)]
        unknown = next((name for name in options if name not in allowed), None)
        if unknown is not None:
            raise TypeError(f"OcsConfig has no option {unknown!r}: use packed, {', '.join(allowed)}")
        try:
            json.dumps(options)
        except TypeError as error:
            raise ValueError(f"OcsConfig: config.json cannot hold an option ({error}): use names and numbers") from None
        Request.of(options)
        if not isinstance(packed, bool):
            raise ValueError(f"packed={packed!r}: use True (k-bit layers) or False (simulated ones)")
        self.quant_method = METHOD
        self.packed = packed
        self.options = options

    def to_dict(self) -> dict[str, Any]:
        """Give what config.json has, which makes the same configuration again."""
        return {"quant_method": METHOD, "packed": self.packed, **self.options}

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Let save_pretrained write a model of transformers that ocs.quantize or ocs.load made; return it.

        The integers are those of the model, whatever options this configuration names; `packed` says how
        from_pretrained reads them.

        Raises:
            TypeError: it is no model of transformers.
            ValueError: no layer of it is quantized.
        """
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model is {type(model).__name__}: use a model of transformers")
        if not any(isinstance(module, QuantizedLayer) for module in model.modules()):
            raise ValueError(f"{type(model).__name__} has no quantized layer: call ocs.quantize first")
        _let_save(model)
        model.hf_quantizer = OcsQuantizer(self)
        model.config.quantization_config = self
        return model


def _let_save(model: PreTrainedModel) -> None:
    """Take back the refusal that ocs.quantize left, and let names in files be those of the model's tensors."""
    vars(model).pop("save_pretrained", None)
    model._weight_conversions = []


def on_meta(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """Make the float model of a folder on the meta device; dtype: where its configuration names none."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder}: it is quantized already, config.json says: give the folder of the float model")
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ValueError(
            f"{folder}: config.json names no architecture that transformers {transformers.__version__} has"
        )
    with torch.device("meta"):
        return kind._from_config(config, dtype=config.dtype or dtype)


def compute_buffers(model: PreTrainedModel) -> None:
    """Give values to buffers on the meta device that no file has, as transformers does once it has loaded the others.

    Those that it leaves as they are, 0 or 1, stay on the meta device.
    """
    places = [(module._buffers, name) for module in model.modules() for name in module._non_persistent_buffers_set]
    missing = [(table, key, table[key]) for table, key in places if table.get(key) is not None and table[key].is_meta]
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._is_hf_initialized = True
    found = []
    for untouched in (0, 1):
        for table, key, old in missing:
            table[key] = torch.full_like(old, untouched, device="cpu")
        for module in model.modules():
            module._is_hf_initialized = False
        model.initialize_weights()
        found.append([table[key] for table, key, _ in missing])
    for (table, key, old), first, second in zip(missing, *found, strict=True):
        table[key] = first if torch.equal(first, second) else old


def _filled() -> nn.Parameter:
    """Make what stands for a weight while transformers fills and initializes all others: it takes this for done."""
    parameter = nn.Parameter(torch.empty(0, dtype=torch.float32, device="cpu"), requires_grad=False)
    parameter._is_hf_initialized = True
    return parameter


def _ignore(model: PreTrainedModel, kind: str, names: Collection[str]) -> None:
    """Let transformers not speak of these tensors, which it does not load."""
    name = _IGNORED.format(kind)
    setattr(model, name, {*(getattr(model, name) or ()), f"^({'|'.join(map(re.escape, sorted(names)))})$"})


@register_quantizer(METHOD)
class OcsQuantizer(HfQuantizer):
    """What transformers calls while it loads or saves a model; users need OcsConfig alone."""

    requires_calibration = False

    def __init__(self, quantization_config: OcsConfig, **more: Any) -> None:
        super().__init__(quantization_config, **more)
        self._files: Collection[str] = ()
        self._device_map: dict[str, Any] = {}
        self._weights: list[tuple[nn.Module, str, nn.Parameter]] = []

    def is_serializable(self) -> bool:
        """Say that save_pretrained may be called."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say that integers are not trained."""
        return False

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse what cannot be done before anything is read."""
        self._device_map = device_map if isinstance(device_map, dict) else {}  # of "auto" it comes once that is known
        for name, place in self._device_map.items():
            if str(place) in ("disk", "meta"):
                what = name or "a quantized model"
                raise ValueError(f"device_map: {what} cannot be left on {str(place)!r}: use devices, or 'cpu'")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Collection[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        """Take out the float weights whose integers the files hold, so that nobody fills them."""
        if not self.pre_quantized:
            return model
        self._files = list(checkpoint_files or ())
        with open_shards(self._files) as shards, error_context(str(self._files[0])):
            reader = Reader(shards)
        taken = set()
        for target in find_targets(model):
            if target.name in reader.layers:
                module = target.module
                module._is_hf_initialized = True
                for name in replacement_of(module).weight_names(module):
                    self._weights.append((module, name, module._parameters[name]))
                    module._parameters[name] = _filled()
                    taken.add(full_name(target.name, name))
        _ignore(model, "unexpected", reader.of_layers())
        _ignore(model, "missing", taken)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Quantize the float model, or give it the integers of the files."""
        if self.pre_quantized:
            self._read_integers(model)
        else:
            quantize(model, **self.quantization_config.options)
            if self.quantization_config.packed:
                pack(model)
        _let_save(model)
        return model

    def _read_integers(self, model: PreTrainedModel) -> None:
        for module, name, weight in self._weights:
            module._parameters[name] = weight
        model.tie_weights()
        with open_shards(self._files) as shards, torch.no_grad(), error_context(str(self._files[0])):
            reader = Reader(shards)
            replacements = quantized_replacements(reader, model, {}, self.quantization_config.packed, False)
        names = {id(target.module): target.name for target in find_targets(model)}
        for old, layer in replacements.items():
            layer.to(self._device_of(names[old]))
        exchange(module_slots(model, replacements))
        self._weights.clear()
        for kind in ("unexpected", "missing"):
            delattr(model, _IGNORED.format(kind))  # the class's is left

    def _device_of(self, name: str) -> Any:
        """Find where device_map puts a layer: as it says of the layer, or of the innermost module around it."""
        while name and name not in self._device_map:
            name = name.rpartition(".")[0]
        return self._device_map.get(name, "cpu")

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Give what the files hold, as ocs.save writes it."""
        return stored(model)
