"""Which kernel is chosen, what is said about it, and what is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tests.layer.kernels.cases import make_call
from torch import Tensor

from moesaic.errors import UnsupportedKernel
from moesaic.layer import Experts, ExpertsConfig, MoEBlock, MoESpec
from moesaic.layer.kernels import KERNELS, Case, Kernel, select, selection

N, K, D, WIDTH = 4, 2, 6, 5


def case_of(x_TD: Tensor, **options: Any) -> Case:
    tokens, weights = x_TD.shape[0], make_call().weights
    return Case.of(weights, x_TD, torch.zeros(tokens, K, dtype=torch.int64), torch.ones(tokens, K), **options)


def test_auto_takes_the_first_kernel_that_can() -> None:
    assert select("loop", case_of(torch.ones(1, D)), KERNELS).name == "loop"
    assert select("auto", case_of(torch.ones(1, D, dtype=torch.int64)), KERNELS).name == "loop"


def test_auto_passes_over_a_kernel_that_does_not_suit_the_size() -> None:
    few = Kernel(
        "few", KERNELS[-1].run, lambda case: None, lambda case: "few rows" if case.rows_per_expert <= 1 else None
    )
    kernels = (few, *KERNELS)
    assert select("auto", case_of(torch.ones(2, D)), kernels).name == "few"
    assert select("auto", case_of(torch.ones(3, D)), kernels).name != "few"
    assert select("few", case_of(torch.ones(3, D)), kernels).name == "few"


def test_unknown_kernel_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(UnsupportedKernel, match=r"'fast'.*no kernel has this name.*auto or one of .*grouped, loop"):
        select("fast", case_of(torch.ones(1, D)), KERNELS)


def test_kernel_that_cannot_run_says_why() -> None:
    with pytest.raises(UnsupportedKernel, match=r"'grouped'.*needs floating point, got torch.int64 input"):
        select("grouped", case_of(torch.ones(1, D, dtype=torch.int64)), KERNELS)


def test_environment_variable_overrides_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(torch.ones(1, D))
    monkeypatch.setenv("MOESAIC_KERNEL", "loop")
    assert select("grouped", case, KERNELS).name == "loop"
    assert select("auto", case, KERNELS).name == "loop"
    monkeypatch.setenv("MOESAIC_KERNEL", "")
    assert select("grouped", case, KERNELS).name == "grouped"
    monkeypatch.setenv("MOESAIC_KERNEL", "fast")
    with pytest.raises(UnsupportedKernel, match=r"MOESAIC_KERNEL = 'fast' cannot be used .*no kernel has this name"):
        select("grouped", case, KERNELS)


def test_choice_is_logged_once_for_each_kernel_and_size_with_its_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection._chosen.cache_clear()
    selection._log_once.cache_clear()
    config = ExpertsConfig(num_experts=N, intermediate_size=WIDTH, kernel="grouped")

    def run(tokens: int) -> None:
        index_TK, weight_TK = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
        Experts(config, D)(torch.ones(tokens, D), index_TK, weight_TK)

    with caplog.at_level(logging.INFO, logger="moesaic.layer.kernels"):
        for tokens in (1, 1, 2, 40, 50):
            run(tokens)
        monkeypatch.setenv("MOESAIC_KERNEL", "loop")
        run(1)
    assert [record.getMessage() for record in caplog.records] == [
        "expert kernel: grouped for decode on cpu in float32 (asked for by experts.kernel)",
        "expert kernel: grouped for few rows on cpu in float32 (asked for by experts.kernel)",
        "expert kernel: loop for decode on cpu in float32 (asked for by MOESAIC_KERNEL)",
    ]


def test_a_kernel_that_can_not_skip_is_passed_over_where_picks_may_be_no_expert() -> None:
    needy = Kernel("needy", KERNELS[-1].run, lambda case: None, lambda case: "test", skips_no_expert=False)
    kernels = (needy, *KERNELS)
    assert select("auto", case_of(torch.ones(1, D), may_skip=False), kernels).name == "needy"
    assert select("auto", case_of(torch.ones(1, D)), kernels).name != "needy"
    with pytest.raises(UnsupportedKernel, match="needy: can't skip picks of no expert"):
        select("needy", case_of(torch.ones(1, D)), kernels)


@pytest.mark.parametrize("capacity", [None, {"factor": 1}], ids=["dropless", "capacity"])
def test_a_block_tells_its_experts_whether_picks_may_be_no_expert(capacity: dict[str, Any] | None) -> None:
    values = {"experts": {"num_experts": N, "intermediate_size": 3}, "router": {"top_k": 2}, "capacity": capacity}
    assert MoEBlock(MoESpec.from_dict(values), D).experts.may_skip == (capacity is not None)


def test_a_case_is_judged_once() -> None:
    """Decoding asks for the same case in every layer and at every token."""
    judged = []

    def refuses(case: Case) -> None:
        judged.append(case)

    kernels = (Kernel("counting", KERNELS[-1].run, refuses, lambda case: "test"),)
    for _ in range(3):
        select("auto", case_of(torch.ones(1, D)), kernels)
    assert len(judged) == 1
    select("auto", case_of(torch.ones(2, D)), kernels)
    assert len(judged) == 2


def test_compiled_code_takes_the_variable_of_when_it_was_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    selection._log_once.cache_clear()
    torch.compiler.reset()
    experts = Experts(ExpertsConfig(num_experts=N, intermediate_size=WIDTH, kernel="loop"), D)
    arguments = (torch.ones(3, D), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    monkeypatch.setenv("MOESAIC_KERNEL", "grouped")
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    with caplog.at_level(logging.INFO, logger="moesaic.layer.kernels"):
        actual = compiled(*arguments)
    assert [record.getMessage() for record in caplog.records if record.name == "moesaic.layer.kernels"] == [
        "expert kernel: grouped for compiled code on cpu in float32 (asked for by MOESAIC_KERNEL)"
    ]
    monkeypatch.delenv("MOESAIC_KERNEL")
    torch.testing.assert_close(actual, experts(*arguments))
    torch.compiler.reset()
    monkeypatch.setenv("MOESAIC_KERNEL", "fast")
    with pytest.raises(Exception, match="MOESAIC_KERNEL = 'fast' cannot be used"):
        torch.compile(experts, fullgraph=True, backend="aot_eager")(*arguments)


def test_size_classes_do_not_split_compiled_code() -> None:
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    experts = Experts(ExpertsConfig(num_experts=N, intermediate_size=WIDTH, kernel="grouped"), D).requires_grad_(False)
    compiled = torch.compile(experts, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (3, 50, 500):  # decode, few rows, many rows
        compiled(torch.ones(tokens, D), torch.zeros(tokens, 2, dtype=torch.int64), torch.ones(tokens, 2))
    assert len(graphs) == 1


def test_a_kernel_of_models_in_a_bare_layer_is_refused_with_the_reason() -> None:
    with pytest.raises(
        UnsupportedKernel, match=r"'grouped_mm' cannot be used \(it is transformers' own, for models only\)"
    ):
        select("grouped_mm", case_of(torch.ones(1, D)), KERNELS)
