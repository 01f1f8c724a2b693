"""Changing what a trained model's routers and shared experts do, for the length of a `with` block, weights untouched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.errors import UnsupportedModel
from moesaic.hf import MoesaicForCausalLM
from moesaic.layer import MoEBlock, Routing
from moesaic.layer.routers.scores import top_k

Reroute = Callable[[Routing], Routing]


@contextlib.contextmanager
def rerouted(model: PreTrainedModel, reroute: Reroute) -> Iterator[None]:
    """Inside the block, every router of `model` gives `reroute` of its routing.

    Raises:
        UnsupportedModel: if `model` has no MoE layers of ours.
    """
    with _hooks(model, lambda block: block.gate, reroute):
        yield


@contextlib.contextmanager
def without_shared_experts(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, the shared experts of `model` add nothing.

    Raises:
        UnsupportedModel: if `model` has no MoE layers of ours.
    """
    with _hooks(model, lambda block: block.shared_experts, torch.zeros_like):
        yield


def more_picks(extra: int) -> Reroute:
    """Each token picks `extra` more experts, its next best; every pick is weighted with its score."""

    def reroute(routing: Routing) -> Routing:
        return _picked(routing, routing.selection_TN, routing.top_k + extra)

    return reroute


def without_best(number: int) -> Reroute:
    """Each token loses its `number` best experts and picks the best K of the others, weighted with their scores.

    That is the test of DeepSeekMoE (arXiv 2401.06066, figure 4).
    """

    def reroute(routing: Routing) -> Routing:
        selection_TN = routing.selection_TN
        if number:
            best_TR = top_k(selection_TN, number, stable=True)
            selection_TN = selection_TN.scatter(-1, best_TR, float("-inf"))
        return _picked(routing, selection_TN, routing.top_k)

    return reroute


def _picked(routing: Routing, selection_TN: Tensor, picks: int) -> Routing:
    """Top-k by `selection_TN`, weights as in routers that do not normalise them."""
    index_TK = top_k(selection_TN, picks, stable=True)
    return replace(routing, index_TK=index_TK, weight_TK=routing.scores_TN.gather(-1, index_TK))


@contextlib.contextmanager
def _hooks(
    model: PreTrainedModel,
    part: Callable[[MoEBlock], nn.Module | None],
    change: Callable[[Any], Any],
) -> Iterator[None]:
    if not isinstance(model, MoesaicForCausalLM):
        raise UnsupportedModel(
            f"{type(model).__name__} has no MoE layers of moesaic, so there is nothing to change in them"
        )
    with contextlib.ExitStack() as stack:
        for block in model.moe_blocks().values():
            module = part(block)
            if module is not None:
                hook = module.register_forward_hook(lambda module, inputs, output: change(output))
                stack.callback(hook.remove)
        yield
