"""A model folder without a tokenizer: ids in, ids out, and a text is refused for what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from bare_model import bare_model

from holdfast import LLM, SamplingParams
from holdfast.api.ids import IdTokenizer, load_tokenizer
from holdfast.errors import InvalidField, ModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return bare_model(tmp_path)


def test_a_folder_without_tokenizer_is_refused_unless_ids_will_do(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_tokenizer(folder, vocab_size=300, ids_will_do=False)
    made = load_tokenizer(folder, vocab_size=300, ids_will_do=True)
    assert isinstance(made, IdTokenizer)
    assert made.end_ids == (7,)


def test_every_id_shows_as_its_number_so_that_each_token_is_an_event() -> None:
    made = IdTokenizer(vocab_size=300)
    detokenizer = made.detokenizer([1, 2])
    pieces = [detokenizer.push(token) for token in (5, 299, 0)]
    assert pieces == [" 5", " 299", " 0"]
    assert made.decode([5, 299, 0]) == "".join(pieces)
    assert made.show(299) == (" 299", b" 299")


def test_a_text_is_refused_by_its_field_and_ids_are_answered(folder: Path) -> None:
    with LLM(folder, load="dummy", rows_max=2, pages=40, threads=1) as llm:
        with pytest.raises(InvalidField, match="token ids, not text") as caught:
            llm.generate("Hello")
        assert caught.value.field == "prompts.0"
        assert caught.value.code == "no_tokenizer"
        params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        (answer,) = llm.generate([[1, 2, 3]], params)
    assert answer.text == "".join(f" {token}" for token in answer.token_ids)
    assert len(answer.token_ids) == 4
