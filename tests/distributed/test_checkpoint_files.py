"""A sharded model's folder is the one that one process writes, and no process ever holds more than its part."""

from __future__ import annotations

import functools
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.distributed.models import BACKBONE, model, spec
from tests.distributed.spawn import run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moesaic.dist import Layout, Meshes, ParallelConfig, build_sharded, parallelize
from moesaic.dist.checkpoint import Snapshot, Team, load_weights
from moesaic.dist.checkpoint.boxes import Spread, local_part
from moesaic.dist.checkpoint.shares import Shares
from moesaic.errors import CheckpointError
from moesaic.train.quiet import without_progress_bars

# All kinds of state: biases, shared experts, selection bias, adaptive coefficients, tied head.
RICH: dict[str, Any] = {
    "experts": {"num_experts": 8, "intermediate_size": 8, "bias": True},
    "router": {"type": "top_k", "top_k": 2, "score_function": "sigmoid", "selection_bias": True},
    "selection_bias_update": {"rate": 0.01},
    "shared_experts": {"num_experts": 1, "sigmoid_gate": True},
    "balance": [{"type": "load_balancing", "coefficient": 0.02, "adaptive": {"capacity_factor": 1.0, "decay": 0.8}}],
}
# Experts that do not go round: sharded by their width D.
OPENMOE: dict[str, Any] = {
    "experts": {"num_experts": 4, "intermediate_size": 6, "activation": "swiglu_double", "bias": True},
    "shared_experts": {"placement": "after"},
}
ODD: dict[str, Any] = {"experts": {"num_experts": 6, "intermediate_size": 8, "gated": False, "activation": "gelu"}}
RECURRENT: dict[str, Any] = {"router": {"type": "recurrent", "top_k": 2, "state_size": 8}}

FROZEN: dict[str, Any] = {"router": {**RECURRENT["router"], "freeze_head": True}}


def built(moe: dict[str, Any] | None, tied: bool) -> PreTrainedModel:
    """A model with something in every tensor; None for a stock dense one."""
    torch.manual_seed(0)
    if moe is None:
        values = {name: value for name, value in BACKBONE.items() if name != "model_type"}
        found: Any = LlamaForCausalLM(LlamaConfig(**values, tie_word_embeddings=tied))
    else:
        found = model(spec(**moe), tie_word_embeddings=tied)
    for name, buffer in found.named_buffers():
        if "inv_freq" not in name and buffer.dtype.is_floating_point:
            buffer.normal_()
    return found


def sharded(parallel: dict[str, Any], moe: dict[str, Any] | None, tied: bool) -> PreTrainedModel:
    module = built(moe, tied)
    config = ParallelConfig.from_dict(parallel)
    layout = Layout.of(config, dist.get_world_size(), None if moe is None else spec(**moe))
    parallelize(module, Meshes.of(layout, "cpu"), config)
    return module


class LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors that come up inside, and how much of it there was at once."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        tensors = [*model.parameters(), *model.buffers()]
        self._before = {local_part(tensor).untyped_storage().data_ptr() for tensor in tensors}
        self._views: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor) and tensor.device.type == "cpu":
                self._note(tensor)
        return found

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in self._before:
            return
        if address not in self._views:
            self.now += size
            self.peak = max(self.peak, self.now)
        self._views[address] = self._views.get(address, 0) + 1
        weakref.finalize(tensor, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self._views[address] -= 1
        if not self._views[address]:
            del self._views[address]
            self.now -= size


def export(path: Path, parallel: dict[str, Any], moe: dict[str, Any] | None, tied: bool) -> tuple[int, int]:
    """Write the folder; bytes that this rank wrote, and most that it had in memory beside the model."""
    module = sharded(parallel, moe, tied)
    team = Team()
    shares = Shares(module, team.size)
    with LiveBytes(module) as live, team.directory(path) as folder:
        Snapshot(module, torch.optim.SGD(module.parameters()), team).write(folder)
    return sum(entry.nbytes for entry in shares.of(team.rank)), live.peak


CASES = [
    pytest.param(2, {"ep": 2}, RICH, True, id="ep2-rich-tied"),
    pytest.param(4, {"ep": 2}, RICH, False, id="fsdp4-ep2-rich"),
    pytest.param(4, {"ep": 2, "esp": 2}, RICH, False, id="ep2-esp2-rich"),
    pytest.param(2, {"esp": 2}, OPENMOE, False, id="esp2-openmoe"),
    pytest.param(4, {}, ODD, False, id="fsdp4-by-width"),
    pytest.param(4, {"dp_replicate": 2, "ep": 4}, RECURRENT, False, id="replicate2-ep4-recurrent"),
    pytest.param(2, {}, None, True, id="fsdp2-dense-tied"),
    pytest.param(2, {"ep": 2, "partition_embedding": True}, FROZEN, False, id="ep2-embedding-in-columns-frozen"),
]


@pytest.mark.parametrize(("world", "parallel", "moe", "tied"), CASES)
def test_the_folder_is_that_of_one_process(
    world: int, parallel: dict[str, Any], moe: dict[str, Any] | None, tied: bool, tmp_path: Path
) -> None:
    expected = built(moe, tied)
    expected.save_pretrained(tmp_path / "one")
    whole = load_file(tmp_path / "one" / "model.safetensors")

    path = tmp_path / "many"
    found = run_ranks(world, export, path, parallel, moe, tied)

    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {f"model-{rank + 1:05d}-of-{world:05d}.safetensors" for rank in range(world)}
    files = {file: load_file(path / file) for file in set(index.values())}
    assert {name: file for file, tensors in files.items() for name in tensors} == index
    assert set(index) == set(whole)
    for name, file in index.items():
        assert torch.equal(files[file][name], whole[name]), name
    for name in ("config.json", "generation_config.json"):
        assert json.loads((path / name).read_text()) == json.loads((tmp_path / "one" / name).read_text())

    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert type(loaded) is type(expected)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name

    total, largest = sum(tensor.nbytes for tensor in whole.values()), max(t.nbytes for t in expected.parameters())
    shares = [share for share, _ in found]
    assert sum(shares) == total
    assert max(shares) <= total / world + max(tensor.nbytes for tensor in whole.values())
    for _, peak in found:
        assert 0 < peak <= 2.5 * largest


def read_shards(path: Path, parallel: dict[str, Any], moe: dict[str, Any] | None, tied: bool) -> tuple[int, int, int]:
    """Read the folder into shards and compare; bytes read, held here, and of the whole model."""
    expected_model, rank = sharded(parallel, moe, tied), dist.get_rank()
    whole = built(moe, tied).state_dict()
    expected = {name: local_part(tensor) for name, tensor in expected_model.state_dict().items()}
    config = ParallelConfig.from_dict(parallel)
    meshes = Meshes.of(Layout.of(config, dist.get_world_size(), None if moe is None else spec(**moe)), "cpu")
    build = functools.partial(AutoModelForCausalLM.from_config, AutoConfig.from_pretrained(path), dtype=torch.float32)
    module: Any = build_sharded(build, meshes, config, device=torch.device("cpu"), seed=None).model
    read = load_weights(module, path, rank)
    for (name, buffer), (_, other) in zip(module.named_buffers(), expected_model.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
    for (name, parameter), (_, other) in zip(module.named_parameters(), expected_model.named_parameters(), strict=True):
        assert parameter.requires_grad == other.requires_grad, name
    tensors = {id(module.get_parameter_or_buffer(name)): (name, t) for name, t in module.state_dict().items()}.values()
    for name, tensor in tensors:
        local, seen = local_part(tensor), 0
        assert torch.equal(local, expected[name]), name
        # The pieces are where FSDP and expert parallelism have put them.
        for piece in Spread.of(tensor).pieces(rank):
            box = whole[name][tuple(slice(a, a + n) for a, n in zip(piece.box.start, piece.box.size, strict=True))]
            assert torch.equal(piece.part(local, piece.box), box), name
            seen += box.numel()
        assert seen == local.numel(), name
    return read, sum(expected[name].nbytes for name, _ in tensors), sum(whole[name].nbytes for name, _ in tensors)


@pytest.mark.parametrize(("world", "parallel", "moe", "tied"), CASES)
def test_every_process_reads_what_it_holds_and_nothing_else(
    world: int, parallel: dict[str, Any], moe: dict[str, Any] | None, tied: bool, tmp_path: Path
) -> None:
    with without_progress_bars():
        built(moe, tied).save_pretrained(tmp_path, max_shard_size="8KB")
    found = run_ranks(world, read_shards, tmp_path, parallel, moe, tied)
    for read, held, total in found:
        assert read == held < total
    if parallel.get("dp_replicate", 1) == 1:
        assert max(held for _, held, _ in found) < 0.75 * found[0][2]


def test_a_checkpoint_of_another_precision_is_cast(tmp_path: Path) -> None:
    saved = model(dtype=torch.bfloat16)
    saved.save_pretrained(tmp_path)
    found = model(seed=1)
    load_weights(found, tmp_path)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name].float()), name


def _rewritten(folder: Path, change: Any) -> None:
    from safetensors.torch import save_file

    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: {name.replace("experts.0.", "experts.00."): t for name, t in tensors.items()},
            r"6 tensors are not there .*first model\.layers\.0\.mlp\.experts\.0\.down_proj\.weight.*moesaic convert",
        ),
        (lambda tensors: {**tensors, "extra": torch.zeros(1)}, "1 unexpected tensors, first extra"),
        (lambda tensors: {**tensors, "lm_head.weight": torch.zeros(3, 16)}, r"lm_head\.weight has shape \(3, 16\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    _rewritten(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_weights(model(), tmp_path)


def test_a_head_that_is_stored_though_it_is_tied_is_passed_over(tmp_path: Path) -> None:
    saved = model(tie_word_embeddings=True)
    saved.save_pretrained(tmp_path)
    _rewritten(tmp_path, lambda tensors: {**tensors, "lm_head.weight": saved.lm_head.weight.detach().clone()})
    found = model(seed=1, tie_word_embeddings=True)
    load_weights(found, tmp_path)
    assert torch.equal(found.lm_head.weight, saved.lm_head.weight)
