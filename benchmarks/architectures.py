"""What share of the matmul weights ocs.quantize() quantizes in the architectures of transformers, torchvision and timm.

    pip install transformers timm    # --no-deps where they would bring another torch
    python benchmarks/architectures.py [--out docs/architectures.md] [NAME ...]

Each is built in a small configuration with random weights and quantized to 8 bits with the defaults. Besides the
share the table gives what stays float, and by how much the outputs move; the
quantized model is saved and loaded into a fresh one, whose outputs must be the same. Classes that have a forward of
their own and compute as torch's do are registered, and named.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from zoo import torchvision_models

import ocs
from ocs.model.targets import find_targets
from ocs.plan.coverage import matmul_weights

WORDS = 64
TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": WORDS,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
LANGUAGE = {
    "GPT2LMHead": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "FalconForCausalLM": {},
    "LlamaForCausalLM": {},
    "MixtralForCausalLM": EXPERTS,
    "Qwen2MoeForCausalLM": {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "Qwen3MoeForCausalLM": {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16, "num_experts_per_tok": 2},
    "GptOssForCausalLM": EXPERTS,
    "MambaForCausalLM": {},
    "BertModel": {"max_position_embeddings": 64},
    "T5EncoderModel": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
}
IMAGE = {
    "torchvision": ("resnet50", "mobilenet_v3_small", "efficientnet_b0", "vit_b_16", "swin_t", "convnext_tiny"),
    "timm": ("nf_resnet26", "resnetv2_50x1_bit", "mixer_s32_224", "tf_efficientnet_b0", "vit_tiny_patch16_224"),
}
REGISTERED = {  # by module: the classes, and what they are like
    "transformers.models.falcon.modeling_falcon": {"FalconLinear": nn.Linear},
    "timm.layers.conv2d_same": {"Conv2dSame": nn.Conv2d},
}


class Architecture(NamedTuple):
    """A model in a small configuration, and what it is run on."""

    library: str
    name: str
    build: Callable[[], nn.Module]
    inputs: dict[str, Tensor] | tuple[Tensor]


def architectures() -> Iterator[Architecture]:
    """Every architecture of the table."""
    import timm
    import transformers

    words = {"input_ids": torch.arange(2 * 16).view(2, 16) % WORDS}
    for name, options in LANGUAGE.items():
        kind = getattr(transformers, f"{name}Model" if name.endswith("Head") else name)
        config = kind.config_class(**TEXT | options)
        yield Architecture("transformers", kind.__name__, lambda kind=kind, config=config: kind(config), words)
    config = transformers.WhisperConfig(
        d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, decoder_layers=2,
        decoder_attention_heads=4, decoder_ffn_dim=128, vocab_size=WORDS, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, max_source_positions=50,
    )  # fmt: skip
    sound = {"input_features": torch.randn(1, 80, 100), "decoder_input_ids": words["input_ids"][:1]}
    yield Architecture("transformers", "WhisperModel", lambda: transformers.WhisperModel(config), sound)
    models = torchvision_models()
    film = (torch.randn(1, 3, 8, 64, 64),)
    for name in ("r3d_18", "r2plus1d_18"):
        yield Architecture("torchvision", name, lambda name=name: models.get_model(name, weights=None), film)
    makers = {"torchvision": lambda name: models.get_model(name, weights=None), "timm": timm.create_model}
    for library, names in IMAGE.items():
        for name in names:
            make = makers[library]
            picture = (torch.randn(1, 3, 224, 224),)
            yield Architecture(library, name, lambda make=make, name=name: make(name), picture)


def register() -> list[str]:
    """Register the classes that have a forward of their own; returns their names."""
    for module, classes in REGISTERED.items():
        for name, like in classes.items():
            ocs.register(getattr(__import__(module, fromlist=[name]), name), like=like)
    return [name for classes in REGISTERED.values() for name in classes]


def outputs(model: nn.Module, inputs: dict[str, Tensor] | tuple[Tensor]) -> Tensor:
    """Run a model; of several outputs the first."""
    with torch.no_grad():
        found: Any = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return found if isinstance(found, Tensor) else found[0]


def row(architecture: Architecture) -> list[str]:
    """Quantize an architecture; returns its cells."""
    torch.manual_seed(0)
    model = architecture.build().eval()
    counts = {target.name: matmul_weights(target.module) for target in find_targets(model)}
    expected, fresh = outputs(model, architecture.inputs), copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a small share, which the table shows
        report = ocs.quantize(model)
    y = outputs(model, architecture.inputs)
    with tempfile.TemporaryDirectory() as folder:
        ocs.save(model, f"{folder}/model")
        if not torch.equal(outputs(ocs.load(f"{folder}/model", fresh), architecture.inputs), y):
            raise AssertionError(f"{architecture.name}: the loaded model is another one")
    quantized, total = {line.name for line in report.quantized}, sum(counts.values())
    left = Counter()
    for line in report.layers:
        if line.name not in quantized and counts[line.name]:
            left[line.reason] += counts[line.name]
    why = "; ".join(f"{count / total:.1%} {reason}" for reason, count in left.most_common(2))
    share = sum(counts[name] for name in quantized) / total
    moved = f"{(y - expected).norm() / expected.norm():.3f}" if expected.any() else "all zeros"
    return [architecture.library, architecture.name, f"{total:,}", f"{share:.1%}", moved, why]


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these")
    parser.add_argument("--out", type=Path, help="write the table there, in Markdown")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torchvision_models()  # before anything of torchvision is imported
    registered = ", ".join(f"`{name}`" for name in register())
    head = ["library", "model", "matmul weights", "quantized", "outputs move by", "what stays float"]
    lines = [head, ["---", "---", "---:", "---:", "---:", "---"]]
    for architecture in architectures():
        if not arguments.names or architecture.name in arguments.names:
            lines.append(row(architecture))
            print(*lines[-1], sep="  ", flush=True)
    if arguments.out:
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        arguments.out.write_text(f"{PREFACE.format(registered=registered)}\n{table}\n", encoding="utf-8")


PREFACE = """# Architectures

What share of the matmul weights `ocs.quantize(model)` quantizes, by `python benchmarks/architectures.py`: small
configurations with random weights, 8 bits and all other options as they are by default. Embeddings are looked up, not
multiplied, and do not count. The outputs' relative movement is that of random weights, whose routers and many layers
amplify rounding. Every model was saved and loaded into a fresh one, whose outputs were the same bits. Registered, as
they have a forward of their own: {registered}.
"""

if __name__ == "__main__":
    main()
