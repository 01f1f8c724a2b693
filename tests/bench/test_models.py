"""Whole models: everyone generates the same, and llama.cpp is handed the right weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moesaic.bench import Cell, CellResult, ModelSize, Options, Shape, gguf, run_bench
from moesaic.bench import run as runner
from moesaic.bench.contenders import ModelContender, contenders, llama
from moesaic.bench.contenders.llama import LlamaCpp, WorkerProcess
from moesaic.bench.contenders.model import ModelEntry
from moesaic.bench.models import BenchModel, Generated, decoded_logits, generate, moe_config
from moesaic.bench.rates import Rates
from moesaic.bench.work import model_forward

SIZE = ModelSize(layers=2, vocabulary=32, new_tokens=4)
CELL = Cell("model-decode", Shape(16, 8, 4, 2), "f32", 6, 1, "balanced", "cpu")
OPTIONS = Options(rounds=2, patience=0.1, model=SIZE)


@pytest.fixture(autouse=True)
def _known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "measure_rates", lambda dtype, device, quick: Rates(1e10, 1e11, "test"))


@pytest.fixture(scope="module")
def model() -> BenchModel:
    return BenchModel(CELL, SIZE, seed=0)


@pytest.mark.parametrize("case", ["model-decode", "model-prefill"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_everyone_who_can_run_here_is_right_and_measured(case: str, dtype: str) -> None:
    [result] = run_bench([Cell(case, CELL.shape, dtype, 6, 1, "balanced", "cpu")], OPTIONS).results
    assert result.finished
    for row in result.rows:
        assert row.measured or (row.status == "unavailable" and row.reason), (row.name, row.status, row.reason)
    for name in ("dense-model", "moesaic:experts", "transformers:eager", "transformers:grouped_mm"):
        assert result.measured(name), name
    if case == "model-decode" and dtype == "f32":
        rows = [row for row in result.rows if row.family != "dense" and row.measured]
        assert all(row.facts["tokens"] == rows[0].facts["tokens"] for row in rows)
        assert result.row_of("moesaic:experts").facts["same_tokens"] == SIZE.new_tokens


def test_a_model_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(ModelEntry):
        def logits(self, prompt: list[int], single: int) -> Tensor:
            return torch.randn(SIZE.vocabulary, generator=torch.Generator().manual_seed(0))

        def generate(self, prompt: list[int], new_tokens: int) -> Generated:
            raise AssertionError("must not be timed")

    class Contender(ModelContender):
        name, family = "wrong", "moesaic"

        def enter(self, cell: Cell, model: BenchModel) -> Wrong:
            return Wrong(cell, model)

    monkeypatch.setattr(runner, "contenders", lambda llama_cpp: [Contender()])
    [result] = run_bench([CELL], OPTIONS).results
    row = result.row_of("wrong")
    assert row.status == "failed"
    assert "away from those of transformers with eager experts" in row.reason


def test_logits_over_a_cache_are_those_of_the_whole_prompt(model: BenchModel) -> None:
    prompt = model.prompt(CELL)
    torch.testing.assert_close(decoded_logits(model.stock, prompt, 4), decoded_logits(model.stock, prompt, 0))


def test_generate_is_greedy_and_times_tokens(model: BenchModel) -> None:
    prompt = model.prompt(CELL)
    found = generate(model.stock, prompt, 3)
    for token in found.tokens:
        assert token == int(decoded_logits(model.stock, prompt, 0).argmax())
        prompt = [*prompt, token]
    assert found.first > 0
    assert found.seconds_a_token == found.rest / 2 > 0


def test_work_of_a_decoded_token() -> None:
    # d 128: 2 query heads and 2 key heads of 64, since 2 is no multiple of 4. Per layer: 4 * 128 * 128 attention,
    # 128 * 4 router, 2 experts of 3 * 128 * 8; head 128 * 32.
    shape, size = Shape(128, 8, 4, 2), ModelSize(layers=3, vocabulary=32)
    weights = 3 * (65536 + 512 + 2 * 3072) + 4096
    found = model_forward(shape, size, tokens=1, context=10, element_size=2)
    assert found.weight_bytes == 2 * weights
    assert found.bytes == 2 * weights + 3 * 2 * 10 * 128 * 2 + 128 * 2
    assert found.flops == 2 * weights + 3 * 4 * 10 * 128
    # A prompt: every expert is in use before long, the head is used once, and half of the context is seen on average.
    long = model_forward(shape, size, tokens=1000, context=1000, element_size=2)
    assert long.weight_bytes == pytest.approx(2 * (3 * (65536 + 512 + 4 * 3072) + 4096))
    assert long.flops == 2 * (1000 * 3 * (65536 + 512 + 2 * 3072) + 4096) + 3 * 4 * 1000 * 500 * 128


def test_active_weights_of_the_model_are_those_of_the_module(model: BenchModel) -> None:
    every = sum(parameter.numel() for name, parameter in model.stock.named_parameters() if parameter.ndim > 1)
    embeddings = SIZE.vocabulary * CELL.shape.hidden
    unused = SIZE.layers * 2 * CELL.shape.expert_parameters
    assert model_forward(CELL.shape, SIZE, 1, 1, 4).weight_bytes == 4 * (every - embeddings - unused)


def test_metadata_for_llama_cpp() -> None:
    config = moe_config(Shape(256, 32, 8, 2), ModelSize(layers=3, vocabulary=100))
    assert gguf.metadata(config) == {
        "qwen3moe.context_length": 4096,
        "qwen3moe.embedding_length": 256,
        "qwen3moe.block_count": 3,
        "qwen3moe.feed_forward_length": 32,
        "qwen3moe.attention.head_count": 4,
        "qwen3moe.attention.head_count_kv": 1,
        "qwen3moe.attention.key_length": 64,
        "qwen3moe.attention.value_length": 64,
        "qwen3moe.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen3moe.rope.freq_base": 10000.0,
        "qwen3moe.expert_count": 8,
        "qwen3moe.expert_used_count": 2,
        "qwen3moe.expert_feed_forward_length": 32,
        "qwen3moe.vocab_size": 100,
        "tokenizer.ggml.model": "no_vocab",
    }


def test_weights_for_llama_cpp(model: BenchModel, tmp_path: Path) -> None:
    gguf.hand_over(model.stock, tmp_path)
    index = json.loads((tmp_path / gguf.INDEX).read_text(encoding="utf-8"))
    numbers = np.fromfile(tmp_path / gguf.NUMBERS, dtype=np.uint8)
    found = {}
    for tensor in index["tensors"]:
        count = int(np.prod(tensor["shape"])) * tensor["width"]
        raw = numbers[tensor["start"] : tensor["start"] + count]
        found[tensor["name"]] = torch.from_numpy(raw.view(np.float32).reshape(tensor["shape"]).copy())
    assert sum(tensor.numel() for tensor in found.values()) == sum(p.numel() for p in model.stock.parameters())
    experts = model.stock.model.layers[1].mlp.experts
    gate_NFD, up_NFD = experts.gate_up_proj.chunk(2, dim=1)
    assert torch.equal(found["blk.1.ffn_gate_exps.weight"], gate_NFD)
    assert torch.equal(found["blk.1.ffn_up_exps.weight"], up_NFD)
    assert torch.equal(found["blk.1.ffn_down_exps.weight"], experts.down_proj)
    assert torch.equal(found["token_embd.weight"], model.stock.model.embed_tokens.weight)
    assert torch.equal(found["blk.0.attn_k.weight"], model.stock.model.layers[0].self_attn.k_proj.weight)


# Stands in for the two packages of llama.cpp where they are not installed. What it "generates" depends on the tokens
# and on a weight in the file, so a request or a file that is mixed up shows.
_GGUF = """
import json
class GGMLQuantizationType:
    pass
class _Types(type):
    def __getitem__(cls, name):
        return name
class GGMLQuantizationType(metaclass=_Types):
    pass
class GGUFWriter:
    def __init__(self, path, architecture):
        self.path, self.content = path, {"architecture": architecture, "tensors": {}}
    def add_uint32(self, key, value): self.content[key] = ["uint32", value]
    def add_float32(self, key, value): self.content[key] = ["float32", value]
    def add_string(self, key, value): self.content[key] = ["string", value]
    def add_tensor(self, name, raw, raw_dtype):
        self.content["tensors"][name] = [list(raw.shape), raw_dtype, int(raw.astype("int64").sum())]
    def write_header_to_file(self): pass
    def write_kv_data_to_file(self): pass
    def write_tensors_to_file(self): open(self.path, "w").write(json.dumps(self.content))
    def close(self): pass
"""
_LLAMA = """
import ctypes, json
__version__ = "0.0.test"
class Llama:
    def __init__(self, path, n_threads, n_ctx, **rest):
        print("loading", path)
        self.content, self.ctx, self.seen = json.load(open(path)), self, []
        if n_threads > 8:
            raise ValueError("too many threads")
    def n_vocab(self): return self.content["qwen3moe.vocab_size"][1]
    def reset(self): self.seen = []
    def eval(self, tokens): self.seen += tokens
def llama_get_logits_ith(model, index):
    logits = [0.0] * model.n_vocab()
    logits[(sum(model.seen) + len(model.seen)) % model.n_vocab()] = 1.0
    model.kept = (ctypes.c_float * len(logits))(*logits)
    return ctypes.cast(model.kept, ctypes.POINTER(ctypes.c_float))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gguf.py").write_text(_GGUF, encoding="utf-8")
    (tmp_path / "llama_cpp.py").write_text(_LLAMA, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=None)


@pytest.mark.usefixtures("stand_in")
def test_the_other_process_writes_the_file_and_generates(model: BenchModel) -> None:
    entry = LlamaCpp(sys.executable).enter(CELL, model)
    try:
        assert isinstance(entry, ModelEntry)
        assert entry.note == "llama-cpp-python 0.0.test"
        content = json.loads((model.folder / "model.gguf").read_text(encoding="utf-8"))
        assert content["architecture"] == "qwen3moe"
        assert content["qwen3moe.expert_count"] == ["uint32", 4]
        assert content["qwen3moe.rope.freq_base"] == ["float32", 10000.0]
        weight = model.stock.model.layers[1].mlp.experts.down_proj
        total = int(weight.numpy().view(np.uint8).astype("int64").sum())
        assert content["tensors"]["blk.1.ffn_down_exps.weight"] == [[4, 16, 8 * 4], "F32", total]
        assert entry.generate([3, 4], 3).tokens == [(7 + 2) % 32, (7 + 9 + 3) % 32, (7 + 9 + 19 + 4) % 32]
        assert int(entry.logits([3, 4, 5], 2).argmax()) == 15
        assert not (model.folder / gguf.NUMBERS).exists()
    finally:
        entry.close()


@pytest.mark.usefixtures("stand_in")
def test_what_goes_wrong_there_is_said_here() -> None:
    process = WorkerProcess(sys.executable)
    with pytest.raises(RuntimeError, match="FileNotFoundError"):
        process.ask("load", path="/nowhere/model.gguf", threads=1, context=8)
    process._process.kill()
    process._process.wait()
    with pytest.raises(RuntimeError, match="its process died"):
        process.ask("logits", tokens=[1], single=0)
    process.close()


def llama_row(python: str | None, cell: Cell = CELL) -> CellResult:
    options = Options(rounds=2, patience=0.1, model=SIZE, only=("llama.cpp",), llama_cpp=python)
    return run_bench([cell], options).results[0]


@pytest.mark.parametrize(
    ("python", "status", "reason"),
    [
        (None, "unavailable", "pip install llama-cpp-python gguf"),
        ("/nowhere/python", "unavailable", "/nowhere/python can't be started"),
        ("/bin/true", "failed", "its process died"),
    ],
)
def test_llama_cpp_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, python: str | None, status: str, reason: str
) -> None:
    real: Callable[..., object] = llama.importlib.util.find_spec
    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: None if name in llama._PACKAGES else real(name))
    row = llama_row(python).row_of("llama.cpp")
    assert row.status == status
    assert reason in row.reason


def test_llama_cpp_writes_the_same_tokens() -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    options = Options(rounds=2, patience=0.1, model=SIZE, only=("llama.cpp", "transformers:eager"))
    row = run_bench([CELL], options).results[0].row_of("llama.cpp")
    assert row.facts["same_tokens"] == SIZE.new_tokens


def test_names_are_unique_in_a_cell() -> None:
    for case in ("decode", "model-decode", "memory"):
        cell = Cell(case, CELL.shape, "f32", 4, 1, "balanced", "cpu")
        names = [person.name for person in contenders() if person.takes(cell)]
        assert len(names) == len(set(names))
