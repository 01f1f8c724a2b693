"""`fast_decoding`: the same tokens and logits as the plain modules, and a model that stays what it is."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tests.hf.tiny import DENSE_FAMILIES, token_ids
from tests.infer.decode.models import GREEDY, decoded, own, padded_ids, stock
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import moesaic
from moesaic.layer.kernels.native import decode

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.skipif(not decode.available(), reason="the native library was not built"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Layers with native attention of the three in these models; families not named run their own.
ATTENTION = dict.fromkeys(
    ["llama", "mistral", "qwen2", "qwen3", "granite", "gemma", "qwen3_moe", "qwen2_moe", "mixtral"], 3
)
# Layers that are two native calls, or one and the feed-forward network.
LAYERS = {**ATTENTION, "granite": 0}
ROUTERS = dict.fromkeys(["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"], 3)


def assert_same(plain: tuple[Tensor, Tensor], fast: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Logits equal within the rounding of the dtype as long as the tokens before were; in float32 all tokens are."""
    step = torch.finfo(dtype).eps
    atol = 4 * step * float(plain[1].abs().max()) if dtype != torch.float32 else 1e-4
    for row in range(plain[0].shape[0]):
        same = (plain[0][row] == fast[0][row]).long().cumprod(0).sum().item()
        assert same == plain[0].shape[1] or dtype != torch.float32
        compared = slice(0, same + 1)
        torch.testing.assert_close(fast[1][row, compared], plain[1][row, compared], rtol=0, atol=atol)


@pytest.mark.parametrize("model_type", [*DENSE_FAMILIES, "qwen3_moe", "qwen2_moe", "mixtral", "olmoe"])
def test_every_family_decodes_the_same(model_type: str) -> None:
    model = stock(model_type)
    for ids, mask in ((token_ids(1, 7), None), padded_ids()):
        plain = decoded(model, ids, mask)
        with moesaic.fast_decoding(model) as fast:
            assert_same(plain, decoded(model, ids, mask), torch.float32)
        assert fast.counts["attention layers"] == ATTENTION.get(model_type, 0)
        assert fast.counts["decoder layers"] == LAYERS.get(model_type, 0)
        assert fast.counts["routers"] == ROUTERS.get(model_type, 0)


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the halves of layers were computed natively."""
    calls: Counter[str] = Counter()

    def count(kind: type, name: str) -> None:
        plain = kind.__call__

        def counted(self: Any, *args: Any) -> Any:
            calls[name] += 1
            return plain(self, *args)

        monkeypatch.setattr(kind, "__call__", counted)

    count(decode.AttentionHalfPlan, "attention")
    count(decode.MoEHalfPlan, "experts")
    return calls


SHARED = {"shared_experts": {"intermediate_size": 16, "sigmoid_gate": True}}


@pytest.mark.parametrize(
    ("make", "attention", "experts"),
    [
        (lambda: stock("qwen3_moe"), 3, 3),
        (lambda: stock("qwen2_moe"), 3, 0),  # its shared expert stands between
        (lambda: stock("mixtral"), 3, 3),
        (lambda: stock("llama"), 3, 0),
        (lambda: own("qwen3"), 3, 2),  # the first layer is dense
        (lambda: own("llama", **SHARED), 3, 2),
        (lambda: own("llama", capacity={"factor": 4.0}), 3, 0),
        (lambda: own("llama", experts={"num_experts": 4, "intermediate_size": 24, "kernel": "grouped"}), 3, 0),
        (lambda: own("llama", experts={"num_experts": 4, "intermediate_size": 24, "bias": True}), 3, 2),
        (lambda: own("llama", experts={"num_experts": 4, "intermediate_size": 24, "gated": False}), 3, 2),
    ],
)
def test_layers_in_two_calls(make: Any, attention: int, experts: int, halves: Counter[str]) -> None:
    model = make()
    for ids, mask in ((token_ids(1, 7), None), padded_ids()):
        plain = decoded(model, ids, mask)
        assert not halves
        with moesaic.fast_decoding(model):
            assert_same(plain, decoded(model, ids, mask), torch.float32)
        steps = GREEDY["max_new_tokens"] - 1
        assert (halves["attention"], halves["experts"]) == (attention * steps, experts * steps)
        halves.clear()


def test_the_variable_that_chooses_kernels(halves: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = stock("qwen3_moe")
    with moesaic.fast_decoding(model):
        decoded(model, token_ids(1, 3), max_new_tokens=2)
        assert halves["experts"] == 3
        monkeypatch.setenv("MOESAIC_KERNEL", "grouped")
        decoded(model, token_ids(1, 3), max_new_tokens=2)
        assert halves["experts"] == 3
        monkeypatch.delenv("MOESAIC_KERNEL")
        model.set_experts_implementation("grouped_mm")
        decoded(model, token_ids(1, 3), max_new_tokens=2)
        assert halves["experts"] == 3


@torch.no_grad()
def test_modes_that_watch_operations_see_them() -> None:
    model = stock("qwen3_moe")
    ids = token_ids(1, 1)
    cache = model(token_ids(1, 4), use_cache=True).past_key_values
    with FlopCounterMode(display=False) as plain:
        model(ids, past_key_values=copy.deepcopy(cache))
    with moesaic.fast_decoding(model), FlopCounterMode(display=False) as fast:
        model.set_experts_implementation("grouped_mm")
        model(ids, past_key_values=copy.deepcopy(cache))
    assert fast.get_total_flops() == plain.get_total_flops() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_dtypes_and_threads(dtype: torch.dtype, threads: int) -> None:
    # All experts are picked: in low precision a nearly equal one may be picked instead, which changes everything after.
    models = [stock(name, dtype, num_experts_per_tok=4) for name in ("qwen3_moe", "mixtral")]
    models += [own("qwen3", dtype, router={"top_k": 4})]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for model in models:
            ids, mask = padded_ids()
            plain = decoded(model, ids, mask)
            with moesaic.fast_decoding(model) as fast:
                assert_same(plain, decoded(model, ids, mask), dtype)
            assert fast.counts["attention layers"] == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "router",
    [
        {"top_k": 2},
        {"top_k": 3, "normalize_top_k": True, "normalization_epsilon": 1e-3, "scaling_factor": 1.7},
        {"top_k": 2, "score_function": "sigmoid"},
        {"top_k": 2, "softmax_over": "selected"},
        {"top_k": 2, "linear_bias": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_record_of_our_routers(router: dict[str, Any]) -> None:
    model = own(router=router)
    ids = token_ids(3, 1)
    plain = model(ids, output_routing=True).routing
    with moesaic.fast_decoding(model) as fast:
        found = model(ids, output_routing=True).routing
    assert fast.counts["routers"] == 2  # the first layer is dense
    assert plain.records.keys() == found.records.keys()
    for layer, expected in plain.records.items():
        actual = found.records[layer]
        assert torch.equal(actual.index_TK, expected.index_TK)
        for name in ("weight_TK", "logits_TN", "scores_TN", "selection_TN"):
            torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "router",
    [
        {"top_k": 2, "selection_bias": True},
        {"top_k": 2, "input_norm": True},
        {"top_k": 2, "num_groups": 2, "top_k_groups": 1},
        {"type": "recurrent", "top_k": 2, "state_size": 8},
        {"type": "null_experts", "top_k": 2, "num_null": 2},
    ],
    ids=str,
)
def test_other_routers_run_as_they_are(router: dict[str, Any]) -> None:
    model = own(router=router)
    plain = decoded(model, token_ids(2, 5))
    with moesaic.fast_decoding(model) as fast:
        assert_same(plain, decoded(model, token_ids(2, 5)), torch.float32)
    assert fast.counts["routers"] == 0


def test_a_context_that_outgrows_its_room() -> None:
    model = stock("qwen3_moe")
    ids = token_ids(1, 40)
    plain = decoded(model, ids, max_new_tokens=90)
    with moesaic.fast_decoding(model):
        assert_same(plain, decoded(model, ids, max_new_tokens=90), torch.float32)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_other_ways_of_generating(options: dict[str, Any]) -> None:
    model = own()
    ids, mask = padded_ids()
    plain = model.generate(ids, attention_mask=mask, **{**GREEDY, **options})
    with moesaic.fast_decoding(model):
        assert torch.equal(model.generate(ids, attention_mask=mask, **{**GREEDY, **options}), plain)


@torch.no_grad()
def test_cache_in_other_hands() -> None:
    """A cache may be cropped, copied and continued twice; each continuation sees its own tokens."""
    model = stock("llama")
    ids, new = token_ids(1, 6), token_ids(1, 2, seed=9)
    with moesaic.fast_decoding(model):
        cache = model(ids, use_cache=True).past_key_values
        first = model(new[:, :1], past_key_values=cache).logits
        for copied in (copy.deepcopy(cache), _shallow(cache)):
            branch = model(new[:, 1:], past_key_values=copied).logits
            again = model(new[:, :1], past_key_values=cache).logits
            expected = model(torch.cat([ids, new[:, :1], new[:, 1:]], 1)).logits[:, -1:]
            torch.testing.assert_close(branch, expected, rtol=0, atol=1e-4)
            expected = model(torch.cat([ids, new[:, :1], new[:, :1]], 1)).logits[:, -1:]
            torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)
            # The branch's token is still what the branch sees, not the one that came in the other after it.
            longer = model(new[:, :1], past_key_values=copied).logits
            expected = model(torch.cat([ids, new[:, :1], new[:, 1:], new[:, :1]], 1)).logits[:, -1:]
            torch.testing.assert_close(longer, expected, rtol=0, atol=1e-4)
            cache.crop(-1)
        cache.crop(-1)
        torch.testing.assert_close(model(new[:, :1], past_key_values=cache).logits, first, rtol=0, atol=1e-4)


def _shallow(cache: Any) -> Any:
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


@pytest.mark.parametrize("trained", ["", "experts", "bias"])
def test_gradients_are_those_of_the_plain_model(trained: str) -> None:
    model, ids = own("qwen2"), token_ids(2, 1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    expected = _gradients(model, ids)
    with moesaic.fast_decoding(model):
        actual = _gradients(model, ids)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def _gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids).logits.square().sum().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_weights_that_change_move_or_are_replaced() -> None:
    model, ids = stock("qwen3_moe"), token_ids(1, 4)
    with moesaic.fast_decoding(model):
        decoded(model, ids)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        changed = decoded(model, ids)
        model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()}, assign=True)
        replaced = decoded(model, ids)
        model.to(torch.bfloat16)
        cast = decoded(model, ids)
    plain = stock("qwen3_moe")
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.1)
        assert_same(decoded(plain, ids), changed, torch.float32)
        for parameter in plain.parameters():
            parameter.mul_(0.9)
        assert_same(decoded(plain, ids), replaced, torch.float32)
        assert_same(decoded(plain.to(torch.bfloat16), ids), cast, torch.bfloat16)


def test_the_model_stays_what_it_is(tmp_path: Path) -> None:
    model = own()
    kinds = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    model.save_pretrained(tmp_path / "plain")
    fast = moesaic.fast_decoding(model)
    assert fast.counts["linear maps"] > 0
    assert list(model.state_dict()) == names
    assert all(
        isinstance(m, kind) and type(m).__name__ == kind.__name__
        for m, kind in zip(model.modules(), kinds, strict=True)
    )
    model.save_pretrained(tmp_path / "fast")
    assert (
        load_file(tmp_path / "plain/model.safetensors").keys() == load_file(tmp_path / "fast/model.safetensors").keys()
    )
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "fast" / file).read_bytes()
    decoded(model, token_ids(1, 4))
    copied = copy.deepcopy(model)
    assert [type(module) for module in copied.modules()] == kinds
    assert torch.equal(decoded(copied, token_ids(1, 4))[0], decoded(model, token_ids(1, 4))[0])
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    assert type(pickle.loads(pickle.dumps(linear))) is nn.Linear
    fast.undo()
    assert [type(module) for module in model.modules()] == kinds
    fast.undo()


def test_the_experts_implementation_comes_back() -> None:
    model = stock("qwen3_moe")
    model.set_experts_implementation("eager")
    with moesaic.fast_decoding(model):
        assert model.config._experts_implementation == "moesaic"
    assert model.config._experts_implementation == "eager"


def test_twice_is_once() -> None:
    model = stock("llama")
    with moesaic.fast_decoding(model) as outer:
        with moesaic.fast_decoding(model) as inner:
            assert not inner.counts
        assert outer.counts
        assert type(model.lm_head) is not nn.Linear
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("adapter_first", [True, False])
def test_with_an_adapter(adapter_first: bool) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    plain = get_peft_model(own(), config).eval()
    expected = decoded(plain, token_ids(2, 5))
    assert not torch.allclose(expected[1], decoded(own(), token_ids(2, 5))[1], atol=1e-2)
    torch.manual_seed(0)
    model = own()
    if adapter_first:
        model = get_peft_model(model, config).eval()
    handle = moesaic.fast_decoding(model)
    if not adapter_first:
        model = get_peft_model(model, config).eval()
    assert handle.counts["linear maps"] > 0
    assert_same(expected, decoded(model, token_ids(2, 5)), torch.float32)
    merged = model.merge_and_unload()
    assert_same(expected, decoded(merged, token_ids(2, 5)), torch.float32)
    handle.undo()


def test_hooks_are_called() -> None:
    model, seen = stock("qwen3_moe"), []
    expected = decoded(model, token_ids(1, 3))
    with moesaic.fast_decoding(model):
        decoded(model, token_ids(1, 3), max_new_tokens=4)
        names = (
            "self_attn.q_proj",
            "self_attn.k_norm",
            "self_attn.o_proj",
            "mlp.gate",
            "mlp.experts",
            "mlp",
            "input_layernorm",
        )
        for layer, name in enumerate(names):
            module = model.model.layers[layer % 3].get_submodule(name)
            handle = module.register_forward_hook(lambda module, args, output, name=name: seen.append(name))
            decoded(model, token_ids(1, 3), max_new_tokens=4)
            assert seen.count(name) == 4, name
            handle.remove()
            assert_same(expected, decoded(model, token_ids(1, 3)), torch.float32)
    assert len(seen) == 4 * len(names)


def test_autocast_runs_as_before() -> None:
    model, ids = own(), token_ids(1, 5)
    with torch.autocast("cpu", torch.bfloat16):
        plain = decoded(model, ids)
        with moesaic.fast_decoding(model):
            fast = decoded(model, ids)
    assert torch.equal(plain[1], fast[1])


def test_what_is_not_plain_is_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class LouderNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            self.variance_epsilon = 1e-6

        def forward(self, hidden_states: Tensor) -> Tensor:
            return 3 * self.weight * hidden_states

    model = nn.Sequential(
        Scaled(8, 8), LouderNorm(), nn.Linear(8, 8, dtype=torch.float64), nn.Linear(8, 8, device="meta")
    )
    with moesaic.fast_decoding(model) as fast:
        assert not fast.counts


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "available", lambda: False)
    model = stock("llama")
    with moesaic.fast_decoding(model) as fast:
        assert not fast.counts
        assert type(model.lm_head) is nn.Linear


@torch.no_grad()
def test_compiled_graphs_hold_the_plain_modules(halves: Counter[str]) -> None:
    model, ids = own(), token_ids(1, 6)
    expected = model(ids, use_cache=False).logits
    with moesaic.fast_decoding(model):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, rtol=0, atol=1e-4)
    assert not halves
