"""Loads models from disk: from a Lightning checkpoint, a sharded one, or an exported folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fuyu_e2e.checkpoint.exported_model import is_exported, read_folder
from fuyu_e2e.checkpoint.lightning_io import WEIGHTS_PREFIX, read_checkpoint
from fuyu_e2e.checkpoint.metadata import SECTION, ModelMetadata, Provenance
from fuyu_e2e.checkpoint.run_checkpoints import find_checkpoint
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.parallel import copy_part

OUTPUT = "lm_head.weight"
"""The output projection, which is the embedding if the two are tied."""
EMBEDDING = "embed_tokens.weight"
NAMED = 3
"""Most tensors that an error names."""


@dataclass(frozen=True)
class StoredModel:
    """A model in its stored form."""

    source: Path
    """The file or folder it was read from."""
    metadata: ModelMetadata
    weights: dict[str, Tensor]
    """Weights by the decoder's names, in their stored dtypes; without a tied output projection."""
    provenance: Provenance


@dataclass(frozen=True)
class TrainedModel:
    """A decoder in evaluation mode, with the means to prompt it."""

    decoder: Decoder
    builder: SequenceBuilder
    step: int
    """Optimizer steps of its training."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its training."""
        return self.builder.tokenizer


def read_model(path: str | Path, averaged: bool = False) -> StoredModel:
    """Reads a checkpoint, the newest one in a run's directory, or an exported folder.

    Args:
        path: The file or folder.
        averaged: Whether to read averaged weights (EMA) instead of the optimizer's.

    Raises:
        UserError: There is nothing at the path, it can't be read, it contains code, its weights don't fit its own
            description, or it has no averaged weights.
    """
    path = Path(path)
    if is_exported(path):
        metadata, weights, provenance = read_folder(path)
        if averaged and not provenance.averaged:
            raise UserError(f"{path} holds no averaged weights: leave that option out.")
        return StoredModel(path, metadata, fitting(weights, metadata.config, path), provenance)
    file = find_checkpoint(path)
    checkpoint = read_checkpoint(file, checked=file != path)  # the search has already compared checksums
    metadata = ModelMetadata.of(checkpoint, str(file))
    # Lightning's WeightAveraging stores averaged weights in place of the others.
    holds_average = "current_model_state" in checkpoint
    if averaged and not holds_average:
        raise UserError(
            f"{file} holds no averaged weights, since the run averaged none: leave that option out, or train with "
            "Lightning's EMAWeightAveraging among trainer.callbacks."
        )
    state = checkpoint["current_model_state" if holds_average and not averaged else "state_dict"]
    weights = {
        name.removeprefix(WEIGHTS_PREFIX): tensor for name, tensor in state.items() if name.startswith(WEIGHTS_PREFIX)
    }
    section = checkpoint[SECTION]
    provenance = Provenance(
        step=int(checkpoint["global_step"]),
        tokens_seen=section["tokens_seen"],
        data=section.get("data", {}),
        validation=section.get("validation", {}),
        documents=section.get("documents", {}),
        averaged=averaged,
    )
    return StoredModel(file, metadata, fitting(weights, metadata.config, file), provenance)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> TrainedModel:
    """Returns the trained model of a checkpoint, of the newest one in a run's directory, or of an exported folder.

    Raises:
        UserError: As in `read_model`.
    """
    return build_model(read_model(path), device)


def build_model(stored: StoredModel, device: torch.device | str = "cpu") -> TrainedModel:
    """Returns the trained model of a stored one."""
    metadata = stored.metadata
    decoder = build_decoder(metadata.config, stored.weights, device)
    return TrainedModel(decoder, metadata.builder, stored.provenance.step)


def build_decoder(config: FuyuConfig, weights: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Decoder:
    """Returns a float32 decoder in evaluation mode with weights that fit it."""
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.to_empty(device=device)
    if config.tie_embeddings:
        decoder.lm_head.weight = decoder.embed_tokens.weight  # the move from the meta device broke the tie
    load_weights(decoder, weights)
    return decoder.eval()


def load_weights(decoder: Decoder, weights: Mapping[str, Tensor]) -> None:
    """Loads weights that fit into a decoder; if it is sharded, each process loads its part."""
    tied = {OUTPUT: weights[EMBEDDING]} if decoder.config.tie_embeddings else {}
    stored = {**weights, **tied}
    for name, tensor in decoder.state_dict().items():
        copy_part(stored[name], tensor)


def fitting(weights: dict[str, Tensor], config: FuyuConfig, source: Path) -> dict[str, Tensor]:
    """Returns the weights, without a tied output projection, after checking that they fit the configuration.

    Raises:
        UserError: Names the tensors that are missing, unknown or of another shape.
    """
    if config.layers > len(weights):  # checked before a decoder with a claimed number of blocks is built
        raise UserError(
            f"{source} describes {config.layers:,} layers, but holds {len(weights)} tensors: fetch it again."
        )
    with torch.device("meta"):
        wanted = Decoder(config).state_dict()
    if config.tie_embeddings:
        del wanted[OUTPUT]
        tied = weights.pop(OUTPUT, None)
        if tied is not None and not torch.equal(tied, weights.get(EMBEDDING, tied)):
            raise UserError(f"{source} ties {OUTPUT} to {EMBEDDING}, but holds another tensor for it.")
    if missing := wanted.keys() - weights.keys():
        raise UserError(f"{source} lacks {_named(missing)}, which the model that it describes has: fetch it again.")
    if strange := weights.keys() - wanted.keys():
        raise UserError(f"{source} holds {_named(strange)}, which the model that it describes doesn't have.")
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{source}: {name} has the shape {list(tensor.shape)}, but the model that it describes takes "
                f"{list(wanted[name].shape)}."
            )
    return weights


def _named(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:NAMED])
    return first if len(names) <= NAMED else f"{first} and {len(names) - NAMED} more tensors"
