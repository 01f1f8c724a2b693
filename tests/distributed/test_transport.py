"""How rows travel: what is sent, in which order, when it is waited for, and in which precision."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.spawn import run_ranks
from tests.distributed.spread_experts import Case, D, F, K, all_experts, inputs, most_picked, on_rank, spread
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from moesaic.dist.exchange import Traffic
from moesaic.dist.exchange import hierarchical as two_steps
from moesaic.dist.exchange.collectives import Transfer, all_to_all
from moesaic.dist.exchange.flat import Flat
from moesaic.dist.exchange.hierarchical import Hierarchical, groups_by_node
from moesaic.dist.expert_parallel import ExpertParallel
from moesaic.errors import ConfigError
from moesaic.layer import CapacityConfig, MoEBlock, MoESpec


def movers(traffic: Traffic | None = None) -> tuple[Flat, Hierarchical]:
    """Both movers of two nodes with two ranks each."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    return Flat(mesh.get_group(), traffic), Hierarchical(*groups_by_node(mesh, "ep", 2), traffic)


def worked_example() -> tuple[list[float], list[float], list[int]]:
    """What a rank holds after each of the two steps, and how many messages it sent to the other node."""
    traffic = Traffic(per_node=2)
    _, mover = movers(traffic)
    steps = []

    def recorded(*arguments: Any, **options: Any) -> Transfer:
        steps.append(all_to_all(*arguments, **options))
        return steps[-1]

    two_steps.all_to_all = recorded
    even = [[1] * 4] * 3
    rows = torch.tensor([[10.0 * dist.get_rank() + other] for other in range(4)])
    arrived = mover.out(rows, even).wait().flatten().tolist()
    there = traffic.take()
    assert steps[1].result.flatten().tolist() == arrived
    inside = steps[0].result.flatten().tolist()
    home = mover.back(torch.tensor(arrived).view(4, 1), even, 0).wait()
    assert home.equal(rows)
    return inside, arrived, [there.messages_between_nodes, traffic.take().messages_between_nodes]


def test_two_steps_by_hand() -> None:
    """SE-MoE's order of steps with 2 nodes of 2 ranks: rank r sends 10 r + destination."""
    found = run_ranks(4, worked_example)
    assert found[0][0] == [0, 2, 10, 12]
    assert [arrived for _, arrived, _ in found] == [[rank, 10 + rank, 20 + rank, 30 + rank] for rank in range(4)]
    assert all(messages == [1, 1] for _, _, messages in found)


def both_ways(uneven: bool) -> None:
    """Rows arrive, and come home, in one step as in two; counts of messages and bytes."""
    traffic = Traffic(per_node=2)
    flat, steps = movers(traffic)
    rank, generator = dist.get_rank(), torch.Generator().manual_seed(dist.get_rank())
    sent = torch.randint(0 if uneven else 3, 4, (4,), generator=generator)
    rows = torch.randn(int(sent.sum()), 5, generator=generator)
    learned = {mover: mover.learn(sent).tolist() for mover in (flat, steps)}
    assert learned[flat] == learned[steps][:2]
    counts, brought = {}, {}
    for mover in (flat, steps):
        traffic.take()
        arrived = mover.out(rows, learned[mover]).wait()
        home = mover.back(arrived, learned[mover], 1).wait()
        assert home.equal(torch.cat([rows, torch.zeros(1, 5)]))
        counts[mover], brought[mover] = traffic.take(), arrived
    assert brought[flat].equal(brought[steps])
    if not uneven:
        row, other = 5 * 4, [peer for peer in range(4) if peer // 2 != rank // 2]
        assert counts[flat].messages_between_nodes == 2 * len(other)
        assert counts[steps].messages_between_nodes == 2
        assert counts[flat].bytes_between_nodes == counts[steps].bytes_between_nodes == 2 * 2 * 3 * row
        # One message of its node-mate's rows, of twice the size, each way.
        assert counts[flat].bytes == 2 * 3 * 3 * row
        assert counts[steps].bytes == 2 * (2 + 2) * 3 * row
        assert counts[steps].messages == 2 * 2


@pytest.mark.parametrize("uneven", [False, True])
def test_two_steps_bring_what_one_brings(uneven: bool) -> None:
    run_ranks(4, both_ways, uneven)


def equal_bits(cases: list[Case]) -> None:
    for case in cases:
        slots = most_picked(case) if case.exchange == "padded" else None
        flat, flat_grads, _ = on_rank(case, slots)
        steps, steps_grads, _ = on_rank(dataclasses.replace(case, nodes=2), slots)
        for ours, theirs in zip([*steps, *steps_grads.values()], [*flat, *flat_grads.values()], strict=True):
            assert ours.equal(theirs), case


def test_two_steps_equal_one_bit_for_bit() -> None:
    """Forward and all gradients, even and uneven parts."""
    cases = [
        Case((5, 0, 9, 2), dtype=torch.float32),
        Case((4, 4, 4, 4), "some nothing", exchange="padded", dtype=torch.bfloat16),
    ]
    run_ranks(4, equal_bits, cases)


def sent_by(case: Case, slots: int | None = None) -> tuple[int, int]:
    """Bytes that a rank sent, forward and in all."""
    traffic = Traffic()
    dispatch, experts, _ = spread(dataclasses.replace(case, traffic=traffic))
    x, index, weight, grad = inputs(case, dist.get_rank())
    travel = dispatch.send(x.requires_grad_(), index, weight.requires_grad_(), slots=slots)
    y = travel.combine(experts(*travel.arrive()))
    forward = traffic.take().bytes
    y.backward(grad)
    return forward, forward + traffic.take().bytes


def test_only_pairs_of_token_and_rank_travel() -> None:
    """Bytes follow from the picks: rows, picks and the outputs' way back; the same again for gradients but indices."""
    case = Case((7, 5), "some nothing", dtype=torch.float32)
    pairs = []
    for rank in range(2):
        index_TK = inputs(case, rank)[1]
        there = (index_TK // 4 == 1 - rank).any(1)
        pairs.append(int(there.sum()))
    for rank, (forward, total) in enumerate(run_ranks(2, sent_by, case)):
        row, weights, count = 4 * D, 4 * K, 8
        own, others = pairs[rank], pairs[1 - rank]
        assert forward == count + own * (row + 2 * weights) + others * row
        assert total == forward + own * row + others * (row + weights)


def sent_under_autocast(case: Case) -> tuple[int, int]:
    with torch.autocast("cpu", torch.bfloat16):
        return sent_by(case)


def test_rows_travel_in_the_dtype_of_autocast() -> None:
    """Half the bytes of a row, there and back, and of their gradients."""
    case = Case((7, 5), "some nothing", dtype=torch.float32)
    for full, half in zip(run_ranks(2, sent_by, case), run_ranks(2, sent_under_autocast, case), strict=True):
        # What each of them sends besides: the count, and picks with their weights.
        saved = full[0] - half[0]
        assert saved > 0
        assert saved % (2 * D) == 0
        assert full[1] - half[1] == 2 * saved


def test_padding_bounds_what_travels() -> None:
    """Even blocks of min(T, N / P * slots) rows, whatever the picks; ranks agree on that number when it changes."""
    block = 4 * 1
    rows = 4 * D * 2 + 4 * 2 * K
    for forward, _ in run_ranks(2, sent_by, Case((9, 9), "nothing", exchange="padded", dtype=torch.float32), 1):
        assert forward == block * rows + 8


def uneven_blocks() -> None:
    case = Case((9, 5), exchange="padded")
    with pytest.raises(ConfigError, match=r"padded.*\[9, 5\] rows.*ragged"):
        on_rank(case, slots=9)
    # Few enough slots make blocks of the same size.
    on_rank(Case((9, 5), "nothing", exchange="padded"), slots=1)


def test_uneven_blocks_are_refused_on_all_ranks() -> None:
    run_ranks(2, uneven_blocks)


def test_nothing_travels_without_picks() -> None:
    for forward, total in run_ranks(2, sent_by, Case((9, 4), "nothing", dtype=torch.float32)):
        assert forward == total == 8


def alone_on_rank() -> None:
    traffic = Traffic()
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("all", "one"))
    group, everyone = mesh.get_group("one"), mesh.get_group("all")
    dispatch = ExpertParallel(8, group, esp_group=group, traffic=traffic)
    x, index, weight, _ = inputs(Case((4, 4)), 0)
    arrived = dispatch.send(x, index, weight).arrive()
    assert all(ours is theirs for ours, theirs in zip(arrived, (x, index, weight), strict=True))
    assert traffic.take().messages == 0
    with pytest.raises(ConfigError, match=r"parallel\.exchange = 'padded'.*moe\.capacity\.factor"):
        ExpertParallel(8, group, exchange="padded", capacity=CapacityConfig(factor=None, eval_factor=1.0))
    with pytest.raises(ConfigError, match=r"parallel\.ep = 2 does not divide num_experts \(7\)"):
        ExpertParallel(7, everyone)
    with pytest.raises(ConfigError, match="node_groups"):
        ExpertParallel(8, everyone, node_groups=(everyone, everyone))


def test_one_rank_sends_nothing_and_errors_name_fields() -> None:
    run_ranks(2, alone_on_rank)


def block_of(dispatch: ExpertParallel | None, experts: nn.Module | None, **changes: Any) -> MoEBlock:
    values = {
        "experts": {"num_experts": 8, "intermediate_size": F, "bias": True, "kernel": "loop"},
        "router": {"type": "top_k", "top_k": K},
        "shared_experts": {"num_experts": 1},
    }
    torch.manual_seed(1)
    block = MoEBlock(MoESpec.from_dict(values | changes), D, experts=experts).double()
    if dispatch is not None:
        block.dispatch = dispatch
    return block


def overlap() -> list[str]:
    """What happens in the two passes of a block, in order."""
    dispatch, experts, _ = spread(Case((6, 3)))
    block = block_of(dispatch, experts)
    events: list[str] = []
    waited, started = Transfer.wait, dist.all_to_all_single

    def wait(self: Transfer) -> Tensor:
        if self.result.dtype == torch.float64 and self.result.shape[1] == D:
            events.append("wait")
        return waited(self)

    def start(output: Tensor, *arguments: Any, **options: Any) -> Any:
        if output.dtype == torch.float64 and output.shape[1] == D:
            events.append("start")
        return started(output, *arguments, **options)

    Transfer.wait, dist.all_to_all_single = wait, start
    shared = block.shared_experts
    assert shared is not None
    shared.register_forward_hook(lambda *_: events.append("shared"))
    shared.register_full_backward_hook(lambda *_: events.append("shared"))
    x = inputs(Case((6, 3)), dist.get_rank())[0].requires_grad_()
    y = block(x)
    events.append("backward")
    y.sum().backward()
    return events


def test_shared_experts_run_while_tokens_travel() -> None:
    """Forward and backward, each of the two ways."""
    once = ["start", "shared", "wait", "start", "wait"]
    again = ["start", "wait", "start", "shared", "wait"]
    assert run_ranks(2, overlap) == [[*once, "backward", *again]] * 2


def modes() -> None:
    """Without a graph, under autocast and with recomputation: the numbers of plain float32."""
    case = Case((6, 3), "some nothing", dtype=torch.float32)
    x, index, weight, grad = inputs(case, dist.get_rank())
    dispatch, experts, _ = spread(case, kernel="auto")

    def run(x: Tensor, weight: Tensor) -> Tensor:
        travel = dispatch.send(x, index, weight)
        return travel.combine(experts(*travel.arrive()))

    def results(call: Any) -> list[Tensor]:
        ours = [values.clone().requires_grad_() for values in (x, weight)]
        for parameter in experts.parameters():
            parameter.grad = None
        y = call(*ours)
        y.backward(grad)
        grads = [tensor.grad for tensor in (*ours, *experts.parameters())]
        assert None not in grads
        return [y.detach(), *(getattr(value, "_local_tensor", value) for value in grads if value is not None)]

    plain = results(run)
    again = results(lambda *values: checkpoint(run, *values, use_reentrant=False))
    assert all(ours.equal(theirs) for ours, theirs in zip(again, plain, strict=True))
    with torch.no_grad():
        y = run(x, weight)
    assert not y.requires_grad
    assert y.equal(plain[0])
    with torch.autocast("cpu", torch.bfloat16):
        lower = results(run)
    for ours, theirs in zip(lower, plain, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * float(theirs.abs().max()))
    # Tokens that need no gradient, as below frozen layers, and weights that need none, as of hash routers.
    for x_needs, weight_needs in ((False, True), (True, False), (False, False)):
        values = x.clone().requires_grad_(x_needs), weight.clone().requires_grad_(weight_needs)
        run(*values).backward(grad)
        assert [value.grad is not None for value in values] == [x_needs, weight_needs]


def test_modes_of_torch() -> None:
    run_ranks(2, modes)


def capacity_block() -> None:
    """A block whose capacity limits sends padded parts in training, and computes what it does with all experts here."""
    changes = {"capacity": {"factor": 0.8, "minimum": 1, "policy": "probability"}}
    traffic = Traffic()
    case = Case((10, 10), exchange="padded", traffic=traffic)
    dispatch, experts, _ = spread(case)
    ours, alone = block_of(dispatch, experts, **changes), block_of(None, all_experts(case), **changes)
    x = inputs(case, dist.get_rank())[0]
    sent = {}
    ours(x)
    traffic.take()
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), alone.train(training)(x), rtol=1e-12, atol=1e-12)
        sent[training] = traffic.take()
    slots = CapacityConfig.from_dict(changes["capacity"]).most(1, 10, 8, K, training=True)
    assert slots == 3
    # Rows and their picks, and rows back; evaluation tells the other rank how many come.
    assert sent[True].bytes == 10 * (2 * 8 * D + 8 * 2 * K)
    assert sent[True].messages == 3
    assert sent[False].messages == 4


def test_capacity_of_a_block_decides_how_much_travels() -> None:
    run_ranks(2, capacity_block)
