"""Products with packed weights against float32, torch's int8 and int4, ONNX Runtime, and a copy of the packed bytes.

    python benchmarks/packed.py [--threads 1 2] [--rounds 21] [--only linear lstm generate] [--json]

All run in one process, in turns. "memory": the weights that one call reads come after others that together exceed all
caches; "cache": the same ones again and again. Inputs of 8 bits have a scale for each row, measured as it arrives, as
the rivals' have. The language model is a Llama of random weights (pip install transformers; left out without it).
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench import Row, at_most, bytes_held, faster, in_turns, publish
from torch import Tensor, nn
from zoo import torchvision_models

import ocs
from ocs.nn.packed.weight import PackedWeight

SIZE, CACHES = 4096, 160 << 20  # of a linear layer; bytes beyond every cache
GROUPS = (32, 64, 128)  # of input channels that share a scale


def cycling(make: Callable[[], Any], size: int, memory: bool, run: Callable[[Any], object]) -> Callable[[], object]:
    """A call that takes one operand after the other, of as many as exceed the caches, or the same one."""
    operands = cycle([make() for _ in range(-(-CACHES // size) if memory else 1)])
    return lambda: run(next(operands))


# --- Linear layers ----------------------------------------------------------------------------------------------------


def packed_weight(bits: int, group: int = 0) -> tuple[Tensor, ...]:
    """The six operands of a packed weight [SIZE, SIZE] of random integers."""
    most = 2 ** (bits - 1) - 1
    ints = torch.randint(-most, most + 1, (SIZE, SIZE), dtype=torch.int8)
    weight = PackedWeight.of(ints, torch.tensor(0.01), torch.arange(SIZE), bits, 1, SIZE)
    codes, scale, copies, outputs, _, _ = weight.operands()
    of_groups = torch.full((SIZE // 16, SIZE // max(group, 1), 16), 0.01)
    return codes, of_groups if group else scale, copies, outputs, group, bits


def product(x: Tensor, weight: tuple[Tensor, ...], row_bits: int) -> Tensor:
    """Ours, without the layer around it."""
    none = torch.empty(0)
    return torch.ops.ocs.product(x, *weight, none, row_bits, none, True)


def int4_weight(group: int) -> tuple[Tensor, Tensor]:
    """Torch's own 4-bit weight with a scale and zero for each group, for inputs in bfloat16, its fastest."""
    q = torch.randint(0, 16, (SIZE, SIZE), dtype=torch.int32)
    scales = torch.full((SIZE // group, SIZE, 2), 0.01, dtype=torch.bfloat16)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1), scales


def linear(rows: int, memory: bool, rounds: int) -> list[Row]:
    """Rows times a weight of 4096 x 4096."""
    x = torch.randn(rows, SIZE)
    halves = x.bfloat16()
    packed = {bits: SIZE * SIZE * bits // 8 for bits in range(2, 9)}
    dynamic = torch.ops.quantized.linear_dynamic

    def int8_weight() -> Any:
        return torch.ops.quantized.linear_prepack(
            torch.quantize_per_tensor(torch.randn(SIZE, SIZE), 0.03, 0, torch.qint8), None
        )

    calls = {
        "float32": cycling(lambda: torch.randn(SIZE, SIZE), 4 * SIZE**2, memory, lambda w: F.linear(x, w)),
        "torch dynamic int8": cycling(int8_weight, SIZE**2, memory, lambda w: dynamic(x, w, True)),
        "4 bits, float inputs": cycling(lambda: packed_weight(4), packed[4], memory, lambda w: product(x, w, 0)),
    }  # fmt: skip
    for group in GROUPS if rows == 1 else ():
        calls[f"torch int4, groups of {group}"] = cycling(
            lambda group=group: int4_weight(group), packed[4], memory,
            lambda w, group=group: torch.ops.aten._weight_int4pack_mm_for_cpu(halves, w[0], group, w[1]),
        )  # fmt: skip
        calls[f"4 bits, groups of {group}"] = cycling(
            lambda group=group: packed_weight(4, group), packed[4], memory, lambda w: product(halves, w, 8)
        )
    for bits in range(2, 9):
        calls[f"{bits} bits"] = cycling(
            lambda bits=bits: packed_weight(bits), packed[bits], memory, lambda w: product(x, w, 8)
        )
    for bits in (4, 5):
        calls[f"a copy of {bits} bits"] = cycling(
            lambda bits=bits: torch.zeros(packed[bits], dtype=torch.uint8), packed[bits], memory,
            torch.empty(packed[bits], dtype=torch.uint8).copy_,
        )  # fmt: skip
    place = "memory" if memory else "cache"
    times = in_turns(calls, rounds, f"linear, {rows} rows, {place}")
    return list(linear_rows(times, rows, place))


def linear_rows(times: dict[str, list[float]], rows: int, place: str) -> Sequence[Row]:
    """The comparisons that are asked for."""
    what = f"linear, {rows} row{'s' if rows > 1 else ''}, {place}: "

    def against(ours: str, theirs: str, factor: float) -> Row:
        return faster(what + ours, times, ours, theirs, factor)

    if rows > 1:
        names = [f"{bits} bits" for bits in range(2, 9)]
        found = [against(name, "torch dynamic int8", 1) for name in names]
        return [*found, *(against(name, "float32", 1) for name in (*names, "4 bits, float inputs"))]
    found = [at_most(what + "4 bits", times, "4 bits", "a copy of 4 bits", 1.15)] if place == "memory" else []
    found += [against(f"{bits} bits", "float32", 3 if bits > 4 else 4) for bits in range(2, 9)]
    found += [against(f"{bits} bits", "torch dynamic int8", 1.3 if bits < 5 else 1) for bits in range(2, 9)]
    found += [against(f"4 bits, groups of {group}", f"torch int4, groups of {group}", 1) for group in GROUPS]
    return [*found, against("4 bits, float inputs", "float32", 2.5)]


# --- Recurrent layers -------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """The paper's LSTM: two layers of 650."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(650, 650, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, N, 650] -> [T, N, 650]."""
        return self.lstm(x)[0]


def packed_lstm(model: nn.Module, bits: int, rounded: bool) -> nn.Module:
    """Quantized at r = 0.02 and packed, with float inputs and states, or with 8 bits for each row of both."""
    model = copy.deepcopy(model)
    overrides = {"lstm": {"abits": 8, "act_scale": "dynamic"}} if rounded else None
    ocs.quantize(model, wbits=bits, r=0.02, overrides=overrides, progress=False)
    return ocs.pack(model)


def onnxruntime_lstm(model: nn.Module, x: Tensor, threads: int) -> Callable[[], object]:
    """ONNX Runtime's DynamicQuantizeLSTM."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        floats, ints = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        torch.onnx.export(model, (x,), str(floats), dynamo=False)
        quantize_dynamic(floats, ints, weight_type=QuantType.QInt8, op_types_to_quantize=["LSTM"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(ints), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def lstm(batch: int, rounds: int, threads: int) -> list[Row]:
    """35 steps."""
    model, x = Recurrent().eval(), torch.randn(35, batch, 650)
    dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.LSTM}, dtype=torch.qint8)
    calls: dict[str, Callable[[], object]] = {
        "nn.LSTM": lambda: model(x),
        "torch dynamic int8": lambda: dynamic(x),
        "DynamicQuantizeLSTM": onnxruntime_lstm(model, x, threads),
    }
    for bits in (8, 5, 4, 3, 2):
        for rounded in (True, False):
            packed = packed_lstm(model, bits, rounded)
            calls[f"{bits} bits, {'8-bit' if rounded else 'float'} inputs"] = lambda packed=packed: packed(x)
    times = in_turns(calls, rounds, f"LSTM, batch {batch}")
    rows = []
    for ours in list(calls)[3:]:
        goals = (4, 1.3, 1.3) if ours == "4 bits, 8-bit inputs" and batch == 1 else (1, 1, 1)
        for rival, factor in zip(calls, goals, strict=False):
            rows.append(faster(f"LSTM 2 x 650, batch {batch}: {ours}", times, ours, rival, factor))
    return rows


# --- Generation -------------------------------------------------------------------------------------------------------


def llama() -> nn.Module | None:
    """A Llama of some 100 million random weights, None without transformers."""
    torchvision_models()  # transformers imports torchvision where it is installed
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    config = LlamaConfig(
        vocab_size=32000, hidden_size=640, intermediate_size=1792, num_hidden_layers=12, num_attention_heads=10,
        num_key_value_heads=10, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def generate(rounds: int, notes: dict[str, Any]) -> list[Row]:
    """32 tokens after a prompt of 16, batch 1."""
    model = llama()
    if model is None:
        notes["generate"] = "left out: pip install transformers"
        return []
    prompt = torch.randint(0, 32000, (1, 16))
    calls: dict[str, Callable[[], object]] = {}

    def tokens(model: nn.Module) -> Callable[[], object]:
        return lambda: model.generate(prompt, max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0)

    calls["float32"] = tokens(model)
    for name, options in {"float": {}, "8-bit": {"abits": 8, "act_scale": "dynamic"}}.items():
        packed = copy.deepcopy(model)
        ocs.quantize(packed, wbits=4, r=0.02, embeddings=True, progress=False, **options)
        ocs.pack(packed)
        notes[f"bytes, 4 bits, {name} inputs"] = f"{bytes_held(packed) / bytes_held(model):.3f} of float32"
        calls[f"{name} inputs"] = tokens(packed)
    times = in_turns(calls, rounds, "generate")
    parameters = sum(p.numel() for p in model.parameters()) // 10**6
    what = f"Llama, {parameters} M weights, 4 bits, 32 tokens: "
    return [faster(what + name, times, name, "float32", 3) for name in ("8-bit inputs", "float inputs")]


def measure(threads: int, rounds: int, only: Sequence[str]) -> None:
    """Run all with so many threads, and publish."""
    rows: list[Row] = []
    notes: dict[str, Any] = {}
    with torch.no_grad():
        if "linear" in only:
            for memory in (True, False):
                rows += linear(1, memory, rounds)
            rows += linear(16, True, rounds)
        if "lstm" in only:
            rows += lstm(1, rounds, threads) + lstm(8, rounds, threads)
        if "generate" in only:
            rows += generate(max(rounds // 4, 3), notes)
    publish(f"packed-{threads}", rows, notes)


def main() -> None:
    """Run all and publish."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", nargs="+", default=["linear", "lstm", "generate"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for threads in args.threads:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        measure(threads, args.rounds, args.only)


if __name__ == "__main__":
    main()
