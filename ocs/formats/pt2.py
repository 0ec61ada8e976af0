"""Files of exported programs: as they are, or compiled for the machine that writes them."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import torch
from torch.export import ExportedProgram

from ocs.errors import quiet
from ocs.formats.full_range import clip_floats
from ocs.replace_file import naming, replacing, system_error


def write_program(program: ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Write a program for torch.export.load, and for backends that take quantized_decomposed operators.

    The example stays out of the file: it may be a small part of much data, all of which would be written.
    """
    program.example_inputs = None
    content = BytesIO()  # torch's writer, if it cannot write to a file, ends the process
    with quiet(), replacing(path) as partial:
        torch.export.save(program, content)
        partial.write_bytes(content.getbuffer())


def write_package(program: ExportedProgram, path: str | os.PathLike[str]) -> Path:
    """Compile a program ahead of time (AOTInductor) and write it for torch._inductor.aoti_load_package, or C++.

    Its weights are packed for oneDNN's products, which is why the shapes of its inputs should be constants: else they
    are packed again at each call.

    Raises:
        OSError: the file cannot be written, or what the compiler writes on the way cannot: where it does, that says.
        RuntimeError: the compiler fails; what it says is the cause.
    """
    fit_inductor(program)
    content = BytesIO()  # as above
    with quiet(), replacing(path) as partial:
        with inductor_errors(path), torch.no_grad():  # what needs gradients is not packed
            torch._inductor.aoti_compile_and_package(program, package_path=content, inductor_configs={"freezing": True})
        partial.write_bytes(content.getbuffer())
    return Path(path)


@contextmanager
def inductor_errors(what: str | os.PathLike[str]) -> Iterator[None]:
    """Say in a line that Inductor failed, or the C++ compiler that it calls, at what, and where these write."""
    temporary = tempfile.gettempdir()
    try:
        yield
    except Exception as error:
        folders = dict.fromkeys([os.environ.get("TORCHINDUCTOR_CACHE_DIR", temporary), temporary])
        where = f"torch's compiler failed, which writes to {' and '.join(folders)}"
        with naming(what, where):
            if system_error(error) is not None:
                raise
        first = str(error).strip().partition("\n")[0]
        raise RuntimeError(f"{os.fspath(what)}: {where} ({type(error).__name__}: {first})") from error


def fit_inductor(program: ExportedProgram) -> None:
    """Write a program as Inductor takes it, in place: what it would not find, or take for something else."""
    clip_floats(program)
    _keep_transposed_in_floats(program)


def _keep_transposed_in_floats(program: ExportedProgram) -> None:
    """Dequantize the weights of transposed convolutions by plain arithmetic: Inductor takes them for convolutions."""
    aten, graph = torch.ops.aten, program.graph
    transposed = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
    for node in [each for each in graph.nodes if each.target in transposed]:
        weight = node.args[1]
        if weight.target is not torch.ops.quantized_decomposed.dequantize_per_channel.default:
            continue
        ints, scale, _, axis = weight.args[:4]
        shape = [-1, *[1] * (weight.meta["val"].dim() - 1 - axis)]
        with graph.inserting_before(node):
            scales = graph.call_function(aten.view.default, (scale, shape))
            floats = graph.call_function(aten.mul.Tensor, (ints, scales))
        scales.meta["val"], floats.meta["val"] = scale.meta["val"].view(shape), weight.meta["val"]
        node.replace_input_with(weight, floats)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
