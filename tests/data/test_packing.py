import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.builders import numbered_documents, store_of
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from moesaic.data import IGNORED_LABEL, PackedSequences
from moesaic.errors import DataError

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@settings(max_examples=60)
@given(lengths, st.integers(2, 8))
def test_every_token_is_in_exactly_one_sequence(lengths: list[int], sequence_length: int):
    store = store_of(numbered_documents(lengths))
    kept = PackedSequences(store, sequence_length, keep_partial=True, fill_id=999)
    batch = kept.batch(range(len(kept)))
    filled = batch["document_ids"] >= 0
    assert batch["input_ids"][filled].tolist() == list(range(sum(lengths)))
    assert torch.equal(batch["labels"], batch["input_ids"].where(filled, IGNORED_LABEL))
    assert (batch["input_ids"][~filled] == 999).all()

    training = PackedSequences(store, sequence_length)
    full = sum(lengths) // sequence_length * sequence_length
    assert len(training) == full // sequence_length
    if full:
        assert training.batch(range(len(training)))["input_ids"].flatten().tolist() == list(range(full))


@settings(max_examples=60)
@given(lengths, st.integers(2, 8))
def test_boundaries_are_known(lengths: list[int], sequence_length: int):
    store = store_of(numbered_documents(lengths), [number % 3 for number in range(len(lengths))])
    sequences = PackedSequences(store, sequence_length, keep_partial=True, isolate_documents=True)
    batch = sequences.batch(range(len(sequences)))
    owner = np.repeat(np.arange(len(lengths)), lengths).tolist()
    filled = batch["document_ids"] >= 0
    assert batch["document_ids"][filled].tolist() == owner
    assert batch["domain_ids"][filled].tolist() == [document % 3 for document in owner]
    assert (batch["domain_ids"][~filled] == -1).all()

    first = set(np.cumsum([0, *lengths[:-1]]).tolist())
    predicted = set(batch["input_ids"][batch["labels"] != IGNORED_LABEL].tolist())
    assert predicted == set(range(sum(lengths))) - first, "all but the first token of each document"
    assert "position_ids" in batch
    for documents, positions in zip(batch["document_ids"], batch["position_ids"], strict=True):
        counted = [documents[:t].eq(documents[t]).sum().item() for t in range(sequence_length)]
        assert positions.tolist() == counted


def test_token_counts_are_those_of_the_documents_taken():
    store = store_of([[1, 1, 9], [2, 9], [3, 3, 3, 9]], [0, 1, 0])
    assert PackedSequences(store, 4).token_counts(11).tolist() == [0, 2, 1, 3, 0, 0, 0, 0, 0, 3, 0]
    one = PackedSequences(store, 4, documents=store.documents_of(0))
    assert one.token_counts(10).tolist() == [0, 2, 0, 3, 0, 0, 0, 0, 0, 2]
    with pytest.raises(DataError, match=r"vocabulary_size = 9 is too small: index 9 is out of bounds"):
        one.token_counts(9)


def test_documents_of_one_domain():
    store = store_of([[1, 1, 9], [2, 9], [3, 3, 3, 9]], [0, 1, 0])
    sequences = PackedSequences(store, 4, documents=store.documents_of(0), keep_partial=True, fill_id=7)
    batch = sequences.batch([0, 1])
    assert batch["input_ids"].tolist() == [[1, 1, 9, 3], [3, 3, 9, 7]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 2], [2, 2, 2, -1]]
    assert sequences.num_tokens == 7


def test_serves_as_a_torch_dataset():
    sequences = PackedSequences(store_of(numbered_documents([5, 4, 7])), 4, isolate_documents=True)
    [batch] = DataLoader(sequences, batch_size=4)
    direct = sequences.batch(range(4))
    assert batch.keys() == direct.keys()
    assert all(torch.equal(batch[name], direct[name]) for name in direct)
    assert torch.equal(sequences[-1]["input_ids"], sequences[3]["input_ids"])
    with pytest.raises(IndexError):
        sequences[4]


def llama(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    return model


DOCUMENTS = [[3, 4, 5, 6, 0], [7, 0], [8, 9, 10, 0], [0], [11, 12, 13, 14, 15, 0], [16, 17, 18, 0, 0]]


@pytest.mark.parametrize("attention", ["sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_isolated_documents_get_the_logits_they_get_alone(attention: str):
    model = llama(attention)
    sequences = PackedSequences(store_of(DOCUMENTS), 12, isolate_documents=True, keep_partial=True)
    batch = sequences.batch([0, 1])
    assert "position_ids" in batch
    with torch.no_grad():
        packed = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for row in range(2):
            for document in batch["document_ids"][row].unique():
                inside = batch["document_ids"][row] == document
                alone = model(batch["input_ids"][row][inside][None], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row][inside], alone, rtol=1e-4, atol=1e-5)


def test_isolation_needs_the_cache_off():
    """The limit that docs/data.md states: with a cache, transformers does not look for packed documents."""
    model = llama("sdpa")
    batch = PackedSequences(store_of(DOCUMENTS), 12, isolate_documents=True).batch([0])
    assert "position_ids" in batch
    with torch.no_grad():
        isolated = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        leaking = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=True).logits
    assert (isolated - leaking).abs().max() > 1e-3


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=12), st.integers(2, 8))
def test_domains_as_tasks_cut_each_domain_by_itself(documents: list[tuple[int, int]], sequence_length: int):
    lengths, domains = map(list, zip(*documents, strict=True))
    tokens = numbered_documents(lengths)
    sequences = PackedSequences(store_of(tokens, domains), sequence_length, domains_are="task")
    expected: list[tuple[int, list[int]]] = []
    for domain in sorted(set(domains)):
        stream = [token for each, owner in zip(tokens, domains, strict=True) if owner == domain for token in each]
        whole = len(stream) // sequence_length
        expected += [(domain, stream[n * sequence_length : (n + 1) * sequence_length]) for n in range(whole)]
    assert len(sequences) == len(expected)
    if expected:
        batch = sequences.batch(range(len(sequences)))
        assert batch["input_ids"].tolist() == [tokens for _, tokens in expected]
        assert "task_ids" in batch
        assert batch["task_ids"].tolist() == [domain for domain, _ in expected]
        assert (batch["domain_ids"] == batch["task_ids"].unsqueeze(-1)).all()
        collated = next(iter(DataLoader(sequences, batch_size=len(sequences))))
        assert torch.equal(collated["task_ids"], batch["task_ids"])


def test_the_last_sequence_of_a_task_is_kept_in_evaluation():
    store = store_of([[1, 2, 3], [4, 5, 6, 7, 8]], [0, 1])
    kept = PackedSequences(
        store, 3, documents=store.documents_of(1), keep_partial=True, fill_id=99, domains_are="task"
    ).batch([0, 1])
    assert kept["input_ids"].tolist() == [[4, 5, 6], [7, 8, 99]]
    assert "task_ids" in kept
    assert kept["task_ids"].tolist() == [1, 1]


def test_domains_as_modalities_are_those_of_each_token():
    sequences = PackedSequences(store_of([[1, 2, 3], [4, 5]], [0, 2]), 4, keep_partial=True, domains_are="modality")
    batch = sequences.batch([0, 1])
    assert "modality_ids" in batch
    assert batch["modality_ids"].tolist() == [[0, 0, 0, 2], [2, 2, 2, 2]]  # padding as the token before
    assert batch["domain_ids"].tolist() == [[0, 0, 0, 2], [2, -1, -1, -1]]
    assert "task_ids" not in batch
