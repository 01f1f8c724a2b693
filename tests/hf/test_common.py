"""What transformers asks of every causal language model: embeddings, attention backends, outputs, dtypes, experts."""

from __future__ import annotations

import pytest
import torch
from tests.hf.tiny import VOCABULARY, copy_of, tiny_model, token_ids

from moesaic import MoesaicForCausalLM
from moesaic.hf import MoeCausalLMOutput

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_embeddings(model_type: str, tied: bool) -> None:
    model, ids = tiny_model(model_type, {"tie_word_embeddings": tied}), token_ids()
    before = model(ids).logits
    for size in (VOCABULARY + 6, VOCABULARY - 8):
        model.resize_token_embeddings(size)
        ids = ids.clamp(max=size - 1) if size < VOCABULARY else ids
        assert model.config.vocab_size == model.config.get_text_config().vocab_size == size
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        output = model(ids, labels=ids)
        assert output.logits.shape[-1] == size
        assert output.loss.isfinite()
        if size > VOCABULARY:
            torch.testing.assert_close(output.logits[..., :VOCABULARY], before, **CLOSE)


def test_tied_embeddings_stay_tied(model_type: str, tmp_path) -> None:
    model = tiny_model(model_type, {"tie_word_embeddings": True})
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    loaded = MoesaicForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert copy_of(model).lm_head.weight is not model.lm_head.weight
    loaded.set_input_embeddings(torch.nn.Embedding(VOCABULARY, 32))
    assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight
    loaded.tie_weights()
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


@torch.no_grad()
def test_attention_backends_agree(model: MoesaicForCausalLM) -> None:
    model, ids = copy_of(model), token_ids()
    mask = left_padding_mask()
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=mask).logits
    if not model.model.backbone._supports_sdpa:
        with pytest.raises(ValueError, match="does not support"):
            model.set_attn_implementation("sdpa")
        return
    model.set_attn_implementation("sdpa")
    assert model.model.backbone.config._attn_implementation == "sdpa"
    actual = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], **CLOSE)


@torch.no_grad()
def test_flex_attention(llama: MoesaicForCausalLM) -> None:
    model, ids, mask = copy_of(llama), token_ids(), left_padding_mask()
    model.set_attn_implementation("flex_attention")
    actual, expected = model(ids, attention_mask=mask).logits, llama(ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], **CLOSE)


def left_padding_mask() -> torch.Tensor:
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :4] = 0
    return mask


def test_a_batch_gives_what_its_sequences_give(model: MoesaicForCausalLM) -> None:
    ids = token_ids(3, 9)
    together = model(ids).logits
    for row in range(3):
        torch.testing.assert_close(model(ids[row : row + 1]).logits[0], together[row], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model: MoesaicForCausalLM, side: str) -> None:
    ids = token_ids(1, 7)
    alone = model(ids).logits[0]
    padded, mask = torch.zeros(2, 12, dtype=torch.int64), torch.zeros(2, 12, dtype=torch.int64)
    padded[1], mask[1] = token_ids(1, 12, seed=2)[0], 1
    real = slice(5, 12) if side == "left" else slice(0, 7)
    padded[0, real], mask[0, real] = ids[0], 1
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(padded, attention_mask=mask, position_ids=position_ids)
    torch.testing.assert_close(output.logits[0, real], alone, **CLOSE)


@torch.no_grad()
def test_outputs(model: MoesaicForCausalLM) -> None:
    model, ids = copy_of(model), token_ids()
    model.set_attn_implementation("eager")
    plain = model(ids)
    assert isinstance(plain, MoeCausalLMOutput)
    assert set(plain.keys()) == {"logits", "past_key_values"}
    full = model(ids, output_hidden_states=True, output_attentions=True, output_router_logits=True, output_routing=True)
    assert torch.equal(full.logits, plain.logits)
    assert [tuple(state.shape) for state in full.hidden_states] == [(2, 12, 32)] * 4
    assert [tuple(attention.shape) for attention in full.attentions] == [(2, 4, 12, 12)] * 3
    assert [tuple(logits.shape) for logits in full.router_logits] == [(24, 4)] * 2
    assert list(full.routing.records) == [1, 2]
    assert torch.equal(full.routing.token_ids_T, ids.reshape(-1))
    assert torch.equal(full.router_logits[0], full.routing.records[1].logits_TN)
    decoder = model.model(ids, output_hidden_states=True)
    torch.testing.assert_close(decoder.last_hidden_state, full.hidden_states[-1])


@torch.no_grad()
def test_families_in_one_process_keep_their_hidden_states() -> None:
    models = [tiny_model(family) for family in ("llama", "qwen3")]
    for model in models:
        assert len(model(token_ids(), output_hidden_states=True).hidden_states) == 4


@torch.no_grad()
def test_outputs_can_be_the_default_of_the_config(llama: MoesaicForCausalLM) -> None:
    model = copy_of(llama)
    model.config.output_router_logits = True
    output = model(token_ids())
    assert len(output.router_logits) == 2
    assert set(output.aux_losses) == {"load_balancing", "z_loss"}
    assert model(token_ids(), output_router_logits=False).router_logits is None


@torch.no_grad()
def test_tuples_instead_of_named_outputs(llama: MoesaicForCausalLM) -> None:
    ids = token_ids()
    named = llama(ids, labels=ids)
    loss, logits, *_ = llama(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, named.loss)
    assert torch.equal(logits, named.logits)
    model = copy_of(llama)
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], named.logits)
    assert torch.equal(model.model(ids)[0], llama.model(ids).last_hidden_state)


@torch.no_grad()
def test_embeddings_instead_of_ids(model: MoesaicForCausalLM) -> None:
    ids = token_ids()
    output = model(inputs_embeds=model.get_input_embeddings()(ids), output_routing=True)
    torch.testing.assert_close(output.logits, model(ids).logits, **CLOSE)
    assert output.routing.token_ids_T is None
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()


@torch.no_grad()
def test_logits_of_the_last_positions_only(model: MoesaicForCausalLM) -> None:
    ids = token_ids()
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:], **CLOSE)
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full[:, [0, 5]], **CLOSE)


@torch.no_grad()
def test_position_ids_reach_attention_and_routing(model: MoesaicForCausalLM) -> None:
    ids, positions = token_ids(), torch.arange(12).unsqueeze(0)
    default, given = model(ids), model(ids, position_ids=positions, output_routing=True)
    torch.testing.assert_close(given.logits, default.logits, **CLOSE)
    assert torch.equal(given.routing.position_T, positions.expand(2, -1).reshape(-1))
    assert not torch.allclose(model(ids, position_ids=positions * 3).logits, default.logits, atol=1e-3)


@torch.no_grad()
def test_continuing_with_a_cache_equals_one_pass(model: MoesaicForCausalLM) -> None:
    ids = token_ids()
    first = model(ids[:, :7], use_cache=True)
    second = model(ids[:, 7:], past_key_values=first.past_key_values, output_routing=True)
    torch.testing.assert_close(second.logits, model(ids).logits[:, 7:], **CLOSE)
    assert second.routing.records[1].index_TK.shape == (10, 2)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "moesaic"])
def test_experts_implementations_agree(model: MoesaicForCausalLM, implementation: str) -> None:
    expected, model, ids = model, copy_of(model), token_ids()
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    ours, theirs = model(ids, labels=ids), expected(ids, labels=ids)
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    expert = model.moe_blocks()[2].experts.down_proj
    (gradient,) = torch.autograd.grad(ours.loss, expert)
    (reference,) = torch.autograd.grad(theirs.loss, expected.moe_blocks()[2].experts.down_proj)
    torch.testing.assert_close(gradient, reference, **CLOSE)


def test_an_unknown_experts_implementation_is_refused(llama: MoesaicForCausalLM) -> None:
    with pytest.raises(ValueError, match="fastest"):
        copy_of(llama).set_experts_implementation("fastest")


def test_moesaic_kernels_are_the_default(llama: MoesaicForCausalLM) -> None:
    assert llama.config._experts_implementation == "moesaic"


@torch.no_grad()
def test_half_precision(model: MoesaicForCausalLM) -> None:
    ids = token_ids()
    half = copy_of(model).to(torch.bfloat16)
    output = half(ids, labels=ids, output_routing=True)
    assert output.logits.dtype == torch.bfloat16
    assert {routing.weight_TK.dtype for routing in output.routing.records.values()} == {torch.float32}
    torch.testing.assert_close(output.loss.float(), model(ids, labels=ids).loss, rtol=0.1, atol=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(ids, labels=ids, output_routing=True)
    assert {routing.logits_TN.dtype for routing in mixed.routing.records.values()} == {torch.float32}
    torch.testing.assert_close(mixed.loss, model(ids, labels=ids).loss, rtol=0.1, atol=0.0)


def test_casting_keeps_the_selection_bias_in_full_precision() -> None:
    model = tiny_model("llama", router={"top_k": 2, "selection_bias": True})
    for block in model.moe_blocks().values():
        block.gate.e_score_correction_bias.uniform_()
    bias = model.moe_blocks()[1].gate.e_score_correction_bias.clone()
    half = model.to(torch.bfloat16).moe_blocks()[1].gate
    assert half.weight.dtype == torch.bfloat16
    assert torch.equal(half.e_score_correction_bias, bias)


@torch.no_grad()
def test_copies_are_independent(model: MoesaicForCausalLM) -> None:
    ids = token_ids()
    before, twin = model(ids).logits, copy_of(model)
    for parameter in twin.parameters():
        parameter.zero_()
    output = twin(ids, output_routing=True)
    assert list(output.routing.records) == [1, 2]
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_routing_listeners(model: MoesaicForCausalLM) -> None:
    heard = []
    handle = model.model.add_routing_listener(heard.append)
    model(token_ids())
    model(token_ids(1, 5))
    handle.remove()
    model(token_ids())
    assert [list(context.records) for context in heard] == [[1, 2], [1, 2]]
    assert [context.batch_size for context in heard] == [2, 1]


@torch.no_grad()
def test_seeds_decide_the_weights(model_type: str) -> None:
    assert all(
        torch.equal(one, other)
        for one, other in zip(tiny_model(model_type).parameters(), tiny_model(model_type).parameters(), strict=True)
    )


def test_training_reaches_every_parameter_and_lowers_the_loss(model_type: str) -> None:
    model, ids = tiny_model(model_type).train(), token_ids(4, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
