"""The pages of the docs: their examples run, errors read as they say, and what follows from the code is up to date."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import zoo
from torch import nn

import ocs

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
GIVEN = re.compile(r"^\w+ = \.\.\..*\n", re.MULTILINE)  # model = ...  # what the reader has


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    ).eval()  # fmt: skip


def small_lstm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 32), nn.LSTM(32, 32)).eval()


def names(make, inputs):
    """What examples find: fresh models of one architecture and inputs for them."""
    space = {"ocs": ocs, "torch": torch, "nn": nn, "folder": Path()}
    space |= {name: make() for name in ("model", "float_model", "fresh_model")}
    return space | {"batches": [inputs, inputs], "images": inputs[:1], "batch": inputs}


def blocks(page: str, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall((ROOT / page).read_text()) if found == language]


def run(code: str, space: dict) -> None:
    exec(compile(GIVEN.sub("", code), "<example>", "exec"), space)


@pytest.mark.parametrize(
    "page", ["README.md", "docs/index.md", "docs/quick-start.md", "docs/report.md", "docs/training.md"]
)
def test_examples_of_convolutional_networks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = names(small_network, torch.randn(32, 3, 8, 8))
    for code in blocks(page, "python"):
        run(code, space)


def test_the_example_of_engines_runs(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("docs/integers.md", "python")
    program = code.replace('"model.pt2", images', '"model.pt2", images, form="program"')  # a package takes its time
    assert program != code
    run(program, names(small_network, torch.randn(32, 3, 8, 8)))
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.pt2"}


def test_examples_of_packed_layers_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = names(small_lstm, torch.randint(50, (7, 4)))
    for code in blocks("docs/packed.md", "python"):
        run(code, space)


def test_examples_of_transformers_run(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    zoo.torchvision_models()  # transformers imports torchvision, which needs help beside a torch for CPUs
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes)).save_pretrained("language")
    transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).save_pretrained("encoder")
    space = {"ocs": ocs, "token_ids": torch.randint(50, (2, 8))}
    examples = [code for code in blocks("docs/transformers.md", "python") if code not in of_sentences()]
    assert len(examples) == 4
    for code in examples:
        run(code, space | {"language_folder": "language", "encoder_folder": "encoder"})


def of_sentences() -> list[str]:
    return [code for code in blocks("docs/transformers.md", "python") if "SentenceTransformer" in code]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of what it imports
def test_examples_of_sentence_encoders_run(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    zoo.torchvision_models()
    sentence_transformers = pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "a", "dog", "ran", "."]
    tokenizer = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    tokenizer.save_pretrained("sentences")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).save_pretrained("sentences")
    space = {"ocs": ocs, "sentences_folder": "sentences"}
    examples = of_sentences()
    assert len(examples) == 2
    for code in examples:
        run(code, space)
    assert capsys.readouterr().out == "(2, 32)\n"
    read = sentence_transformers.SentenceTransformer("sentences-3bit", device="cpu")
    ocs.pack(space["inside"])
    one, other = read.encode(space["sentences"]), space["encoder"].encode(space["sentences"])
    assert (one == other).all()


ERRORS = re.findall(
    r"```python\n(.*?)```\n\n```text\n(\w+): (.*?)\n```", (ROOT / "docs/errors.md").read_text(), re.DOTALL
)


@pytest.mark.parametrize(("code", "kind", "message"), ERRORS)
def test_errors_read_as_the_page_says(code, kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=re.escape(message)) as raised:
        run(code, names(small_network, torch.randn(32, 3, 8, 8)))
    assert type(raised.value).__name__ == kind
    assert str(raised.value) == message


def test_the_page_of_errors_has_a_message_for_each_example():
    assert len(ERRORS) == len(blocks("docs/errors.md", "python")) >= 10


def test_generated_pages_are_up_to_date():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, page in generate.PAGES.items():
        assert (ROOT / "docs" / name).read_text() == page(), f"docs/{name}: run python docs/generate.py"
