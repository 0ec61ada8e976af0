"""Embeddings: rows with a scale each, where they are asked for."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import ocs
from ocs.functional import quantize_weight
from ocs.nn import QuantEmbedding, QuantEmbeddingBag

INDEX = torch.tensor([[0, 3, 6], [2, 2, 1]])
FLAT, OFFSETS = INDEX.flatten(), torch.tensor([0, 2, 2, 5])
LAYERS = {
    "embedding": (lambda: nn.Embedding(7, 5, padding_idx=2), (INDEX,), {}),
    "bag, rows": (lambda: nn.EmbeddingBag(7, 5), (INDEX,), {}),
    "bag, offsets": (lambda: nn.EmbeddingBag(7, 5, mode="max", padding_idx=2), (FLAT, OFFSETS), {}),
    "bag, mean without padding": (lambda: nn.EmbeddingBag(7, 5, mode="mean", padding_idx=2), (INDEX,), {}),
    "bag, weighted": (lambda: nn.EmbeddingBag(7, 5, mode="sum", include_last_offset=True), (FLAT, OFFSETS),
                      {"per_sample_weights": torch.rand(6)}),
}  # fmt: skip


class Model(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.head = table, nn.Linear(5, 4)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.head(self.table(*args, **kwargs))


def make(name: str) -> tuple[Model, tuple[Tensor, ...], dict[str, Tensor]]:
    torch.manual_seed(0)
    build, args, kwargs = LAYERS[name]
    return Model(build()).eval(), args, kwargs


@pytest.mark.parametrize("name", LAYERS)
def test_rows_have_a_scale_each(name: str, tmp_path: Path) -> None:
    model, args, kwargs = make(name)
    fresh, twin = copy.deepcopy(model), copy.deepcopy(model)
    q = quantize_weight(twin.table.weight.detach(), 4, granularity="channel")
    twin.table.weight.data = q.ints * q.scale[:, None]
    line = ocs.quantize(model, wbits=4, r=0.5, embeddings=True).layers[0]
    assert (line.kind, line.granularity, line.splits) == (type(twin.table).__name__, "channel", 0)
    assert torch.equal(model.table.weight_int, q.ints)
    torch.testing.assert_close(model.table(*args, **kwargs), twin.table(*args, **kwargs))
    torch.testing.assert_close(model.table.weight, twin.table.weight.detach())
    expected = model(*args, **kwargs)
    ocs.save(model, tmp_path / "model")
    assert torch.equal(ocs.load(tmp_path / "model", fresh)(*args, **kwargs), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(*args, **kwargs), expected)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(*args, **kwargs), expected)
    assert model.half().table(*args).dtype == torch.float16 if not kwargs else True


def test_only_where_asked_for() -> None:
    model, _, _ = make("embedding")
    assert ocs.quantize(model).layers[0].reason == "an embedding: embeddings=True quantizes it"
    model, _, _ = make("embedding")
    line = ocs.quantize(model, overrides={"table": {"wbits": 3}}).layers[0]
    assert (line.bits, type(model.table)) == (3, QuantEmbedding)
    model, _, _ = make("bag, rows")
    assert ocs.quantize(model, embeddings=True, skip="table").layers[0].status == "skipped"


def test_beside_options_that_embeddings_have_not() -> None:
    model, args, _ = make("bag, rows")
    report = ocs.quantize(
        model, r=0.2, abits=8, act_r=0.2, recipe="best", rounding="gptq", calibration=[args[0]], embeddings=True
    )
    assert type(model.table) is QuantEmbeddingBag
    assert (report.layers[0].rounding, report.layers[0].act_bits) == ("nearest", None)
    assert (report.layers[1].rounding, report.layers[1].act_bits) == ("gptq", 8)


def test_a_table_that_lookups_change_stays_float() -> None:
    model = Model(nn.Embedding(7, 5, max_norm=1.0))
    assert "max_norm=1.0" in ocs.quantize(model, embeddings=True).layers[0].reason


# --- Tied to a head ---------------------------------------------------------------------------------------------------


def tied() -> nn.Module:
    torch.manual_seed(0)
    model = Model(nn.Embedding(7, 5))
    model.head = nn.Linear(5, 7)
    model.head.weight = model.table.weight
    return model.eval()


def test_one_set_of_integers_for_both(tmp_path: Path) -> None:
    model, fresh, twin = tied(), tied(), tied()
    nn.init.ones_(fresh.table.weight)
    q = quantize_weight(twin.table.weight.detach(), 4, granularity="channel")
    twin.table.weight.data = q.ints * q.scale[:, None]
    report = ocs.quantize(model, wbits=4, r=0.5, embeddings=True)
    assert model.head.weight_int is model.table.weight_int
    torch.testing.assert_close(model(INDEX), twin(INDEX))
    embedding, head = report.layers
    assert (embedding.reason, head.reason) == ("one set of integers with head", "one set of integers with table")
    assert (embedding.float_bytes, head.float_bytes, head.packed_bytes) == (140, 0, 0)
    ocs.save(model, tmp_path / "model")
    with safe_open(tmp_path / "model", "pt") as file:
        assert [key for key in file.keys() if "int" in key] == ["table.weight_int"]  # noqa: SIM118
    ocs.load(tmp_path / "model", fresh)
    for each in (fresh, copy.deepcopy(model)):
        assert each.head.weight_int is each.table.weight_int
        assert torch.equal(each(INDEX), model(INDEX))


def test_inputs_of_the_head_and_overrides_of_the_embedding() -> None:
    model = tied()
    options = {"abits": 8, "rounding": "squant", "calibration": [INDEX], "overrides": {"table": {"wbits": 3}}}
    embedding, head = ocs.quantize(model, embeddings=True, **options).layers
    assert (embedding.bits, head.bits, head.rounding, head.act_bits) == (3, 3, "nearest", 8)


@pytest.mark.parametrize("options", [{}, {"embeddings": True, "skip": "table"}])
def test_a_head_stays_float_with_its_embedding(options: dict) -> None:
    model = nn.ModuleList([tied(), nn.Linear(20, 20)])
    if "skip" in options:
        options = options | {"skip": "0.table"}
    lines = ocs.quantize(model, **options).layers
    assert [line.status == "quantized" for line in lines] == [False, False, True]
    assert lines[1].reason == "its weight is shared with 0.table.weight"
