"""Word-level language models and their text: what the tables, tests and notebooks share.

Text comes as WikiText-2 has it: a file for each split, words separated by blanks, an end-of-sentence token for each
line. The LSTM is Zaremba, Sutskever and Vinyals' (arXiv 1409.2329): embedding, LSTM layers with dropout between
them, linear layer over the vocabulary; decoder.py has a transformer. The bundled ones were trained on the King James
Bible.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from decoder import Decoder
from torch import Tensor, nn

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "bible"
WEIGHTS, DECODER_WEIGHTS = ASSETS / "lstm.safetensors", ASSETS / "decoder.safetensors"
EOS, UNKNOWN = "<eos>", "<unk>"
STEPS = 35  # that a state is carried over before gradients are cut, and in one forward pass

State = tuple[Tensor, Tensor]


class LanguageModel(nn.Module):
    """Next-word logits from words; `tied`: the last layer's weight is the embedding's (and then stays float)."""

    steps = STEPS

    def __init__(
        self, words: int, *, hidden: int = 650, layers: int = 2, dropout: float = 0.5, tied: bool = False
    ) -> None:
        super().__init__()
        self.config = {"words": words, "hidden": hidden, "layers": layers, "dropout": dropout, "tied": tied}
        self.dropout = nn.Dropout(dropout)
        self.embedding = nn.Embedding(words, hidden)
        self.lstm = nn.LSTM(hidden, hidden, layers, dropout=dropout)
        self.decoder = nn.Linear(hidden, words)
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, words: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """words int64 [T, B] -> logits [T, B, words] of the words that follow, and the state to go on with."""
        hidden, state = self.lstm(self.dropout(self.embedding(words)), state)
        return self.decoder(self.dropout(hidden)), state


# --- Text -------------------------------------------------------------------------------------------------------------


def read_words(folder: str | Path, split: str) -> list[str]:
    """The words of a split, "train", "valid" or "test": from `wiki.{split}.tokens`, WikiText-2's, or `{split}.txt`."""
    folder = Path(folder)
    names = [f"wiki.{split}.tokens", f"{split}.txt"]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder}: the {split} split should be here as {names[0]} or {names[1]}")
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # no other separators of lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: text in UTF-8 expected, words separated by blanks ({error})") from None
    words = [word for line in lines for word in (*line.split(), EOS)]
    if len(words) == len(lines):
        raise ValueError(f"{path}: text expected, words separated by blanks; there are none")
    return words


def vocabulary_of(words: list[str]) -> list[str]:
    """Every word once, in the order of first appearance; a word's place is its number."""
    return list(dict.fromkeys([EOS, UNKNOWN, *words]))


def encode(words: list[str], vocabulary: list[str]) -> Tensor:
    """Numbers of the words, int64 [N]; words that the vocabulary lacks are <unk>."""
    number = {word: i for i, word in enumerate(vocabulary)}
    return torch.tensor([number.get(word, number[UNKNOWN]) for word in words])


def streams(words: Tensor, count: int) -> Tensor:
    """words [N] as `count` streams of equal length side by side, [N // count, count]; what is left over is dropped."""
    if words.numel() < 2 * count:
        raise ValueError(f"{words.numel()} words cannot be read in {count} streams: at least two words each are needed")
    return words[: words.numel() // count * count].view(count, -1).t().contiguous()


def windows(text: Tensor, steps: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of inputs and the words that follow them, [up to steps, B] each, from streams [T, B]."""
    for start in range(0, len(text) - 1, steps):
        stop = min(start + steps, len(text) - 1)
        yield text[start:stop], text[start + 1 : stop + 1]


# --- Networks and their perplexity ------------------------------------------------------------------------------------


def losses(model: nn.Module, text: Tensor) -> Iterator[Tensor]:
    """-log p of the words that are to be predicted, float32 [up to steps, B], window by window of streams [T, B]."""
    state = None
    for inputs, targets in windows(text, model.steps):
        logits, state = model(inputs, state)
        yield F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


@torch.inference_mode()
def perplexity(model: nn.Module, words: Tensor, count: int = 10) -> float:
    """Of a text, words [N], read in `count` parallel streams."""
    found = torch.cat(list(losses(model, streams(words, count))))
    return math.exp(found.double().mean())


def save_model(
    model: LanguageModel | Decoder, vocabulary: list[str], path: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Weights, shape and vocabulary in one safetensors file."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    if model.config["tied"]:
        del state["decoder.weight"]
    save_file(state, path, {"config": json.dumps(model.config), "vocabulary": "\n".join(vocabulary)})


def load_model(path: str | Path = WEIGHTS) -> tuple[LanguageModel | Decoder, list[str]]:
    """The float32 network in eval mode, an LSTM or a transformer as the file says, and its vocabulary."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        state = {name: tensor.float() for name, tensor in load_file(path).items()}
        config, vocabulary = json.loads(header["config"]), header["vocabulary"].split("\n")
        model = (Decoder if "heads" in config else LanguageModel)(**config)
        if model.config["tied"]:
            state["decoder.weight"] = state["embedding.weight"]
        model.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: a file of examples/train_language_model.py expected ({error!r})") from None
    return model.eval(), vocabulary
