"""PEFT works on a moesaic model as on any other: LoRA on attention, trained, saved, loaded and merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.hf.tiny import copy_of, tiny_model, token_ids

from moesaic import MoesaicForCausalLM

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*:FutureWarning", "ignore:fan_in_fan_out:UserWarning"
)
ATTENTION = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}


@pytest.mark.parametrize("model_type", ATTENTION)
def test_lora_on_attention(model_type: str, tmp_path: Path) -> None:
    base, ids = tiny_model(model_type), token_ids()
    adapted = get_peft_model(
        copy_of(base), LoraConfig(r=4, target_modules=ATTENTION[model_type], task_type="CAUSAL_LM")
    ).train()
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 3 * len(ATTENTION[model_type])
    frozen = {name: value.clone() for name, value in adapted.named_parameters() if not value.requires_grad}
    optimizer, losses = torch.optim.AdamW(trainable, lr=0.05), []
    for _ in range(5):
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, frozen[name]) for name, value in adapted.named_parameters() if name in frozen)

    expected = adapted.eval()(ids).logits
    assert not torch.allclose(expected, base(ids).logits, atol=1e-2)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy_of(base), tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, expected)
    with loaded.disable_adapter():
        torch.testing.assert_close(loaded(ids).logits, base(ids).logits)
    generated = loaded.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    merged = loaded.merge_and_unload()
    assert isinstance(merged, MoesaicForCausalLM)
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(ids, max_new_tokens=4, do_sample=False), generated)


@pytest.mark.parametrize("reentrant", [False, True])
def test_lora_under_gradient_checkpointing(llama: MoesaicForCausalLM, reentrant: bool) -> None:
    ids, results = token_ids(), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        adapted = get_peft_model(copy_of(llama), LoraConfig(r=4, target_modules=ATTENTION["llama"])).train()
        if checkpointing:
            adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
            adapted.enable_input_require_grads()
        adapted(input_ids=ids, labels=ids).loss.backward()
        results.append({name: value.grad for name, value in adapted.named_parameters() if value.requires_grad})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-5, atol=1e-7)
    assert any(gradient.abs().sum() > 0 for gradient in results[0].values())
