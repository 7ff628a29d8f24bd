"""Text to token ids and back: sentencepiece with byte fallback, and the special tokens of the released Fuyu."""

import hashlib
import io
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import sentencepiece

from fuyu_e2e.errors import UnusableSampleError, UserError

PATCH, NEWLINE, BOS, EOS, ANSWER = "|SPEAKER|", "|NEWLINE|", "<s>", "</s>", "<0x04>"
SPACE = "\u2581"
"""How sentencepiece writes a space inside; a text that holds this very letter must not come back with spaces."""


class Tokenizer:
    """A sentencepiece model that spells out every text exactly, and the ids that are not text.

    Args:
        model: A serialized sentencepiece model.

    Raises:
        UserError: The bytes are no such model, or lack a special token.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"this is no sentencepiece model ({error})") from error
        missing = [token for token in (PATCH, NEWLINE, BOS, EOS, ANSWER) if self._id(token) is None]
        if missing:
            raise UserError(f"this sentencepiece model lacks the special tokens {' '.join(missing)}")
        self.patch_id, self.newline_id, self.bos_id, self.eos_id, self.answer_id = (
            self._processor.PieceToId(token) for token in (PATCH, NEWLINE, BOS, EOS, ANSWER)
        )
        self._space_ids = [self._processor.PieceToId(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Reads a model that `fuyu-e2e tokenizer train` wrote.

        Raises:
            UserError: There is none, or it is something else.
        """
        try:
            return cls(Path(path).read_bytes())
        except (OSError, UserError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"The tokenizer {path} can't be read: {reason}. Train one with: fuyu-e2e tokenizer train --shards "
                f"'FOLDER/*.tar' --vocab-size N --out {path}"
            ) from error

    def save(self, path: Path) -> None:
        """Writes the model to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.model)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return Tokenizer, (self.model,)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special and byte tokens included."""
        return self._processor.vocab_size()

    @cached_property
    def digest(self) -> str:
        """The sha256 of the model, in hexadecimal."""
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; none of them is special but the byte tokens that spell rare letters.

        Raises:
            UnusableSampleError: `text-not-unicode` for a text with half a surrogate pair.
        """
        try:
            # One by one: given a list, sentencepiece starts threads anew in each call, which takes 30 times as long.
            parts = [self._processor.Encode(part.encode()) for part in text.split(SPACE)]
        except UnicodeEncodeError as error:
            raise UnusableSampleError("text-not-unicode", str(error)) from error
        ids = list(parts[0])
        for part in parts[1:]:
            ids += [*self._space_ids, *part]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens: the inverse of `encode`. Special tokens other than bytes say nothing."""
        return self._processor.Decode(list(ids))

    def piece(self, token: int) -> str:
        """A token as a person can read it, `▁` for a space."""
        return self._processor.IdToPiece(token)

    def _id(self, piece: str) -> int | None:
        token = self._processor.PieceToId(piece)
        return token if self._processor.IdToPiece(token) == piece else None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) on texts.

    Text is taken as it is, without normalisation; digits stand alone; letters that are too rare to be tokens are
    spelled in bytes. A small corpus that has no pairs left to merge fills up with tokens that are never used.

    Args:
        texts: What to learn from.
        vocab_size: Tokens in all: 256 bytes, the special ones, and what is learnt.

    Raises:
        UserError: There is no text, or the vocabulary can't even hold the letters of the text.
    """
    lines = [line for text in texts for line in text.split("\n") if line]
    if not lines:
        raise UserError("The shards hold no text to train a tokenizer on.")
    try:
        return Tokenizer(_train(lines, vocab_size, unused=0))
    except RuntimeError as error:
        # sentencepiece tells both limits in its message alone.
        if smallest := re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error)):
            raise UserError(
                f"--vocab-size {vocab_size} can't hold the bytes and letters of this text: it takes at least "
                f"{smallest[1]}."
            ) from error
        if largest := re.search(r"Please set it to a value <= (\d+)", str(error)):
            return Tokenizer(_train(lines, vocab_size, unused=vocab_size - int(largest[1])))
        raise


def _train(lines: list[str], vocab_size: int, unused: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        control_symbols=[PATCH, NEWLINE, *(f"|UNUSED{number}|" for number in range(unused))],
        max_sentence_length=1 << 20,
        minloglevel=3,
    )
    return model.getvalue()
