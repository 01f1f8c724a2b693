"""Routing by task: gates against one router a task, embeddings, fixed experts, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import Routing, RoutingContext, TaskConfig, TaskRouter, TopKConfig

N, D, TASKS, LENGTH = 6, 4, 3, 5
TASK_B = torch.tensor([2, 0, 2, 1])


def make_router(**fields: Any) -> TaskRouter:
    router = TaskConfig.from_dict({"num_tasks": TASKS, **fields}).build(D, N).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return router


def tokens() -> Tensor:
    return torch.randn(4 * LENGTH, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def route(router: TaskRouter, x_TD: Tensor, task_B: Tensor = TASK_B) -> Routing:
    return router(x_TD, RoutingContext(batch_size=len(task_B), task_B=task_B))


# --- A gate for each task (MMoE) --------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [2, N])
def test_each_task_is_routed_by_its_own_gate(top_k: int) -> None:
    """Each sequence gets what a top-k router with its task's rows gives it."""
    router, x_TD = make_router(top_k=top_k, normalize_top_k=top_k == 2), tokens()
    routing = route(router, x_TD)
    assert router.weight is not None
    for sequence, task in enumerate(TASK_B.tolist()):
        alone = TopKConfig(top_k=top_k, normalize_top_k=top_k == 2).build(D, N).double()
        alone.weight.data.copy_(router.weight[task])
        rows = slice(sequence * LENGTH, (sequence + 1) * LENGTH)
        expected = alone(x_TD[rows])
        assert torch.equal(routing.index_TK[rows], expected.index_TK)
        torch.testing.assert_close(routing.weight_TK[rows], expected.weight_TK)
        torch.testing.assert_close(routing.logits_TN[rows], expected.logits_TN)


def test_gates_have_the_gradients_of_finite_differences() -> None:
    router = make_router(top_k=2)
    x_TD = tokens().requires_grad_()
    assert torch.autograd.gradcheck(lambda x_TD: route(router, x_TD).weight_TK, x_TD)


def test_a_task_sends_no_gradient_into_the_gates_of_others() -> None:
    router = make_router(top_k=2)
    assert router.weight is not None
    route(router, tokens(), torch.tensor([2, 0, 2, 0])).weight_TK.sum().backward()
    assert router.weight.grad is not None
    assert [gate.any().item() for gate in router.weight.grad] == [True, False, True]


# --- A task embedding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embedding_input", ["replace", "add"])
def test_gate_reads_the_embedding_of_the_task(embedding_input: str) -> None:
    router, x_TD = make_router(kind="embedding", top_k=2, embedding_input=embedding_input), tokens()
    routing = route(router, x_TD)
    assert router.weight is not None
    assert router.task_embedding is not None
    for token in range(len(x_TD)):
        read_D = router.task_embedding[TASK_B[token // LENGTH]]
        if embedding_input == "add":
            read_D = read_D + x_TD[token]
        torch.testing.assert_close(routing.scores_TN[token], (router.weight @ read_D).softmax(0))
    one_set = {tuple(sorted(experts)) for experts in routing.index_TK[:LENGTH].tolist()}
    assert (len(one_set) == 1) == (embedding_input == "replace")


# --- Fixed experts ----------------------------------------------------------------------------------------------------


def test_fixed_experts_share_the_weight_equally() -> None:
    routing = route(make_router(kind="fixed", experts=[[5], [0, 3], [1, 2, 4]]), tokens())
    assert routing.index_TK[::LENGTH].tolist() == [[1, 2, 4], [5, N, N], [1, 2, 4], [0, 3, N]]
    expected_TK = torch.tensor([[1 / 3] * 3, [1, 0, 0], [1 / 3] * 3, [0.5, 0.5, 0]], dtype=torch.float64)
    torch.testing.assert_close(routing.weight_TK[::LENGTH], expected_TK)
    assert routing.scores_TN[LENGTH].tolist() == [0, 0, 0, 0, 0, 1]


def test_without_a_list_experts_are_split_evenly() -> None:
    router = make_router(kind="fixed")
    assert route(router, tokens()).index_TK[::LENGTH].tolist() == [[4, 5], [0, 1], [4, 5], [2, 3]]
    assert router.picks == 2
    assert not router.config.may_skip


def test_mean_number_of_experts() -> None:
    assert make_router(kind="fixed", experts=[[5], [0, 3], [1, 2, 4]]).picks == 2


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"top_k = None is missing, and kind: gate needs it"),
        ({"top_k": 7}, r"top_k = 7 is larger than num_experts \(6\)"),
        ({"top_k": 1, "experts": [[0]] * 3}, r"experts = .* has no effect with kind: gate"),
        ({"top_k": 1, "embedding_input": "add"}, r"embedding_input = 'add' has no effect with kind: gate"),
        ({"kind": "fixed", "top_k": 2}, r"top_k = 2 has no effect with kind: fixed"),
        ({"kind": "fixed", "experts": [[0], [1]]}, r"experts = 2 is the number of lists; give 3 of them"),
        ({"kind": "fixed", "experts": [[0], [], [1]]}, r"experts\[1\] = \(\) is empty"),
        (
            {"kind": "fixed", "experts": [[0], [1, 1], [1]]},
            r"experts\[1\] = \(1, 1\) is empty or names an expert twice",
        ),
        ({"kind": "fixed", "experts": [[0], [1], [6]]}, r"experts\[2\] = 6 is not an expert; choose 0 to 5"),
        ({"kind": "fixed", "num_tasks": 4}, r"num_tasks = 4 does not divide num_experts \(6\); give `experts`"),
    ],
)
def test_bad_config_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_router(**fields)


@pytest.mark.parametrize("task", [-1, TASKS])
@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_k": 1, "kind": "embedding"}, {"kind": "fixed"}], ids=str)
def test_unknown_task_is_refused(fields: dict[str, Any], task: int) -> None:
    with pytest.raises(ConfigError, match=rf"task = {task} is not in \[0, 3\); .* num_tasks"):
        route(make_router(**fields), tokens(), torch.tensor([0, 1, task, 2]))


def test_missing_task_is_named() -> None:
    with pytest.raises(ConfigError, match=r"task = None is missing, .*; give the task of each sequence"):
        make_router(top_k=1)(tokens())
