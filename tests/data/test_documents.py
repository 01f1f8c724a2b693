from moesaic.data.documents import Document, capped


def documents(*texts: str) -> list[Document]:
    return [Document(text, "text", str(number)) for number, text in enumerate(texts)]


def test_blank_documents_are_left_out_and_not_counted():
    taken = list(capped(documents("a", " \n", "b", "c"), max_documents=2))
    assert [document.text for document in taken] == ["a", "b"]


def test_the_document_that_reaches_the_bytes_is_the_last():
    taken = list(capped(documents("äö", "c", "d"), max_bytes=5))
    assert [document.text for document in taken] == ["äö", "c"]


def test_no_more_is_read_than_needed():
    iterator = iter(documents("a", "b", "c"))
    assert len(list(capped(iterator, max_documents=1))) == 1
    assert next(iterator).text == "b"
