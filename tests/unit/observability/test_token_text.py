from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_rlsd.observability.samples import MAX_PENDING, token_texts


def by_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def like_sentencepiece(ids: list[int]) -> str:
    """Drops the blank before the first word; id 0 is a special token without text."""
    return "".join([" word"] * sum(i > 0 for i in ids)).removeprefix(" ")


@given(st.text())
def test_the_pieces_joined_are_the_text(text: str) -> None:
    ids = list(text.encode())
    pieces = token_texts(by_bytes, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    assert token_texts(by_bytes, list("aü€".encode())) == ["a", "", "ü", "", "", "€"]


@given(st.binary(max_size=60))
def test_bytes_that_are_no_text_still_give_a_piece_for_every_token(raw: bytes) -> None:
    assert len(token_texts(by_bytes, list(raw))) == len(raw)


def test_blanks_between_words_stay_and_special_tokens_have_no_text() -> None:
    assert token_texts(like_sentencepiece, [1, 1, 0, 1]) == ["word", " word", "", " word"]
    assert token_texts(like_sentencepiece, []) == []


def test_garbage_does_not_make_the_work_quadratic() -> None:
    decoded = 0

    def counting(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return by_bytes(ids)

    token_texts(counting, [0xFF] * 4000)
    assert decoded <= 4000 * 4 * MAX_PENDING


def test_an_unfinished_end_is_shown() -> None:
    assert token_texts(by_bytes, [97, 0xE2]) == ["a", "\ufffd"]
