"""The tokenizer: sentencepiece with byte fallback, and the special tokens of the released Fuyu."""

import contextlib
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import sentencepiece

from fuyu_e2e.errors import UnusableSampleError, UserError, writing

PATCH, NEWLINE, BOS, EOS, ANSWER = "|SPEAKER|", "|NEWLINE|", "<s>", "</s>", "<0x04>"
SPACE = "\u2581"
"""sentencepiece's internal character for a space; a text that contains it must not come back with spaces."""
PADDING = "|UNUSED"
"""Prefix of tokens that only fill up a vocabulary."""
ALPHABET = 1_000
"""The most different characters for which each gets a token.

sentencepiece advises to cover all characters of a small alphabet, and 99.95 % of text in scripts with thousands.
Several alphabets with accents and punctuation stay below; Chinese or Japanese text, and a web crawl, which contains
some of everything, do not: there, rare characters are better spelled in bytes.
"""
LINE = 2**18
"""Characters, of at most four bytes each, after which a line is cut, since sentencepiece skips longer lines."""
NORMAL = 1
"""sentencepiece's type of a learnt token."""
OFTEN = 10
"""How often texts must contain a token for it to be worth having."""
WORDS = 100_000
"""The most frequent distinct words, in which tokens are counted."""


class Tokenizer:
    """A sentencepiece model that encodes every text exactly, and the ids of special tokens.

    Args:
        model: A serialized sentencepiece model.

    Raises:
        UserError: The bytes are not such a model, or lack a special token.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"this is no sentencepiece model ({error})") from error
        ids = {token: self._processor.PieceToId(token) for token in (PATCH, NEWLINE, BOS, EOS, ANSWER)}
        if missing := [token for token, number in ids.items() if self.piece(number) != token]:
            raise UserError(f"this sentencepiece model lacks the special tokens {' '.join(missing)}")
        self.patch_id, self.newline_id, self.bos_id, self.eos_id, self.answer_id = ids.values()
        self._space_ids = [self._processor.PieceToId(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Reads a model that `fuyu-e2e tokenizer train` wrote.

        Raises:
            UserError: There is no such file, or it is not such a model.
        """
        try:
            return cls(Path(path).read_bytes())
        except (OSError, UserError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"The tokenizer {path} can't be read: {reason}. Train one with: fuyu-e2e tokenizer train --shards "
                f"'FOLDER/train-*.tar' --vocab-size N --out {path}"
            ) from error

    def save(self, path: Path) -> None:
        """Writes the model to a file."""
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.model)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return Tokenizer, (self.model,)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special and byte tokens included."""
        return self._processor.vocab_size()

    @property
    def padding(self) -> int:
        """Number of tokens that only fill up the vocabulary; no text uses them."""
        return sum(self.piece(token).startswith(PADDING) for token in range(self.vocab_size))

    @cached_property
    def digest(self) -> str:
        """The sha256 of the model, in hexadecimal."""
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, none of them special except byte tokens, which spell rare characters.

        Raises:
            UnusableSampleError: `text-not-unicode` for a text with half a surrogate pair.
        """
        try:
            # One at a time: for a list, sentencepiece starts threads in each call, which takes 30 times as long.
            parts = [self._processor.Encode(part.encode()) for part in text.split(SPACE)]
        except UnicodeEncodeError as error:
            raise UnusableSampleError("text-not-unicode", str(error)) from error
        ids = list(parts[0])
        for part in parts[1:]:
            ids += [*self._space_ids, *part]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of tokens, the inverse of `encode`; special tokens other than bytes give no text."""
        return self._processor.Decode(list(ids))

    def piece(self, token: int) -> str:
        """Returns a token in readable form, with `▁` for a space."""
        return self._processor.IdToPiece(token)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) on texts.

    Text is used as it is, without normalisation; each digit is one token. If a text has at most `ALPHABET` different
    characters and the vocabulary holds them, each is a token; other rare characters are spelled in bytes. If a small
    corpus runs out of pairs to merge, unused tokens fill up the vocabulary (see `Tokenizer.padding`).

    Args:
        texts: The training texts.
        vocab_size: Total number of tokens: 256 bytes, the special ones, and the learnt ones.

    Raises:
        UserError: There is no text, or the vocabulary is too small for the characters of the text.
    """
    lines = [piece for text in texts for line in text.split("\n") for piece in _pieces(line)]
    if not lines:
        raise UserError("The shards hold no text to train a tokenizer on.")
    if len(set().union(*lines)) <= ALPHABET:
        with contextlib.suppress(UserError):  # the vocabulary can't hold each character
            return _train_to_size(lines, vocab_size, coverage=1.0)
    return _train_to_size(lines, vocab_size, coverage=0.9995)


def _pieces(line: str) -> Iterator[str]:
    """Yields a line in pieces short enough for sentencepiece, cut before a space if possible; none for an empty
    line."""
    while len(line) > LINE:
        end = line.rfind(" ", 1, LINE)
        end = end if end > 0 else LINE
        yield line[:end]
        line = line[end:]
    if line:
        yield line


def suggest_vocab_size(tokenizer: Tokenizer, texts: Iterable[str]) -> int | None:
    """Returns a smaller vocabulary size at which the texts contain every merge at least `OFTEN` times, or None.

    The size is a multiple of 64, for fast matrix products. A larger vocabulary has tokens too rare to be learnt.

    Args:
        tokenizer: The result of `train_tokenizer` on the texts.
        texts: The same texts.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # which nothing else here needs

    words = Counter(word for text in texts for word in re.findall(r"\n| ?[^ \n]+| ", text))
    common = dict(words.most_common(WORDS))
    model = ModelProto.FromString(tokenizer.model)
    merges = [number for number, piece in enumerate(model.pieces) if piece.type == NORMAL and len(piece.piece) > 1]
    fixed = tokenizer.vocab_size - tokenizer.padding - len(merges)

    def is_frequent(count: int) -> bool:
        """Returns whether the texts often contain merge number `count`, in the vocabulary that ends with it."""
        smaller, later = ModelProto.FromString(tokenizer.model), set(merges[count:])
        del smaller.pieces[:]
        smaller.pieces.extend(piece for number, piece in enumerate(model.pieces) if number not in later)
        processor = sentencepiece.SentencePieceProcessor(model_proto=smaller.SerializeToString())
        last = processor.PieceToId(model.pieces[merges[count - 1]].piece)
        encoded = zip(processor.Encode(list(common)), common.values(), strict=True)
        return sum(times * ids.count(last) for ids, times in encoded) >= OFTEN

    low, high = 0, len(merges)  # merges are in the order of their frequency
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_frequent(middle) else (low, middle - 1)
    size = max((fixed + low) // 64, fixed // 64 + 1) * 64
    return size if size < tokenizer.vocab_size else None


def _train_to_size(lines: list[str], vocab_size: int, coverage: float) -> Tokenizer:
    try:
        return Tokenizer(_train(lines, vocab_size, coverage, unused=0))
    except RuntimeError as error:
        # sentencepiece reports both limits only in its message.
        if smallest := re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error)):
            raise UserError(
                f"--vocab-size {vocab_size} can't hold the bytes and letters of this text: it takes at least "
                f"{smallest[1]}."
            ) from error
        if largest := re.search(r"Please set it to a value <= (\d+)", str(error)):
            return Tokenizer(_train(lines, vocab_size, coverage, unused=vocab_size - int(largest[1])))
        raise


def _train(lines: list[str], vocab_size: int, coverage: float, unused: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=coverage,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        control_symbols=[PATCH, NEWLINE, *(f"{PADDING}{number}|" for number in range(unused))],
        max_sentence_length=4 * LINE,
        minloglevel=3,
    )
    return model.getvalue()
