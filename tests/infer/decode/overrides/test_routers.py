"""Every router honours a part or refuses it by name before anything runs."""

from __future__ import annotations

import pytest
import torch
from tests.hf.router_models import extras, inputs, router_model
from tests.layer.router_rows import ROUTERS

import moesaic
from moesaic.errors import UnsupportedOverride

NO_PICKS = tuple(name for name in ROUTERS if name.startswith(("merged", "segment_", "mixture_of", "soft_slots")))
UNRANKED = ("hash", "task_fixed", "task_split", "random", "prototyped", "dselect_k", "stable")
RANKING = ("k=4", "rank=2", "without=3", "dynamic=0.4")
OTHERS = ("random=2", "experts=1,6", "null=0.4")
WEIGHING = ("scale=2", "total=1", "temperature=0.5")


def why_not(name: str, override: str) -> str | None:
    """What the refusal says; None where there is to be none."""
    if name in NO_PICKS:
        return "mixes tokens or merges experts"
    if override in RANKING and name.startswith(UNRANKED):
        return "can't act in layer 0: "
    if override not in WEIGHING and name == "random_skip":
        return "can't say the weights"
    if override.startswith("experts") and name.startswith("modality"):
        return "other modalities"
    return None


@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_honoured_or_refused(name: str) -> None:
    model = router_model(name).eval()
    given = inputs()
    given |= extras(model, given["input_ids"])
    before = model(**given, output_routing=True)
    servable = model.config.spec.unservable is None
    for override in (*RANKING, *OTHERS, *WEIGHING):
        refusal = why_not(name, override)
        if override == "k=4" and name == "modality":
            with (
                moesaic.override_routing(model, override),
                pytest.raises(UnsupportedOverride, match="has only 3 experts"),
            ):
                model(**given)
            continue
        if refusal is not None:
            with pytest.raises(UnsupportedOverride, match=refusal), moesaic.override_routing(model, override):
                raise AssertionError("nothing runs")
            continue
        with moesaic.override_routing(model, override):
            found = model(**given, output_routing=True)
            again = model(**given)
        assert found.logits.isfinite().all(), override
        assert torch.equal(found.logits, again.logits)
        for layer, routing in found.routing.records.items():
            plain = before.routing.records[layer]
            assert ((routing.index_TK >= 0) & (routing.index_TK <= routing.num_experts)).all()
            assert not routing.weight_TK[routing.index_TK == routing.num_experts].any()
            real_TK = routing.choice_TK < routing.num_columns
            if override == "without=3":
                assert not (routing.choice_TK == 3).any()
                all_picked = (plain.choice_TK < plain.num_columns).sum(-1).max() == plain.num_columns
                assert (
                    layer > 0
                    or all_picked
                    or torch.equal(real_TK.sum(-1), (plain.choice_TK < plain.num_columns).sum(-1))
                )
            elif override == "k=4":
                assert (real_TK.sum(-1) == 4).all()
            elif override in ("rank=2", "random=2", "experts=1,6"):
                assert (real_TK.sum(-1) == (1 if override == "rank=2" else 2)).all()
                ordered = [sorted(row) for row in routing.choice_TK.tolist()]
                assert all(len(set(row)) == len(row) for row in ordered)
            elif override == "dynamic=0.4":
                assert (real_TK.sum(-1) >= 1).all()
            elif override == "scale=2" and layer == 0:
                torch.testing.assert_close(routing.weight_TK, 2 * plain.weight_TK)
        if servable and override == "rank=2":
            with moesaic.override_routing(model, rows=[override, None]):
                options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
                cached, whole = (model.generate(**given, **options, use_cache=cache) for cache in (True, False))
            assert torch.equal(cached, whole)
    assert torch.equal(model(**given).logits, before.logits)
