"""Hugging Face's fast tokenizer, `tokenizer.json`, made from our sentencepiece model, with the same ids for every
text."""

from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors
from tokenizers import Tokenizer as FastTokenizer

from fuyu_e2e.data.tokenizer import ANSWER, BOS, EOS, NEWLINE, PATCH, SPACE, Tokenizer
from fuyu_e2e.errors import UserError

UNKNOWN = "<unk>"
MARKS = ("<0x00>", "<0x01>", "<0x02>", "<0x03>", ANSWER)
"""Byte tokens that the released Fuyu uses as marks: of boxes and points, and of the start of an answer."""


def fast_tokenizer(tokenizer: Tokenizer) -> FastTokenizer:
    """Returns the same tokenizer for the `tokenizers` library.

    Its vocabulary spells a space as a space, not as sentencepiece's `\u2581`, so that a text with that very character
    spells it in bytes, as ours does.

    Two details follow transformers' Fuyu processor: a text that starts with a patch placeholder gets one token before
    it, which the processor removes; and special tokens spelled out in a text are read as such.

    Raises:
        UserError: The sentencepiece model is of another kind than `fuyu-e2e tokenizer train` makes.
    """
    model = ModelProto.FromString(tokenizer.model)
    spec, normalizer = model.trainer_spec, model.normalizer_spec
    plain = not normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces
    if spec.model_type != spec.BPE or not spec.byte_fallback or normalizer.name != "identity" or not plain:
        raise UserError(
            "No fast tokenizer can be made of this tokenizer: only of byte-pair models with byte fallback and without "
            "normalisation, as `fuyu-e2e tokenizer train` makes them. Name the tokenizer.json that it was imported "
            "with by --tokenizer-json."
        )
    fast = FastTokenizer(
        models.BPE(
            vocab={_spelled(piece): number for number, piece in enumerate(model.pieces)},
            merges=_merges(model),
            byte_fallback=True,
            unk_token=UNKNOWN,
        )
    )
    fast.normalizer = normalizers.Replace(Regex(r"^\|SPEAKER\|(?=.)"), f" {PATCH}")
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.bos_id)]
    )
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (UNKNOWN, BOS, EOS)])
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in MARKS])
    # Matched after the normalizer above has run.
    fast.add_special_tokens([AddedToken(token, special=True, normalized=True) for token in (PATCH, NEWLINE)])
    return fast


def read_fast_tokenizer(path: Path, tokenizer: Tokenizer) -> FastTokenizer:
    """Returns the fast tokenizer in a file, which is to replace ours.

    Raises:
        UserError: It can't be read, or has other ids for special tokens.
    """
    try:
        fast = FastTokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise UserError(f"--tokenizer-json {path} can't be read as a fast tokenizer: {error}.") from error
    for name in (PATCH, NEWLINE, BOS, EOS, ANSWER):
        found = fast.token_to_id(name)
        if found is None or tokenizer.piece(found) != name:
            raise UserError(
                f"--tokenizer-json {path} gives {name} the id {found}, but the model was trained "
                "with another tokenizer: name the one that belongs to it."
            )
    return fast


def _is_text(piece: ModelProto.SentencePiece) -> bool:
    return piece.type == ModelProto.SentencePiece.NORMAL


def _spelled(piece: ModelProto.SentencePiece) -> str:
    return piece.piece.replace(SPACE, " ") if _is_text(piece) else piece.piece


def _merges(model: ModelProto) -> list[tuple[str, str]]:
    """Returns all pairs that form a piece, in sentencepiece's order of preference."""
    spelled = [_spelled(piece) for piece in sorted(filter(_is_text, model.pieces), key=lambda piece: -piece.score)]
    known = set(spelled)
    return [
        (whole[:cut], whole[cut:])
        for whole in spelled
        for cut in range(1, len(whole))
        if whole[:cut] in known and whole[cut:] in known
    ]
