"""An override is gone after its block, however that ends, and threads do not see each other's."""

from __future__ import annotations

import copy
import threading
from collections.abc import Generator
from typing import Any

import pytest
import torch
from tests.infer.decode.overrides.test_models import greedy, hooks, ids, model_of
from torch import Tensor
from transformers import PreTrainedModel

import moesaic
from moesaic.errors import UnsupportedOverride
from moesaic.infer.decode.overrides import RoutingSwitch

BOTH = pytest.mark.parametrize("name", ["ours", "mixtral"])


def streamed(model: Any, override: str) -> Generator[Tensor, None, None]:
    with moesaic.override_routing(model, override):
        while True:
            with torch.no_grad():  # not around the yield, where it would reach the caller
                found = model(ids()).logits
            yield found


def logits(model: Any, *overrides: str) -> Tensor:
    with torch.no_grad():
        if not overrides:
            return model(ids()).logits
        with moesaic.override_routing(model, overrides):
            return model(ids()).logits


def in_threads(*works: Any) -> list[Any]:
    found: list[Any] = [None] * len(works)

    def run(place: int) -> None:
        try:
            found[place] = works[place]()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@BOTH
def test_restored_after_success_and_errors(name: str) -> None:
    model = model_of(name)
    before, count = logits(model), hooks(model)
    assert not torch.equal(logits(model, "rank=2"), before)
    with pytest.raises(ValueError, match="mine"), moesaic.override_routing(model, "rank=2"):
        raise ValueError("mine")
    override = "k=2+without=" + ("0,1,2,3,4" if name == "ours" else "0,1,2,3,4,5,6")
    with moesaic.override_routing(model, override), pytest.raises(UnsupportedOverride, match="has only 1 experts"):
        model(ids())
    assert torch.equal(logits(model), before)
    assert hooks(model) == count


@BOTH
def test_restored_when_generators_are_closed_or_forgotten_in_any_order(name: str) -> None:
    model = model_of(name)
    before, count = logits(model), hooks(model)
    first, second = streamed(model, "rank=2"), streamed(model, "k=1")
    next(first)
    next(second)
    first.close()
    only_second = next(second)
    torch.testing.assert_close(only_second, logits(model, "k=1"))
    del second
    assert torch.equal(logits(model), before)
    assert hooks(model) == count


@BOTH
def test_two_threads_on_one_model_follow_their_own(name: str) -> None:
    model = model_of(name)
    overrides = ("rank=2", "k=1", "k=3")
    expected = [logits(model, override) for override in overrides]
    plain = logits(model)
    together = threading.Barrier(4)

    def work(override: str) -> list[Tensor]:
        with torch.no_grad(), moesaic.override_routing(model, override if override else ()):
            together.wait()
            found = [model(ids()).logits for _ in range(25)]
            together.wait()
            return found

    found = in_threads(*(lambda override=override: work(override) for override in (*overrides, "")))
    for ours, wanted in zip(found, [*expected, plain], strict=True):
        assert all(torch.equal(one, wanted) for one in ours)
    assert torch.equal(logits(model), plain)


def test_two_threads_on_two_models() -> None:
    one, other = model_of("ours"), model_of("mixtral")
    expected = [logits(one, "rank=2"), logits(other, "k=1")]
    found = in_threads(
        lambda: [logits(one, "rank=2") for _ in range(10)], lambda: [logits(other, "k=1") for _ in range(10)]
    )
    for ours, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(one, wanted) for one in ours)


@BOTH
def test_a_thread_without_an_override_follows_the_only_other(name: str) -> None:
    model = model_of(name)
    with moesaic.override_routing(model, "rank=2"):
        expected = greedy(model, ids())
        (found,) = in_threads(lambda: greedy(model, ids()))  # as a streamer has it
        assert torch.equal(found, expected)
        entered, done = threading.Event(), threading.Event()

        def other() -> None:
            with moesaic.override_routing(model, "k=1"):
                entered.set()
                done.wait()

        holder = threading.Thread(target=other)
        holder.start()
        entered.wait()
        (error,) = in_threads(lambda: logits(model))
        done.set()
        holder.join()
        assert isinstance(error, UnsupportedOverride)
        assert "several threads" in str(error)


def test_models_can_be_copied() -> None:
    model = model_of("ours")
    model(ids())
    expected = logits(model, "rank=2")
    other: PreTrainedModel = copy.deepcopy(model)
    assert torch.equal(logits(other, "rank=2"), expected)


@pytest.mark.parametrize("where", ["model", "decoder layer", "block", "router"])
def test_an_override_of_another_thread_ends_in_the_middle_of_a_pass(where: str) -> None:
    """torch then calls its hooks once more, without keywords."""
    model = model_of("mixtral")
    expected = logits(model)
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with RoutingSwitch(model).entered():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)

    def end(*given: Any) -> None:
        leave.set()
        thread.join()

    layer = model.model.layers[0]
    first = layer.mlp.gate.register_forward_hook(end) if where == "router" else None  # before those of the override
    thread.start()
    assert entered.wait(10)
    if where != "router":
        module = {"model": model.model, "decoder layer": layer, "block": layer.mlp}[where]
        first = module.register_forward_pre_hook(end, prepend=True)
    try:
        assert torch.equal(logits(model), expected)
    finally:
        end()
        assert first is not None
        first.remove()
