"""The fast tokenizer gives the ids of the sentencepiece model that it was made of."""

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer

from fuyu_e2e.data.tokenizer import BOS, EOS, NEWLINE, PATCH, Tokenizer, train_tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.export.tokenizer_json import fast_tokenizer, read_fast_tokenizer

TEXT = ["banana ananas xyxyxyx aaaa aaaaaa the then there  is\t2024 3.5", "größer déjà 日本語 日本 ▁ \u0301"] * 5
SPECIAL = ("<unk>", BOS, EOS, PATCH, NEWLINE, "<0x0")


@pytest.fixture(scope="module", params=[300, 330, 400], ids="{} tokens".format)
def pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, FastTokenizer]:
    """A tokenizer, and its fast form as it is read back from its file; the largest has tokens that are never used."""
    tokenizer = train_tokenizer(TEXT, request.param)
    return tokenizer, FastTokenizer.from_str(fast_tokenizer(tokenizer).to_str())


letters = st.text(alphabet="aabnxyt  \n\t▁é日ß0123,.\x00\x04|<>", max_size=60)
words = st.lists(st.sampled_from(["an", "ana", "ban", "xy", "x", "aaa", " the", "▁", "  ", "日本", "<"]), max_size=12)


@given(text=letters | st.text(max_size=40) | words.map("".join))
def test_every_text_has_the_same_ids_and_comes_back(pair: tuple[Tokenizer, FastTokenizer], text: str) -> None:
    tokenizer, fast = pair
    if any(token in text for token in SPECIAL):
        return
    ids = tokenizer.encode(text)
    assert fast.encode(text, add_special_tokens=False).ids == ids
    assert fast.decode(ids, skip_special_tokens=False) == text
    assert fast.encode(text).ids == [tokenizer.bos_id, *ids]


@given(rows=st.integers(1, 5), cols=st.integers(1, 9))
def test_a_grid_of_placeholders_has_one_token_before_it_for_the_stock_processor_to_take_off(
    pair: tuple[Tokenizer, FastTokenizer], rows: int, cols: int
) -> None:
    tokenizer, fast = pair
    grid = ([tokenizer.patch_id] * cols + [tokenizer.newline_id]) * rows
    ids = fast.encode((PATCH * cols + NEWLINE) * rows + BOS, add_special_tokens=False).ids
    assert ids[1:] == [*grid, tokenizer.bos_id]


def test_special_tokens_are_read_where_they_are_spelled_out(pair: tuple[Tokenizer, FastTokenizer]) -> None:
    tokenizer, fast = pair
    text = f"a{PATCH}b{NEWLINE}<0x04>c{EOS}"
    a, b, c = (tokenizer.encode(letter) for letter in "abc")
    special = tokenizer.patch_id, tokenizer.newline_id, tokenizer.answer_id, tokenizer.eos_id
    assert fast.encode(text, add_special_tokens=False).ids == [
        *a, special[0], *b, special[1], special[2], *c, special[3],
    ]  # fmt: skip
    assert fast.decode(fast.encode(text).ids) == "abc"
    assert fast.get_vocab_size() == tokenizer.vocab_size


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        model_type="unigram",
        vocab_size=310,
        hard_vocab_limit=False,
        byte_fallback=True,
        control_symbols=[PATCH, NEWLINE],
        minloglevel=3,
    )
    with pytest.raises(UserError, match=r"only of byte-pair models.*--tokenizer-json"):
        fast_tokenizer(Tokenizer(model.getvalue()))


def test_a_fast_tokenizer_from_elsewhere_must_know_the_special_tokens_by_the_same_ids(
    pair: tuple[Tokenizer, FastTokenizer], tmp_path: Path
) -> None:
    own, fast = pair
    fast.save(str(tmp_path / "tokenizer.json"))
    assert read_fast_tokenizer(tmp_path / "tokenizer.json", own).get_vocab() == fast.get_vocab()
    changed = fast.to_str().replace("|NEWLINE|", "|OTHER|")
    (tmp_path / "other.json").write_text(changed)
    with pytest.raises(UserError, match=r"gives \|NEWLINE\| the id None"):
        read_fast_tokenizer(tmp_path / "other.json", own)
    (tmp_path / "junk.json").write_text("junk")
    with pytest.raises(UserError, match=r"junk.json can't be read as a fast tokenizer"):
        read_fast_tokenizer(tmp_path / "junk.json", own)
