from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.papers.tiny import EXPERIMENT as TINY

from moesaic.papers import EXPERIMENTS, Reproduction, arms_of, reproduce, write_page
from moesaic.papers.openmoe import in_weakest_layer
from moesaic.papers.openmoe_measure import ChangedLog, in_domain, permuted, repeated, trace_windows, uniform
from moesaic.trace import RoutingLog
from moesaic.train import load_model

EXPERIMENT = EXPERIMENTS["openmoe"]
QUARTERS = [f".q{quarter}" for quarter in range(1, 5)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Reproduction:
    return reproduce(EXPERIMENT, "test", tmp_path_factory.mktemp("openmoe"), seeds=(0,), jobs=1, progress=False)


@pytest.fixture(scope="module")
def base(found: Reproduction) -> dict[str, float]:
    return found.results[0]["base"].measurements


@pytest.fixture(scope="module")
def log(found: Reproduction) -> RoutingLog:
    model = load_model(found.output / "seed-0" / "base" / "checkpoints" / "step-00000012").eval()
    ids_BT = torch.arange(7 * 32).view(7, 32) % 50
    return trace_windows(model, {"code": ids_BT[:4], "documentation": ids_BT[4:]})[0]


def test_both_layers_are_measured_and_averaged(base: dict[str, float]):
    for name in ("token_s", "position_nmi", "max_violation", "drop.in_domain", "drop.chat.q4", "start_token_nmi"):
        assert base[name] == pytest.approx((base[f"{name}.L0"] + base[f"{name}.L1"]) / 2, abs=2e-6), name


def test_specialisation_has_its_noise_floor(base: dict[str, float]):
    for layer in ("L0", "L1"):
        assert base[f"token_s.{layer}"] > base[f"token_floor.{layer}"] > 0
        assert base[f"token_nmi.{layer}"] > base[f"token_nmi_permuted.{layer}"] > 0
        assert base[f"position_groups.{layer}"] == 32


def test_saturation_ends_at_one(found: Reproduction, base: dict[str, float]):
    series = found.results[0]["base"].series
    assert series["steps"] == [0, 3, 6, 12]
    for name in ("saturation", "saturation_corrected", "saturation_first", "cosine"):
        curve = series[f"{name}.L1"]
        assert curve[-1] == pytest.approx(1)
        assert len(curve) == 4
        assert curve[0] < 1
    assert series["jensen_shannon.L0"][-1] == pytest.approx(0, abs=1e-6)
    assert base["saturation.half.L0"] == series["saturation.L0"][2]
    assert not any(name.startswith("saturation") for name in found.results[0]["chat_early"].measurements)


def test_the_order_of_filling_moves_drops_but_not_their_number(base: dict[str, float]):
    for text in ("drop.code", "drop.chat", "drop_permuted", "drop_uniform"):
        assert base[f"tight_{text}"] == pytest.approx(base[f"tight_token_first_{text}"], abs=2e-6)
        assert base[f"tight_{text}"] >= base[text]
    assert base["tight_drop.numbers"] > 0
    for text in ("drop.code", "drop_permuted"):
        quarters = [base[f"tight_{text}{quarter}"] for quarter in QUARTERS]
        assert sum(quarters) / 4 == pytest.approx(base[f"tight_{text}"], abs=1e-5)
    # Of 32 tokens, an expert takes 16 at a factor of 1: nobody of the first quarter finds it full token by token.
    assert base["tight_token_first_drop.code.q1"] == 0 < base["tight_token_first_drop.code.q4"]


def test_coactivation_rows_sum_to_one_less_than_k(found: Reproduction, base: dict[str, float]):
    assert base["coactivation_row_error"] == pytest.approx(0)
    matrix = np.array(found.results[0]["base"].series["coactivation_matrix.L0"]).reshape(4, 4)
    assert matrix.sum(1) == pytest.approx(1, abs=1e-3)
    for domain in ("code", "documentation", "chat", "numbers"):
        assert sum(found.results[0]["base"].series[f"domain_{domain}.L1"]) == pytest.approx(2, abs=1e-3)


def test_the_page_has_all_findings(found: Reproduction, tmp_path: Path):
    pytest.importorskip("matplotlib")
    text = write_page(found, tmp_path).read_text(encoding="utf-8")
    json = (tmp_path / "openmoe-test.json").read_text(encoding="utf-8")
    assert re.search(r'"steps": \[ ?0\.0, 3\.0, 6\.0, 12\.0 ?\]', json)  # a list on one line
    for section in EXPERIMENT.sections:
        assert f"## {section.title}\n" in text
    figures = re.findall(r"\]\((openmoe-test[\w-]*\.svg)\)", text)
    assert len(figures) == 5
    assert all((tmp_path / figure).read_bytes().startswith(b"<?xml") for figure in figures)
    assert "| L1 | before training | token |" in text
    assert "chat_late" not in "".join(judgement.claim.name for judgement in found.judgements())
    assert re.search(r"\| Token ids are specialised far above noise \| [+-][\d.e-]+ \| [01] of 1 \|", text)
    assert "nan" not in text
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))


def test_permuting_keeps_the_picks_of_each_document(log: RoutingLog):
    for rows, changed in zip(log.rows(), ChangedLog(log, permuted).rows(), strict=True):
        assert not torch.equal(rows.choice_TK, changed.choice_TK)
        for document in rows.tokens.document_T.unique():
            mine_T = rows.tokens.document_T == document
            before, after = (Counter(map(tuple, side.choice_TK[mine_T].tolist())) for side in (rows, changed))
            assert before == after


def test_uniform_picks_differ_and_are_even(log: RoutingLog):
    picks = torch.cat([rows.choice_TK for rows in ChangedLog(log, uniform).rows()])
    assert (picks[:, 0] != picks[:, 1]).all()
    assert picks.flatten().bincount(minlength=4) / len(picks) == pytest.approx(0.5, abs=0.1)


def test_repetition_is_the_share_of_the_commonest_ids():
    ids_BT = torch.tensor([[7, 7, 7, 1, 2, 1, 3, 4], [5, 5, 5, 5, 5, 5, 5, 5]])
    assert repeated(ids_BT, 2) == pytest.approx((5 / 8 + 1) / 2 * 100)
    assert repeated(ids_BT) == pytest.approx((7 / 8 + 1) / 2 * 100)


def test_the_weakest_layer_decides():
    numbers = {"token_s.L1": 3.0, "token_s.L3": 2.0, "token_floor.L1": 2.5, "token_floor.L3": 0.5, "token_s": 2.5}
    assert in_weakest_layer(lambda of: of("token_s") - of("token_floor"))({"base": numbers}) == 0.5


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_controls_see_as_much_chat_late(size: str):
    arms = {name: arm.run(0) for name, arm in arms_of(EXPERIMENT, size).items()}
    for early, late in (("chat_early", "chat_late"), ("chat_early_long", "chat_late_long")):
        if late not in arms:
            continue
        mixtures = (arms[early].data.mixture, arms[late].data.mixture)
        assert None not in mixtures
        (first, rest), (begin, last) = (tuple(mixture or ()) for mixture in mixtures)
        assert first.until is not None
        assert begin.until is not None
        assert first.until == arms[late].train.steps - begin.until
        assert first.shares == last.shares
        assert rest.shares == begin.shares
        assert first.shares["chat"] == pytest.approx(0.3 * sum(first.shares.values()))
    assert "chat" not in in_domain(arms["base"])
    assert set(in_domain(arms["base"])) == set(in_domain(arms["chat_early"]))


def test_only_the_scope_of_the_balance_loss_differs():
    base, other = (arms_of(EXPERIMENT, "cpu")[name].run(0).to_dict() for name in ("base", "per_sequence"))
    assert [loss.pop("scope", None) for loss in (base["moe"]["balance"][0], other["moe"]["balance"][0])] == [
        "batch",
        "sequence",
    ]
    assert base == other


def test_experiments_without_sections_have_none_of_it(finished: Reproduction, tmp_path: Path):
    assert TINY.sections == ()
    result: Any = finished.results[0]["moe"]
    assert result.series == {}
    write_page(finished, tmp_path)
    assert len(list(tmp_path.glob("*.svg"))) <= 1
