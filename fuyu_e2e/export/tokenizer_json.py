"""Hugging Face's fast tokenizer, `tokenizer.json`, made of our sentencepiece model: the same ids for every text."""

from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors
from tokenizers import Tokenizer as FastTokenizer

from fuyu_e2e.data.tokenizer import ANSWER, BOS, EOS, NEWLINE, PATCH, SPACE, Tokenizer
from fuyu_e2e.errors import UserError

UNKNOWN = "<unk>"
MARKS = ("<0x00>", "<0x01>", "<0x02>", "<0x03>", ANSWER)
"""The byte tokens that the released Fuyu gives a meaning of their own: box and point marks, begin of answer."""


def fast_tokenizer(tokenizer: Tokenizer) -> FastTokenizer:
    """The same tokenizer for the `tokenizers` library.

    A space stands for itself in its vocabulary, not as sentencepiece's letter `\u2581`, so that a text which holds
    that very letter spells it in bytes, as ours does.

    Two things are as transformers' Fuyu processor wants them: a text that begins with a patch placeholder gets one
    token before it, which the processor takes off again; and special tokens, spelled out in a text, are read as such.

    Raises:
        UserError: The sentencepiece model is not of the kind that `fuyu-e2e tokenizer train` makes.
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
    # Found after the normalizer above has seen them.
    fast.add_special_tokens([AddedToken(token, special=True, normalized=True) for token in (PATCH, NEWLINE)])
    return fast


def read_fast_tokenizer(path: Path, tokenizer: Tokenizer) -> FastTokenizer:
    """Returns the fast tokenizer in a file, which is to stand for ours.

    Raises:
        UserError: It can't be read, or gives special tokens other ids.
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
    """Returns all pairs that make up a piece, in the order in which sentencepiece prefers the pieces."""
    spelled = [_spelled(piece) for piece in sorted(filter(_is_text, model.pieces), key=lambda piece: -piece.score)]
    known = set(spelled)
    return [
        (whole[:cut], whole[cut:])
        for whole in spelled
        for cut in range(1, len(whole))
        if whole[:cut] in known and whole[cut:] in known
    ]
