from __future__ import annotations

import pytest
import torch
from tests.trace.models import LAYERS, NUM_EXPERTS, TOP_K, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from moesaic.errors import ConfigError, UnsupportedModel
from moesaic.trace import record

IDS = torch.arange(20).view(2, 10)


def test_every_layer_records_k_picks_for_each_token():
    model = tiny_model()
    with record(model) as trace:
        expected = model(IDS, output_routing=True).routing
        model(IDS + 20)
    assert trace.num_tokens == 40
    assert trace.token_ids_T.tolist() == list(range(40))
    assert tuple(trace.layers) == LAYERS
    for index, layer in trace.layers.items():
        assert layer.load_N.sum() == 40 * TOP_K
        assert torch.equal(layer.index_TK[:20], expected.records[index].index_TK)
        torch.testing.assert_close(layer.weight_TK[:20], expected.records[index].weight_TK)
        assert torch.equal(layer.load_N, torch.bincount(layer.index_TK.flatten(), minlength=NUM_EXPERTS))
        assert not layer.weight_TK.requires_grad


def test_records_of_different_widths_are_padded_with_no_expert():
    model = tiny_model(router={"type": "expert_choice", "capacity_factor": 1.5})
    torch.manual_seed(0)
    ids = [torch.randint(50, (1, length)) for length in (1, 7, 12)]
    with record(model) as trace:
        widths = [model(each, output_routing=True).routing.records[1].top_k for each in ids]
    assert len(set(widths)) > 1
    layer = trace.layers[1]
    assert layer.index_TK.shape == layer.weight_TK.shape == (20, layer.top_k) == (20, max(widths))
    counts = torch.bincount(layer.index_TK.flatten(), minlength=NUM_EXPERTS + 1)[:NUM_EXPERTS]
    assert counts.tolist() == layer.load_N.tolist() == [1 + 2 + 3] * NUM_EXPERTS
    assert not layer.weight_TK[layer.index_TK == NUM_EXPERTS].any()


def test_padding_is_left_out():
    model = tiny_model()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with record(model) as trace:
        model(IDS, attention_mask=mask)
    assert trace.token_ids_T.tolist() == [*range(4, 20)]
    assert all(layer.load_N.sum() == 16 * TOP_K and len(layer.index_TK) == 16 for layer in trace.layers.values())


def test_generation_with_cache_counts_each_token_once():
    model = tiny_model()
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    with record(model) as trace:
        model.generate(IDS, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    # 17 tokens of the prompts, then 4 steps of two tokens; the last new token is never fed back.
    assert trace.num_tokens == 17 + 4 * 2
    assert all(layer.load_N.sum() == trace.num_tokens * TOP_K for layer in trace.layers.values())


def test_recomputation_under_checkpointing_counts_once():
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    with record(model, keep="counts") as trace:
        model(IDS, labels=IDS).loss.backward()
    assert trace.num_tokens == 20
    assert trace.layers[1].load_N.sum() == 20 * TOP_K


def test_counts_only():
    model = tiny_model()
    with record(model) as full, record(model, keep="counts") as counts:
        model(IDS)
    assert torch.equal(counts.layers[1].load_N, full.layers[1].load_N)
    with pytest.raises(ConfigError, match="record with keep='tokens'"):
        _ = counts.layers[1].index_TK


def test_nothing_is_recorded_after_an_error_inside_the_block():
    model = tiny_model()
    kept = []

    def run_then_fail() -> None:
        with record(model) as trace:
            kept.append(trace)
            model(IDS)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run_then_fail()
    model(IDS)
    assert kept[0].num_tokens == 20


def test_nested_blocks_record_on_their_own():
    model = tiny_model()
    with record(model) as outer:
        model(IDS)
        with record(model) as inner:
            model(IDS)
        model(IDS)
    assert (outer.num_tokens, inner.num_tokens) == (60, 20)


def test_domains_add_up_to_the_load():
    model = tiny_model()
    with record(model) as trace:
        with trace.domain("code"):
            model(IDS)
        with trace.domain("prose"):
            model(IDS + 20)
        model(IDS + 5)
    layer = trace.layers[2]
    assert list(layer.domain_loads) == ["code", "prose", ""]
    assert torch.equal(sum(layer.domain_loads.values()), layer.load_N)
    assert layer.domain_loads["code"].sum() == 20 * TOP_K


def test_embeddings_have_no_token_ids():
    model = tiny_model()
    with record(model) as trace:
        model(inputs_embeds=model.get_input_embeddings()(IDS))
    assert trace.num_tokens == 20
    assert trace.token_ids_T is None


def test_a_wrapped_model_and_a_bare_decoder_are_recorded():
    model = tiny_model()
    with record(nn.Sequential(model)) as wrapped, record(model.model) as bare:
        model(IDS)
    assert wrapped.num_tokens == bare.num_tokens == 20


def test_other_models_and_choices_are_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=8))
    with pytest.raises(UnsupportedModel, match="model_type = 'llama' is not a known MoE family"), record(dense):
        pass
    with pytest.raises(ConfigError, match="keep = 'all'"), record(tiny_model(), keep="all"):  # type: ignore[arg-type]
        pass
