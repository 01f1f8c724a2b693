from hypothesis import given
from hypothesis import strategies as st

from moesaic.data import Document
from moesaic.data.split import is_validation


def held_out(texts: list[str], fraction: float) -> set[str]:
    return {text for text in texts if is_validation(Document(text, "text", ""), fraction)}


@given(st.lists(st.text(), max_size=30), st.lists(st.text(), max_size=30), st.floats(0.05, 0.95))
def test_adding_documents_moves_none(texts: list[str], added: list[str], fraction: float):
    assert held_out(texts + added, fraction) & set(texts) == held_out(texts, fraction)


@given(st.lists(st.text(), max_size=30), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_keeps_what_was_held_out(texts: list[str], one: float, other: float):
    smaller, larger = sorted((one, other))
    assert held_out(texts, smaller) <= held_out(texts, larger)


def test_side_depends_on_text_alone():
    assert is_validation(Document("same", "a", "x:1"), 0.5) == is_validation(Document("same", "b", "y:2"), 0.5)


def test_documents_made_of_one_file_stay_together():
    parts = [Document(str(number), "chat", "file.py", split_by="the file") for number in range(50)]
    assert len({is_validation(part, 0.5) for part in parts}) == 1
    assert is_validation(parts[0], 0.5) == is_validation(Document("the file", "code", "file.py"), 0.5)


def test_fraction_is_met():
    texts = [f"document {n}" for n in range(20_000)]
    assert abs(len(held_out(texts, 0.1)) / len(texts) - 0.1) < 0.01
