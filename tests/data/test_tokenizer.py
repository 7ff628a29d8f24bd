"""Every text comes back as it was, and no text says anything special."""

import contextlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuyu_e2e.data.tokenizer import ALPHABET, LINE, OFTEN, SPACE, Tokenizer, suggest_vocab_size, train_tokenizer
from fuyu_e2e.errors import UnusableSampleError, UserError

TEXT = ["The quick brown fox jumps over the lazy dog.", "  two  spaces ", "naïve café", "12345"] * 20


@given(text=st.text())
@example("\u2581 and \u2581\u2581")
@example("\0 nul \0")
@example("  leading, double  and trailing  ")
@example("line\nline\r\n\ttab")
@example("e\u0301 is not é; ﬁ is not fi; Ⅳ is not IV")
@example("שלום مرحبا \u202eabc")
@example("👩‍👩‍👧‍👦🏳️‍🌈")
@example("|SPEAKER||NEWLINE|<s></s><unk><0x04>\x04")
@example("")
def test_round_trip_is_exact(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text() | st.sampled_from(["|SPEAKER|", "|NEWLINE|", "<s>", "</s>", "<0x04>", "|UNUSED0|", "<unk>"]))
def test_text_never_yields_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    special = {tokenizer.patch_id, tokenizer.newline_id, tokenizer.bos_id, tokenizer.eos_id}
    unused = {token for token in range(tokenizer.vocab_size) if tokenizer.piece(token).startswith("|UNUSED")}
    ids = tokenizer.encode(text.replace("\x04", ""))
    assert not (special | unused | {tokenizer.answer_id}) & set(ids)


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UnusableSampleError, match="text-not-unicode"):
        tokenizer.encode("half \ud83d pair")


def test_training_gives_the_size_asked_for_and_learns_words() -> None:
    for size in (300, 340, 1_000):
        trained = train_tokenizer(TEXT, size)
        assert trained.vocab_size == size
    pieces = [trained.piece(token) for token in trained.encode("The quick brown fox")]
    assert len(pieces) <= 6
    assert [trained.piece(token) for token in trained.encode("12345")] == list("12345"), "each digit is a token"


@pytest.mark.parametrize("line", ["quagga " * 90_000, "quaggaquagga" * 1_000 + " quagga" * 40_000])
def test_a_long_line_is_learnt_from(line: str) -> None:
    """sentencepiece itself passes over lines that are too long, and ends where no other is left."""
    assert len(line) > LINE
    tokenizer = train_tokenizer([line], 300)
    assert tokenizer.piece(tokenizer.encode(" quagga")[0]) == f"{SPACE}quagga"


def test_training_is_deterministic() -> None:
    assert train_tokenizer(TEXT, 330).digest == train_tokenizer(TEXT, 330).digest


def test_special_tokens_are_the_released_fuyus(tokenizer: Tokenizer) -> None:
    ids = tokenizer.patch_id, tokenizer.newline_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.answer_id
    assert [tokenizer.piece(token) for token in ids] == ["|SPEAKER|", "|NEWLINE|", "<s>", "</s>", "<0x04>"]
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.patch_id, *tokenizer.encode("a"), tokenizer.eos_id]) == "a"


def test_a_tokenizer_travels_to_workers_and_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new" / "tokenizer.model")
    for copy in (pickle.loads(pickle.dumps(tokenizer)), Tokenizer.from_file(tmp_path / "new" / "tokenizer.model")):  # noqa: S301
        assert copy.digest == tokenizer.digest
        assert copy.encode("Read the digits.") == tokenizer.encode("Read the digits.")


def test_impossible_vocabularies_are_refused_with_the_possible_size() -> None:
    with pytest.raises(UserError, match=r"takes at least (\d+)") as caught:
        train_tokenizer(TEXT, 100)
    smallest = int(str(caught.value).split("at least ")[1].rstrip("."))
    assert train_tokenizer(TEXT, smallest + 1).vocab_size == smallest + 1
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], 300)


@pytest.mark.parametrize(
    "content", [None, b"", b"not a model", b"\x0a\x05hello"], ids=["missing", "empty", "text", "proto"]
)
def test_other_files_are_refused_with_the_command_to_run(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "tokenizer.model"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model can't be read.*fuyu-e2e tokenizer train"):
        Tokenizer.from_file(file)


@given(st.data())
def test_damaged_models_are_refused_or_read_but_never_crash(tokenizer: Tokenizer, data: st.DataObject) -> None:
    model = bytearray(tokenizer.model)
    for _ in range(data.draw(st.integers(1, 10))):
        start = data.draw(st.integers(0, len(model) - 1))
        model[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    with contextlib.suppress(UserError):
        Tokenizer(bytes(model)).encode("Read the digits. \u00e9 |NEWLINE|")


@given(text=st.text(st.characters(categories=("L", "M", "N", "P", "S"), exclude_characters="\u2581"), min_size=1))
def test_each_character_of_a_small_corpus_is_a_token(text: str) -> None:
    """However rare: here one in 20,000, of which sentencepiece's default covers none."""
    trained = train_tokenizer(["the most common words " * 1_000, text], 1_000)
    for character in set(text):
        piece = "\u2581" if character == " " else character
        assert [trained.piece(token) for token in trained.encode(character)] == [piece], repr(character)


def test_rare_characters_of_a_large_alphabet_are_spelled_in_bytes() -> None:
    """Where a vocabulary of thousands of characters would leave no room for words."""
    common, rare = "".join(map(chr, range(0x4E00, 0x4E00 + ALPHABET))), "\u9f98"
    trained = train_tokenizer([common * 10, rare], 2_000)
    assert len(trained.encode(common[:5])) <= 5
    assert len(trained.encode(rare)) == len(rare.encode())


def test_a_vocabulary_too_small_for_each_character_holds_the_common_ones() -> None:
    texts = ["common words " * 20_000, "".join(map(chr, range(0x400, 0x460)))]
    trained = train_tokenizer(texts, 300)
    assert trained.vocab_size == 300
    assert len(trained.encode("common words")) < 12


def test_padding_is_counted_and_a_size_without_rare_tokens_suggested() -> None:
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("abcdefgh"), 8)) for _ in range(60)]
    trained = train_tokenizer(texts, 2_000)
    used = {token for text in texts for token in trained.encode(text)}
    assert 1_000 < trained.padding <= 2_000 - len(used)
    assert [token for token in used if trained.piece(token).startswith("|UNUSED")] == []
    suggested = suggest_vocab_size(trained, texts)
    assert suggested is not None
    assert suggested % 64 == 0
    fitting = train_tokenizer(texts, suggested)
    assert fitting.padding == 0
    assert suggest_vocab_size(fitting, texts) is None
    often = texts * OFTEN
    larger = suggest_vocab_size(train_tokenizer(often, 2_000), often)
    assert larger is not None
    assert larger > suggested
    assert train_tokenizer(often, larger).padding == 0
