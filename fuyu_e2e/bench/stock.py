"""transformers' `FuyuForCausalLM` as a contender: the same weights, and documents batched as its users do."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fuyu_e2e.bench.documents import BOS, EOS, PATCH
from fuyu_e2e.data.sequence import TokenSequence
from fuyu_e2e.errors import UserError
from fuyu_e2e.export.transformers import stock_inputs, to_transformers, transformers_config
from fuyu_e2e.model.decoder import Decoder

NO_LOSS = -100
"""The label that its loss ignores."""


def require_transformers() -> Any:
    """Returns the module transformers.

    Raises:
        UserError: It isn't installed.
    """
    if find_spec("transformers") is None:
        raise UserError(
            "This benchmark compares with transformers, which is missing: pip install 'transformers>=5.16'."
        )
    transformers = import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    return transformers


def stock_model(decoder: Decoder, attention: str = "sdpa") -> Any:
    """Returns transformers' model with a decoder's weights, on the same device and in the same dtype.

    Raises:
        UserError: transformers is missing.
    """
    transformers = require_transformers()
    weight = decoder.embed_tokens.weight
    config = transformers_config(decoder.config, patch_id=PATCH, bos_id=BOS, eos_id=EOS, dtype=weight.dtype)
    # Copies, so that it doesn't share the decoder's weights; and without a file, which would take 12 GB for `3b`.
    weights = {name: tensor.clone() for name, tensor in to_transformers(decoder.state_dict(), decoder.config).items()}
    model = transformers.FuyuForCausalLM.from_pretrained(
        None,
        config=transformers.FuyuConfig(**config),
        state_dict=weights,
        dtype=weight.dtype,
        attn_implementation=attention,
    )
    assert model.config.text_config._attn_implementation == attention
    return model.to(weight.device)


def stock_training_batch(documents: list[TokenSequence], device: str) -> dict[str, Tensor]:
    """Returns a batch padded on the left, as transformers' processor does, with labels where documents carry loss."""
    inputs = stock_inputs(documents)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"][None]
    labels = torch.full_like(inputs["input_ids"], NO_LOSS)
    for row, document in zip(labels, documents, strict=True):
        own = row[len(row) - len(document) :]
        own.copy_(torch.where(torch.from_numpy(document.loss), torch.from_numpy(document.tokens), NO_LOSS))
    return {name: tensor.to(device) for name, tensor in (inputs | {"labels": labels}).items()}


def grouped_by_length(batches: list[list[TokenSequence]]) -> list[list[TokenSequence]]:
    """Returns the same documents in equally many batches of about equally many tokens, grouped by length.

    transformers' trainer calls this grouping by length: it pads less, but which documents share a step is no longer
    random.
    """
    documents = sorted((document for batch in batches for document in batch), key=len)
    room = -(-sum(map(len, documents)) // len(batches))
    grouped: list[list[TokenSequence]] = [[] for _ in batches]
    seen = 0
    for document in documents:
        grouped[min(seen // room, len(batches) - 1)].append(document)
        seen += len(document)
    return [batch for batch in grouped if batch]
