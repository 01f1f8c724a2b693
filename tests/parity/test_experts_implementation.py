"""`experts_implementation="moesaic"` on stock models equals their own eager experts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.parity.stock_models import FAMILIES, stock_model, token_ids
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import moesaic  # noqa: F401  registers the implementation


@pytest.mark.parametrize("model_type", FAMILIES)
def test_stock_model_computes_the_same_with_our_kernels(model_type: str) -> None:
    results = {}
    ids = token_ids()
    model = stock_model(model_type)
    for name in ("eager", "moesaic"):
        model.set_experts_implementation(name)
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        results[name] = (output.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()})
    (logits, gradients), (our_logits, our_gradients) = results.values()
    torch.testing.assert_close(our_logits, logits, atol=1e-5, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, atol=1e-5, rtol=0)


def test_experts_without_gate() -> None:
    config = SimpleNamespace(
        n_routed_experts=6, hidden_size=16, moe_intermediate_size=24, moe_latent_size=8, mlp_hidden_act="relu2"
    )
    experts = NemotronHExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    x_TD = torch.randn(10, 8, generator=generator, requires_grad=True)
    weight_TK = torch.rand(10, 2, generator=generator, requires_grad=True)
    index_TK = torch.rand(10, 6, generator=generator).topk(2).indices
    inputs = (x_TD, weight_TK, *experts.parameters())
    results = []
    for name in ("eager", "moesaic"):
        config._experts_implementation = name
        y_TD = experts(x_TD, index_TK, weight_TK)
        results.append((y_TD, *torch.autograd.grad(y_TD.square().sum(), inputs)))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
