"""What a model folder is said to hold is what `save_pretrained` writes, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.hf.tiny import DENSE_FAMILIES, backbone_config, dense_model, tiny_model
from tests.parity.stock_models import FAMILIES, stock_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.core_model_loading import ConversionOps

import moesaic
from moesaic.errors import UnsupportedModel
from moesaic.hf.compat import WeightConverter, register_conversion
from moesaic.hf.stored import stored_tensors


def check(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    on_disk = load_file(folder / "model.safetensors")
    stored, state = stored_tensors(model), model.state_dict()
    assert {entry.name for entry in stored} == set(on_disk)
    for entry in stored:
        whole = on_disk[entry.name]
        box = state[entry.source][tuple(slice(a, a + n) for a, n in zip(entry.start, entry.size, strict=True))]
        assert (entry.shape, entry.dtype, entry.nbytes) == (whole.shape, whole.dtype, whole.nbytes)
        assert torch.equal(entry.from_source(box), whole), entry.name
        # And back: the second half of the box, along its longest dimension.
        start, size = list(entry.start), list(entry.size)
        if size:
            longest = max(range(len(size)), key=lambda d: size[d])
            start[longest] += size[longest] // 2
            size[longest] -= size[longest] // 2
        part = state[entry.source][tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
        assert torch.equal(entry.from_source(part), whole[entry.slices(start, size)]), entry.name


@pytest.mark.parametrize("model_type", DENSE_FAMILIES)
def test_dense_families_and_models_on_them(model_type: str, tmp_path: Path) -> None:
    check(dense_model(model_type), tmp_path / "stock")
    check(tiny_model(model_type), tmp_path / "ours")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_moe_families_and_models_converted_from_them(model_type: str, tmp_path: Path) -> None:
    stock = stock_model(model_type)
    check(stock, tmp_path / "stock")
    check(moesaic.convert(stock), tmp_path / "ours")


def test_tied_and_shared_tensors_are_stored_once(tmp_path: Path) -> None:
    recurrent = {"type": "recurrent", "top_k": 2, "state_size": 8}
    model = tiny_model("llama", {"tie_word_embeddings": True}, router=recurrent)
    check(model, tmp_path)
    names = [entry.name for entry in stored_tensors(model)]
    assert "lm_head.weight" not in names
    assert sum(".cell." in name for name in names) == len(
        [*model.moe_blocks()[1].gate.get_submodule("cell").parameters()]
    )


def test_a_loaded_model_is_stored_under_the_names_it_came_with(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "first")
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "first"), tmp_path / "again")


class _Doubling(ConversionOps):
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: 2 * tensor[0] for name, tensor in input_dict.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


class DoubledLlama(LlamaForCausalLM):
    """Its head is twice as large on disk."""


def test_what_is_computed_on_the_way_to_disk_is_refused() -> None:
    register_conversion("DoubledLlama", [WeightConverter("lm_head.weight", "lm_head.weight", [_Doubling()])])
    with pytest.raises(UnsupportedModel, match=r"lm_head\.weight is not a part of one tensor of the model"):
        stored_tensors(DoubledLlama(LlamaConfig(**backbone_config("llama").to_dict())))
