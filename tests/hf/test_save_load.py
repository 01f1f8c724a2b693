"""Checkpoints: names on disk, shards, round trips through the Auto classes, missing weights."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.hf.tiny import EXPERT_SIZE, NUM_EXPERTS, backbone_config, copy_of, tiny_model, token_ids
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import moesaic
from moesaic import MoesaicConfig, MoesaicForCausalLM, MoesaicModel, MoESpec
from moesaic.errors import ConfigError


@pytest.fixture(scope="module")
def folder(model: MoesaicForCausalLM, model_type: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(model_type)
    model.save_pretrained(path, max_shard_size="20KB")
    return path


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put one file of `tensors` in the place of the folder's shards."""
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_loading_gives_the_same_tensors_and_logits(model: MoesaicForCausalLM, folder: Path) -> None:
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is MoesaicForCausalLM
    assert not any(report.values())
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_experts_are_stored_one_by_one(model: MoesaicForCausalLM, model_type: str, folder: Path) -> None:
    names = set(stored(folder))
    layers, feed_forward = ("h", "mlp") if model_type == "gpt2" else ("layers", "mlp")
    gpt2 = model_type == "gpt2"
    projections = ["up_proj", "down_proj"] if gpt2 else ["gate_proj", "up_proj", "down_proj"]
    kinds = ["weight", "bias"] if gpt2 else ["weight"]
    expected = {
        f"model.{layers}.{layer}.{feed_forward}.experts.{expert}.{projection}.{kind}"
        for layer in (1, 2)
        for expert in range(NUM_EXPERTS)
        for projection in projections
        for kind in kinds
    }
    assert {name for name in names if ".experts." in name} == expected
    assert {name for name in names if ".gate." in name} == {
        f"model.{layers}.{layer}.mlp.gate.weight" for layer in (1, 2)
    }


def test_everything_else_has_the_name_of_the_stock_family(model: MoesaicForCausalLM, folder: Path) -> None:
    stock = AutoModelForCausalLM.from_config(model.config.backbone).state_dict().keys()
    prefix = {name.split(".")[0] for name in stock if not name.startswith("lm_head")}.pop()
    dense_layers = {
        name.replace(f"{prefix}.", "model.", 1) for name in stock if ".1.mlp" not in name and ".2.mlp" not in name
    }
    if model.config.tie_word_embeddings:
        dense_layers.discard("lm_head.weight")
    assert {name for name in stored(folder) if ".1.mlp" not in name and ".2.mlp" not in name} == dense_layers


def test_stored_experts_are_slices_of_the_packed_tensors(llama: MoesaicForCausalLM, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    packed, single = llama.moe_blocks()[1].experts, stored(tmp_path)
    name = "model.layers.1.mlp.experts.3"
    assert torch.equal(single[f"{name}.gate_proj.weight"], packed.gate_up_proj[3, :EXPERT_SIZE])
    assert torch.equal(single[f"{name}.up_proj.weight"], packed.gate_up_proj[3, EXPERT_SIZE:])
    assert torch.equal(single[f"{name}.down_proj.weight"], packed.down_proj[3])


def test_large_models_are_sharded(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert set(index["weight_map"]) == set(stored(folder))


def test_shared_experts_and_selection_bias_are_stored(tmp_path: Path) -> None:
    model = tiny_model(
        "llama",
        router={"top_k": 2, "score_function": "sigmoid", "selection_bias": True, "linear_bias": True},
        shared_experts={"num_experts": 2, "sigmoid_gate": True},
    )
    for block in model.moe_blocks().values():
        block.gate.e_score_correction_bias.uniform_()
    model.save_pretrained(tmp_path)
    names = {name.removeprefix("model.layers.1.mlp.") for name in stored(tmp_path) if ".1.mlp." in name}
    assert {name for name in names if not name.startswith("experts.")} == {
        "gate.weight",
        "gate.bias",
        "gate.e_score_correction_bias",
        "shared_expert_gate.weight",
        *(f"shared_experts.{projection}_proj.weight" for projection in ("gate", "up", "down")),
    }
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for layer, block in half.moe_blocks().items():
        kept, original = block.gate.e_score_correction_bias, model.moe_blocks()[layer].gate.e_score_correction_bias
        assert kept.dtype == torch.float32
        assert torch.equal(kept, original)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_gated_experts_with_biases_round_trip(tmp_path: Path) -> None:
    experts = {"num_experts": NUM_EXPERTS, "intermediate_size": EXPERT_SIZE, "bias": True}
    model = tiny_model("llama", experts=experts)
    model.save_pretrained(tmp_path)
    names = {
        name.removeprefix("model.layers.1.mlp.experts.0.") for name in stored(tmp_path) if ".1.mlp.experts.0." in name
    }
    assert names == {f"{part}_proj.{kind}" for part in ("gate", "up", "down") for kind in ("weight", "bias")}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_decoder_from_a_language_model_checkpoint_and_back(
    model: MoesaicForCausalLM, folder: Path, tmp_path: Path
) -> None:
    expected = model.model(token_ids()).last_hidden_state
    decoder, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(decoder) is MoesaicModel
    assert not report["missing_keys"]
    assert report["unexpected_keys"] <= {"lm_head.weight"}
    assert torch.equal(decoder(token_ids()).last_hidden_state, expected)

    decoder.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(again(token_ids()).last_hidden_state, expected)
    headed, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == (set() if headed.config.tie_word_embeddings else {"lm_head.weight"})
    assert torch.equal(headed.model(token_ids()).last_hidden_state, expected)


def test_a_fresh_process_needs_the_import_only(llama: MoesaicForCausalLM, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    torch.save(token_ids(), tmp_path / "ids.pt")
    script = """
import sys, torch, moesaic
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder = sys.argv[1]
ids = torch.load(folder + "/ids.pt")
names = [AutoConfig.from_pretrained(folder), AutoModel.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)]
torch.save(names[2](ids).logits, folder + "/logits.pt")
print(*(type(name).__name__ for name in names))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["MoesaicConfig", "MoesaicModel", "MoesaicForCausalLM"]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), llama(token_ids()).logits)


def test_config_round_trips(model: MoesaicForCausalLM, model_type: str, tmp_path: Path) -> None:
    config = model.config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MoesaicConfig)
    assert loaded.backbone.model_type == model_type
    assert loaded.spec == config.spec
    restored = MoesaicConfig.from_dict(config.to_dict())
    pickled = pickle.loads(pickle.dumps(config))
    for other in (loaded, restored, pickled):
        assert {**other.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "moesaic"
    assert MoESpec.from_dict(written["moe"]) == config.spec


def test_config_answers_for_its_backbone(llama: MoesaicForCausalLM) -> None:
    config = llama.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 3, 64)
    assert config.get_text_config() is config.backbone
    with pytest.raises(AttributeError, match="no attribute 'not_a_field'"):
        _ = config.not_a_field


def test_config_writes_to_its_backbone(llama: MoesaicForCausalLM) -> None:
    model = copy_of(llama)
    model.config.use_cache = False
    assert model.config.backbone.use_cache is False
    assert "use_cache" not in model.config.to_dict()
    assert model(token_ids()).past_key_values is None
    model.config.output_router_logits = True
    assert not hasattr(model.config.backbone, "output_router_logits")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "moesaic"])
def test_loading_with_an_experts_and_attention_implementation(
    llama: MoesaicForCausalLM, tmp_path: Path, implementation: str
) -> None:
    llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation=implementation, attn_implementation="eager"
    )
    assert loaded.config._experts_implementation == implementation
    assert loaded.model.backbone.config._attn_implementation == "eager"
    torch.testing.assert_close(loaded(token_ids()).logits, llama(token_ids()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "missing",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.experts.",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_missing_weights_are_initialised_and_reported(missing: str, tmp_path: Path) -> None:
    model = tiny_model("llama", {"initializer_range": 0.05})
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, {name: tensor for name, tensor in stored(tmp_path).items() if not name.startswith(missing)})
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"]
    reported = {name.replace("model.backbone.", "model.") for name in report["missing_keys"]}
    assert all(name.startswith(missing) for name in reported)
    before, after = model.state_dict(), loaded.state_dict()
    for name, tensor in after.items():
        if name in report["missing_keys"]:
            assert tensor.isfinite().all()
            assert 0.04 < tensor.std() < 0.06, name
        else:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("gone", ["1.up_proj.weight", "1.down_proj.weight", "1."])
def test_a_missing_expert_is_refused(llama: MoesaicForCausalLM, tmp_path: Path, gone: str) -> None:
    llama.save_pretrained(tmp_path)
    prefix = f"model.layers.2.mlp.experts.{gone}"
    rewrite(tmp_path, {name: tensor for name, tensor in stored(tmp_path).items() if not name.startswith(prefix)})
    with pytest.raises(RuntimeError, match=r"conversion of the weights|ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_size_is_refused(llama: MoesaicForCausalLM, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["moe"]["experts"]["intermediate_size"] = EXPERT_SIZE * 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_saving_leaves_the_model_as_it_was(llama: MoesaicForCausalLM, tmp_path: Path) -> None:
    model = copy_of(llama)
    model.save_pretrained(tmp_path)
    assert all(torch.equal(tensor, llama.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_saved_hash_table_does_not_need_its_frequencies(tmp_path: Path) -> None:
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps([token % 5 for token in range(64)]))
    router = {"type": "hash", "vocabulary_size": 64, "table": "balanced", "frequencies": str(counts)}
    spec = MoESpec.from_dict({"experts": {"num_experts": 4, "intermediate_size": 8}, "router": router})
    model = moesaic.build(backbone_config("llama", vocab_size=64), spec)
    model.save_pretrained(tmp_path / "saved")
    counts.unlink()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    table, expected = (m.moe_blocks()[0].gate.get_buffer("tid2eid") for m in (loaded, model))
    assert torch.equal(table, expected)
    with pytest.raises(ConfigError, match=r"frequencies = .* can't be read"):
        moesaic.build(backbone_config("llama", vocab_size=64), spec)
