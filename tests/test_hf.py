"""ocs.hf: from_pretrained quantizes, save_pretrained writes k bits, and what it wrote is read again, bit for bit."""

import json

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

import ocs

transformers = pytest.importorskip("transformers")
zoo.torchvision_models()  # transformers imports torchvision, which needs help beside a torch for CPUs
import ocs.hf  # noqa: E402 - needs transformers

IDS = torch.arange(14).view(2, 7)
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
CONFIGS = {
    "llama": transformers.LlamaConfig(intermediate_size=96, num_key_value_heads=2, **SMALL),
    "gpt2": transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=32),
    "mixtral": transformers.MixtralConfig(
        intermediate_size=96, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **SMALL
    ),
}


@pytest.fixture
def folder(request, tmp_path):
    """A folder with a float model as save_pretrained writes it."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(tmp_path / "float")
    return tmp_path


def read(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)


def same(a, b):
    with torch.inference_mode():
        return torch.equal(a(IDS).logits, b(IDS).logits)


def quantized_layers(model):
    return [module for module in model.modules() if isinstance(module, ocs.nn.QuantizedLayer)]


@pytest.mark.parametrize("folder", CONFIGS, indirect=True)
@pytest.mark.parametrize(
    "options",
    [{}, {"packed": False, "embeddings": True}, {"granularity": "group", "group": 32, "r": 0.1}],
    ids=["packed", "simulated", "groups"],
)
def test_what_was_saved_is_read_again(folder, options):
    config = ocs.hf.OcsConfig(**{"wbits": 4, "r": 0.02, "recipe": "best", **options})
    model = read(folder / "float", quantization_config=config)
    by_hand = read(folder / "float")
    ocs.quantize(by_hand, **config.options)
    if config.packed:
        ocs.pack(by_hand)
    assert same(model, by_hand)
    model.save_pretrained(folder / "quantized", max_shard_size="40KB")
    assert len([*(folder / "quantized").glob("*.safetensors")]) > 1
    again = read(folder / "quantized")
    assert [type(layer) for layer in quantized_layers(again)] == [type(layer) for layer in quantized_layers(model)]
    assert same(again, model)
    assert not [name for name in vars(again) if "_on_load_" in name]
    again.save_pretrained(folder / "again")  # in one file
    files = [*(folder / "again").glob("*.safetensors")]
    assert len(files) == 1
    whole = load_file(files[0])
    parts = [load_file(path) for path in (folder / "quantized").glob("*.safetensors")]
    assert {name for part in parts for name in part} == set(whole)
    assert all(torch.equal(part[name], whole[name]) for part in parts for name in part)


@pytest.mark.parametrize("folder", ["llama", "gpt2"], indirect=True)
@pytest.mark.parametrize("options", [{"recipe": "best"}, {"embeddings": True}], ids=["best", "embeddings"])
def test_folders_are_quantized_a_layer_at_a_time(folder, options):
    """The result is that of from_pretrained and save_pretrained; what goes with the weights goes along."""
    options = {"wbits": 4, "r": 0.02, **options}
    (folder / "float" / "tokenizer.json").write_text("{}")
    ocs.quantize_file(folder / "float", folder / "streamed", shard_size=20_000, **options)
    assert len([*(folder / "streamed").glob("*.safetensors")]) > 1
    model = read(folder / "float", quantization_config=ocs.hf.OcsConfig(**options))
    assert same(read(folder / "streamed"), model)
    model.save_pretrained(folder / "quantized")
    saved = load_file(folder / "quantized" / "model.safetensors")
    streamed = [load_file(path) for path in (folder / "streamed").glob("*.safetensors")]
    streamed = {name: tensor for part in streamed for name, tensor in part.items()}
    assert saved.keys() == streamed.keys()
    assert all(torch.equal(tensor, streamed[name]) for name, tensor in saved.items())
    assert json.loads(_metadata(next((folder / "streamed").glob("*.safetensors")))["ocs"]) == json.loads(
        _metadata(folder / "quantized" / "model.safetensors")["ocs"]
    )
    config = json.loads((folder / "streamed" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "ocs", "packed": True, **options}
    assert (folder / "streamed" / "tokenizer.json").exists()
    with pytest.raises(ValueError, match=r"streamed: it holds a quantized model"):
        ocs.quantize_file(folder / "streamed", folder / "again", wbits=4)


@pytest.mark.parametrize("folder", ["llama", "gpt2"], indirect=True)
def test_folders_are_calibrated_where_they_are(folder):
    """The result is that of quantize and save: transformers' buffers that no file has are computed."""
    torch.manual_seed(1)
    options = {"wbits": 3, "r": 0.02, "rounding": "gptq", "abits": 8, "act_r": 0.05, "act_signed": "auto"}
    data = [{"input_ids": torch.randint(100, (2, 9))} for _ in range(2)]
    ocs.quantize_file(folder / "float", folder / "streamed", calibration=data, **options)
    model = read(folder / "float")
    ocs.quantize(model, calibration=data, **options)
    ocs.save(model, folder / "saved")
    saved, found = load_file(folder / "saved"), load_file(folder / "streamed" / "model.safetensors")
    assert saved.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in saved.items())
    assert same(read(folder / "streamed"), ocs.pack(model))
    config = json.loads((folder / "streamed" / "config.json").read_text())
    assert "calibration" not in config["quantization_config"]


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_models_generate_in_any_dtype_and_where_device_map_says(folder):
    config = ocs.hf.OcsConfig(wbits=5, r=0.02)
    read(folder / "float", quantization_config=config).save_pretrained(folder / "quantized")
    by_module = {"model": "cpu", "model.layers.1": "cpu", "lm_head": "cpu"}
    maps = ({"device_map": each} for each in ("auto", "cpu", {"": "cpu"}, by_module))
    for options in ({}, {"dtype": torch.bfloat16}, *maps):
        model = read(folder / "quantized", **options)
        assert model.device.type == "cpu"
        assert model(IDS).logits.dtype == options.get("dtype", torch.float32)
        assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 10)


def test_device_map_places_layers_as_it_says_of_the_innermost_module():
    quantizer = ocs.hf.OcsQuantizer(ocs.hf.OcsConfig(wbits=4))
    assert quantizer._device_of("model.layers.1.mlp") == "cpu"
    quantizer.validate_environment(device_map={"": 3, "model": "cpu", "model.layers.1": 1})
    names = ("model.layers.1.mlp.up_proj", "model.layers.10.mlp", "model", "lm_head")
    assert [quantizer._device_of(name) for name in names] == [1, "cpu", "cpu", 3]


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_what_calibration_quantized_can_be_saved_once_attached(folder):
    model = read(folder / "float")
    ocs.quantize(model, wbits=3, rounding="gptq", calibration=[{"input_ids": IDS}])
    with pytest.raises(ValueError, match=r"OcsConfig\(\)\.attach\(model\)"):
        model.save_pretrained(folder / "quantized")
    ocs.hf.OcsConfig(packed=False).attach(model).save_pretrained(folder / "quantized")
    assert same(read(folder / "quantized"), model)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_damaged_folders_are_refused(folder):
    read(folder / "float", quantization_config=ocs.hf.OcsConfig(wbits=4)).save_pretrained(folder / "q")
    path = folder / "q" / "model.safetensors"
    tensors, metadata = load_file(path), _metadata(path)
    name = next(name for name in tensors if name.endswith("q_proj.weight_int"))
    save_file(tensors | {name: tensors[name] ^ 1}, path, metadata)
    with pytest.raises(ValueError, match=r"model\.safetensors: .*q_proj.*damaged"):
        read(folder / "q")
    save_file(tensors, path, metadata | {"crc32": "0"})
    with pytest.raises(ValueError, match="header is damaged"):
        read(folder / "q")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="not written by ocs"):
        read(folder / "q")


def _metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_configurations_survive_json_and_refuse_what_does_not():
    config = ocs.hf.OcsConfig(wbits=4, r=0.02, overrides={"*.down_proj": {"wbits": 8}})
    again = ocs.hf.OcsConfig.from_dict(json.loads(config.to_json_string()))
    assert again.options == config.options
    assert again.packed
    with pytest.raises(TypeError, match="OcsConfig has no option 'bits': use packed, wbits, r"):
        ocs.hf.OcsConfig(bits=4)
    with pytest.raises(TypeError, match="OcsConfig has no option 'calibration'"):
        ocs.hf.OcsConfig(calibration=[IDS])
    with pytest.raises(ValueError, match="wbits=1: use an integer from 2 to 8"):
        ocs.hf.OcsConfig(wbits=1)
    with pytest.raises(ValueError, match="packed='yes'"):
        ocs.hf.OcsConfig(packed="yes")
    with pytest.raises(ValueError, match=r"config\.json cannot hold"):
        ocs.hf.OcsConfig(skip=torch.nn.Linear)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_what_cannot_be_is_refused_before_anything_is_read(folder):
    config = ocs.hf.OcsConfig(wbits=4)
    config.attach(read(folder / "float", quantization_config=config)).save_pretrained(folder / "quantized")
    for path, options in ((folder / "float", {"quantization_config": config}), (folder / "quantized", {})):
        for place in ("disk", "meta", torch.device("meta")):
            with pytest.raises(ValueError, match=f"device_map: lm_head cannot be left on '{place}': use devices, or"):
                read(path, device_map={"model": "cpu", "lm_head": place}, **options)
    with pytest.raises(ValueError, match="a quantized model cannot be left on 'meta'"):
        read(folder / "quantized", device_map="meta")
    with pytest.raises(ValueError, match="cannot be left on 'disk'"):
        read(folder / "float", quantization_config=config, device_map="auto", max_memory={"cpu": "60KB"})
    with pytest.raises(ValueError, match="LlamaForCausalLM has no quantized layer"):
        config.attach(read(folder / "float"))
    with pytest.raises(TypeError, match="use a model of transformers"):
        config.attach(torch.nn.Linear(2, 2))
