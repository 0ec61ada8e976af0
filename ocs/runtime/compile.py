"""Compile a quantized model for an engine: the same callable, tensors in and out, whose products run in integers."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ocs.errors import quiet
from ocs.formats.pt2 import fit_inductor, inductor_errors
from ocs.model.rewrite import keeps_grad_mode
from ocs.progress import steps
from ocs.runtime.export import write_lowered
from ocs.runtime.program import ONE_EXPORT, Example, as_example, bound, lowered_copy, program_of
from ocs.weight.arguments import check_choice, check_flag

Engine = Literal["inductor", "onnxruntime", "openvino"]
Run = Callable[[Example], Any]


@keeps_grad_mode
def compile(
    model: nn.Module,
    example: Any,
    *,
    engine: Engine = "inductor",
    target: str = "this",
    additions: bool = True,
    dynamic_lstm: bool = False,
    progress: bool | None = None,
) -> "Compiled":
    """Compile a quantized model, so that its products run in 8-bit integers.

    The model stays as it is. Inputs must be quantized, too (abits, see ocs.quantize) for a product to run in integers;
    layers with float inputs run in floats. Quantize with fold_bn=True: a BatchNorm between a convolution and what
    follows it keeps engines from passing on 8-bit tensors.

        ocs.quantize(model, wbits=5, r=0.02, abits=8, act_signed="auto", calibration=batches, fold_bn=True)
        fast = ocs.compile(model, example)
        fast(images)

    Args:
        model: quantized by ocs.quantize or ocs.load, or lowered; on the CPU.
        example: an input: a tensor, a tuple of arguments, or a dict of arguments by name.
        engine: "inductor", torch's own compiler, which needs a C++ compiler at hand and compiles once for each new
            shape of the inputs, at its first call (the example's at once); "onnxruntime" or "openvino", which take any
            batch size and come with pip install torch-ocs[onnxruntime] or [openvino].
        target: see ocs.lower.
        additions: round what residual additions add to 8 bits, too, by the ranges that calibration saw: faster, and not
            quite what the quantized model computes (docs/integers.md has the cost). False leaves them in floats.
        dynamic_lstm: with engine="onnxruntime", see ocs.export.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Returns:
        A callable that takes and gives what the model does, without gradients.

    Raises:
        ValueError: nothing in the model is quantized, or a layer cannot be lowered; see ocs.lower.
        ImportError: the engine is not installed.
        RuntimeError, OSError: torch's compiler fails, or cannot write; what it says is the cause.
    """
    check_choice("engine", engine, get_args(Engine))
    if dynamic_lstm and engine != "onnxruntime":
        raise ValueError(f"dynamic_lstm=True: engine={engine!r} has no such operator, use 'onnxruntime'")
    check_flag("additions", additions)
    with steps("compile", 2, progress) as begin:
        begin("lower")
        lowered = lowered_copy(model, target)
        compiled = Compiled(lowered, engine, target, additions, dynamic_lstm)
        given = as_example(lowered, example)
        begin(engine)
        compiled.prepare(given)
    return compiled


class Compiled:
    """A compiled model; see ocs.compile."""

    def __init__(self, model: nn.Module, engine: Engine, target: str, additions: bool, dynamic_lstm: bool) -> None:
        self.engine = engine
        self._model, self._target, self._additions, self._dynamic_lstm = model, target, additions, dynamic_lstm
        self._runs: dict[Any, Run] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the model does."""
        example = bound(self._model, args, kwargs)
        return (self._runs.get(self._key(example)) or self.prepare(example))(example)

    def prepare(self, example: Example) -> Run:
        """Compile for inputs like these, if that has not been done."""
        key = self._key(example)
        with ONE_EXPORT:
            if key not in self._runs:
                self._runs[key] = _ENGINES[self.engine](self, example)
            return self._runs[key]

    def _key(self, example: Example) -> Any:
        """Tell apart what must be compiled anew: other arguments than tensors, and for Inductor every shape."""
        _, spec = pytree.tree_flatten((example.args, example.kwargs))
        form = _form if self.engine == "inductor" else _kind
        return spec, tuple(form(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in example.leaves)

    def __repr__(self) -> str:
        """Name the engine."""
        return f"<ocs.compile: {self.engine}, {len(self._runs)} compiled>"


def _kind(tensor: Tensor) -> Any:
    """Give what a file takes for granted."""
    return tensor.dtype, tensor.dim()


def _form(tensor: Tensor) -> Any:
    """Give what compiled code takes for granted."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _inductor(compiled: Compiled, example: Example) -> Run:
    additions = "one" if compiled._additions else "float"
    program = program_of(compiled._model, example, target=compiled._target, additions=additions, dynamic=False)
    fit_inductor(program)
    with quiet(), inductor_errors("engine='inductor'"), torch.no_grad(), torch._inductor.config.patch(freezing=True):
        module = torch._inductor.compile(program.module(check_guards=False), example.leaves)

    def run(given: Example) -> Any:
        with torch.no_grad():
            return module(*given.leaves)

    return run


def _onnx_of(compiled: Compiled, example: Example, path: Path) -> Callable[[Any], Any]:
    """Write an ONNX file; gives what makes the model's output of the list of the file's outputs."""
    additions = "all" if compiled._additions else "float"
    program = program_of(compiled._model, example, target=compiled._target, additions=additions)
    write_lowered(compiled._model, program, path, dynamic_lstm=compiled._dynamic_lstm, target=compiled._target)
    spec = program.call_spec.out_spec
    return lambda outputs: pytree.tree_unflatten([torch.from_numpy(np.array(each)) for each in outputs], spec)


def _onnxruntime(compiled: Compiled, example: Example) -> Run:
    onnxruntime = _required("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        rebuilt = _onnx_of(compiled, example, path := Path(folder) / "model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float inputs stay floats
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(given: Example) -> Any:
        return rebuilt(session.run(None, dict(zip(names, _arrays(given), strict=True))))

    return run


def _openvino(compiled: Compiled, example: Example) -> Run:
    openvino = _required("openvino")
    with tempfile.TemporaryDirectory() as folder:
        rebuilt = _onnx_of(compiled, example, path := Path(folder) / "model.onnx")
        core = openvino.Core()
        options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        loaded = core.compile_model(core.read_model(str(path)), "CPU", options)
    outputs = range(len(loaded.outputs))

    def run(given: Example) -> Any:
        found = loaded(_arrays(given))
        return rebuilt([found[i] for i in outputs])

    return run


def _arrays(example: Example) -> list[np.ndarray]:
    return [tensor.detach().cpu().contiguous().numpy() for tensor in example.tensors]


def _required(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"engine={name!r} needs {name}: pip install torch-ocs[{name}]") from None


_ENGINES: dict[str, Callable[[Compiled, Example], Run]] = {
    "inductor": _inductor, "onnxruntime": _onnxruntime, "openvino": _openvino
}  # fmt: skip
