"""The decoder: one transformer for patches and text.

- a patch enters through ONE linear projection, a token through the embedding, into the same sequence
  (`fuyu_e2e.model.images` has other connectors)
- each row of patches ends with a newline token, which tells the shape of an image in a one-dimensional sequence
- attention is causal, inside images too, and never crosses documents; `config.masks` can set a window or
  bidirectional images for some blocks
- rotary positions restart in each document and count patches and newlines like words
- a norm comes before each half of a block, on queries and keys, and before the output
- routed blocks process only the tokens that a rule chooses (Mixture-of-Depths, `fuyu_e2e.model.routing`)
- output projections of blocks start at zero: a new model is its embedding, and blocks join in as they learn
- the loss is computed only at supervised tokens, one chunk of logits at a time
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fuyu_e2e.errors import UserError
from fuyu_e2e.model.attention.interface import RowAttention, attention_type
from fuyu_e2e.model.attention.kernels import AttentionBackend, plan_attention
from fuyu_e2e.model.attention.mask import AttentionMask
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.blocks.block import Block
from fuyu_e2e.model.blocks.dense import DenseBlock, DenseConfig, build_norm
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.device_copy import to_device
from fuyu_e2e.model.graphs import noticing_too_many
from fuyu_e2e.model.image_layout import ImageSpan
from fuyu_e2e.model.images.connector import ImageStates
from fuyu_e2e.model.images.masking import MaskedPatches
from fuyu_e2e.model.images.options import GridEmbeddings, ImageNorm
from fuyu_e2e.model.recomputation import ActivationCheckpointing
from fuyu_e2e.model.rope import grid_positions, rotary
from fuyu_e2e.model.routing.block import RoutedBlock
from fuyu_e2e.model.row import Reports, Row, TokenInfo, TrainingProgress

LOSS_CHUNK = 2_048
"""Supervised tokens whose logits are in memory at once."""


class Inputs(NamedTuple):
    """The inputs of a decoder."""

    tokens: Int64[Tensor, " T"]
    """Token ids; any id at the place of an image embedding."""
    patches: UInt8[Tensor, "P C"] | None = None
    """Raw patches; None if there can be none, or if `states` is given."""
    patch_positions: Int64[Tensor, " N"] | None = None
    """The index in `tokens` of each image embedding."""
    images: tuple[ImageSpan, ...] = ()
    """The images of the patches, for a connector or an option after it."""
    states: ImageStates | None = None
    """The result of `embed_images`, instead of patches."""
    masked: Bool[Tensor, " N"] | None = None
    """The image embeddings that a learnt one replaces."""


class TokenScores(NamedTuple):
    """How well a decoder predicts the supervised tokens of a row."""

    losses: Float[Tensor, " Y"]
    """The cross-entropy of each, in nats, float32."""
    likeliest: Bool[Tensor, " Y"]
    """Whether each is the likeliest token. If all of an answer's are, greedy generation gives that answer."""


def build_block(config: FuyuConfig, number: int) -> Block:
    """Returns block number `number` (from 0) of a decoder.

    Raises:
        UserError: The block is to be routed but is not dense.
    """
    kinds = config.blocks or (DenseConfig(),)
    block = kinds[number % len(kinds)].build(config, number)
    if number not in config.routed:
        return block
    if not isinstance(block, DenseBlock):
        raise UserError(
            f"Block {number} is a {type(block).__name__} by decoder.blocks and routed by decoder.routing, which "
            "routes dense blocks alone: name others in routing.blocks."
        )
    return RoutedBlock(block, config, number)


@lru_cache
def meta_decoder(config: FuyuConfig) -> "Decoder":
    """Returns the decoder without values (meta tensors), for counting. Cached and shared: don't change it."""
    with torch.device("meta"):
        return Decoder(config)


class Decoder(nn.Module):
    """A Fuyu (Bavishi et al. 2023): a decoder-only transformer with no image encoder."""

    def __init__(self, config: FuyuConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.patch_projection = config.connector.build(config)
        self.image_norm = ImageNorm(config.width, eps=config.norm_eps) if config.image_norm else None
        self.grid_embeddings = GridEmbeddings(config.grid_embeddings, config.width) if config.grid_embeddings else None
        self.masked_patches = MaskedPatches(config.width) if config.patch_masking else None
        self.blocks = nn.ModuleList(build_block(config, number) for number in range(config.layers))
        self.norm = build_norm(config, config.width)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.reads_info = any(block.reads_info for block in self.each_block())
        """Whether any block reads `Row.info`."""
        self.progress = TrainingProgress()
        """The training's progress, for the annealing of shares; the trainer sets it in each step."""
        self.attention: AttentionBackend = "auto"
        """The backend for the attention of packed rows."""
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draws all weights from torch's global generator.

        A new model predicts a uniform distribution: its loss is the logarithm of the vocabulary size. This bounds the
        scale of the output projection, and of the embedding if the two are tied.
        """
        width = self.config.width
        of_connector = set(self.patch_projection.modules())
        for module in self.modules():
            if module is self.patch_projection:
                self.patch_projection.initialize()
            elif module in of_connector:
                continue
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif callable(reset := getattr(module, "reset_parameters", None)) and module is not self.embed_tokens:
                reset()
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        nn.init.normal_(
            self.lm_head.weight, std=min(0.02, 2 / width) if self.config.tie_embeddings else 0.1 / width**0.5
        )
        for block in self.each_block():
            block.initialize()

    def each_block(self) -> Iterator[Block]:
        """Yields the blocks in order of depth."""
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    @property
    def selecting(self) -> dict[int, Block]:
        """The blocks that select tokens, by number."""
        return {number: block for number, block in enumerate(self.each_block()) if block.selects_tokens}

    @property
    def other_kinds(self) -> dict[type[Block], list[int]]:
        """The numbers of the blocks that are not dense, by class."""
        kinds: dict[type[Block], list[int]] = {}
        for number, block in enumerate(self.each_block()):
            if not isinstance(block, DenseBlock):
                kinds.setdefault(type(block), []).append(number)
        return kinds

    def recompute(self, kind: ActivationCheckpointing) -> None:
        """Sets which activations the backward pass recomputes; results stay the same."""
        for block in self.each_block():
            block.recompute = kind

    def embed_images(self, patches: UInt8[Tensor, "P C"], images: tuple[ImageSpan, ...]) -> ImageStates:
        """Returns the connector's embeddings, in the order of the row, and its features if it gives any.

        Runs the connector even without patches, so that a rank whose row is text alone joins in the gradient
        reduction.

        Raises:
            UserError: A view has more rows or columns than `grid_embeddings` allows.
        """
        made = self.patch_projection(patches, images=images)
        states = made if isinstance(made, ImageStates) else ImageStates(made)
        x_ND = states.embeddings
        if self.image_norm is not None:
            x_ND = self.image_norm(x_ND)
        if self.grid_embeddings is not None:
            x_ND = self.grid_embeddings(x_ND, images)
        return states._replace(embeddings=x_ND)

    def embed(self, inputs: Inputs, states: ImageStates | None) -> Float[Tensor, "T D"]:
        """Returns the token embeddings with image embeddings in place of their placeholders."""
        x_TD = self.embed_tokens(inputs.tokens)
        if states is None or inputs.patch_positions is None:
            return x_TD
        x_ND = states.embeddings
        if self.masked_patches is not None and inputs.masked is not None:
            x_ND = self.masked_patches(x_ND, inputs.masked)
        return x_TD.index_copy(0, inputs.patch_positions, x_ND.to(x_TD.dtype))

    def plan(
        self,
        mask: AttentionMask,
        lengths: tuple[int, ...],
        images: tuple[tuple[int, int], ...],
        device: torch.device,
        backend: AttentionBackend,
    ) -> RowAttention:
        """Returns the attention of a row of documents under a mask, in the dtype of the queries, keys and values.

        Args:
            mask: What a token sees of its document.
            lengths: Tokens of each document, laid end to end.
            images: The (start, stop) indices of each image in the row.
            device: The device of the row.
            backend: The attention backend.

        Raises:
            UserError: The backend doesn't serve this device, dtype or head size; or an image is larger than the
                window through which its tokens are to see each other.
        """
        mask.check_images(max((stop - start for start, stop in images), default=0))
        dtype = attention_type(self.embed_tokens.weight)
        head_size = self.config.head_size
        return plan_attention(lengths, device, dtype, backend, head_size=head_size, mask=mask, images=images)

    def row(self, batch: PackedBatch) -> Row:
        """Returns the row of a packed batch, for one forward pass."""
        lengths, images = (*batch.document_lengths, batch.padding), batch.image_bounds
        masks = [block.mask for block in self.each_block()]
        plans = {mask: self.plan(mask, lengths, images, batch.tokens.device, self.attention) for mask in set(masks)}
        attends = [plans[mask] for mask in masks]
        rotary_positions, read = self.rotary_positions(batch), self.visible_image(batch)
        return self.row_of(batch.positions, attends, self.info(batch), rotary_positions, read)

    def visible_image(self, batch: PackedBatch) -> Int64[Tensor, " T"] | None:
        """Returns the image whose features each token may read, see `Row.visible_image`; None without features."""
        if not self.config.connector.gives_features:
            return None
        read, ends = np.full(len(batch.tokens), -1, np.int64), np.cumsum(batch.document_lengths)
        for number, (span, document) in enumerate(zip(batch.images, batch.image_documents, strict=True)):
            read[span.start : ends[document]] = number
        return to_device(torch.from_numpy(read), batch.tokens.device)

    def rotary_positions(self, batch: PackedBatch) -> Int64[Tensor, " T"] | Int64[Tensor, "2 T"]:
        """Returns the positions that the rotary embedding counts: one for each token, or its row and column."""
        if self.config.rotary == "1d":
            return batch.positions
        places = grid_positions((*batch.document_lengths, batch.padding), batch.images)
        return to_device(torch.from_numpy(places), batch.tokens.device)

    def info(self, batch: PackedBatch) -> TokenInfo | None:
        """Returns facts about a packed batch's tokens for the blocks; None if no block reads them."""
        if not self.reads_info:
            return None
        return TokenInfo.of(batch, len(self.blocks), self.progress, self.training)

    def row_of(
        self,
        positions: Int64[Tensor, " T"],
        attends: Sequence[RowAttention],
        tokens: TokenInfo | None = None,
        rotary_positions: Tensor | None = None,
        visible_image: Int64[Tensor, " T"] | None = None,
    ) -> Row:
        """Returns the row of tokens at some positions of their documents.

        Args:
            positions: The position of each token in its document.
            attends: The attention of each block.
            tokens: Further facts about the tokens, if a block reads them.
            rotary_positions: As `rotary_positions` returns them, if they differ from `positions`.
            visible_image: As `visible_image` returns them.
        """
        turned = positions if rotary_positions is None else rotary_positions
        return Row(
            positions=positions,
            rope=rotary(turned, self.config.rotary_size, self.config.rope_theta),
            attends=attends,
            tokens=tokens,
            visible_image=visible_image,
            reports=Reports(),
        )

    def row_of_new_tokens(
        self,
        positions: Int64[Tensor, " B"],
        attends: Sequence[RowAttention],
        rotary_positions: Int64[Tensor, " B"] | None = None,
        visible_image: Int64[Tensor, " B"] | None = None,
    ) -> Row:
        """Returns the row of the next token of each sequence of a batch; for the arguments, see `row_of`."""
        tokens = TokenInfo.of_new_tokens(positions, len(self.blocks)) if self.reads_info else None
        return self.row_of(positions, attends, tokens, rotary_positions, visible_image)

    def forward(self, inputs: Inputs, row: Row) -> Float[Tensor, "T D"]:
        """Returns the normalised states after the last block, the input of the output projection.

        Training, prefill, decoding steps and exported graphs all run this. Blocks add to `row.reports`.
        """
        states = inputs.states
        if states is None and inputs.patches is not None:
            states = self.embed_images(inputs.patches, inputs.images)
        if states is not None and states.features is not None:
            row = row.with_images(states)
        x_TD = self.embed(inputs, states)
        for number, block in enumerate(self.blocks):
            x_TD = block(x_TD, row.at(number))
        return self.norm(x_TD)

    def _states(self, batch: PackedBatch, row: Row | None) -> Float[Tensor, "T D"]:
        """Returns the final states of a packed batch."""
        masked, masking = None, self.config.patch_masking
        if self.training and masking is not None:
            drawn = masking.draw(batch, self.progress.step)
            masked = to_device(torch.from_numpy(drawn), batch.tokens.device)
        inputs = Inputs(batch.tokens, batch.patches, batch.patch_positions, batch.images, masked=masked)
        compiled = any(block.compiled for block in self.each_block())
        with noticing_too_many() if compiled else nullcontext():
            return self.forward(inputs, self.row(batch) if row is None else row)

    def logits(self, batch: PackedBatch, row: Row | None = None) -> Float[Tensor, "T V"]:
        """Returns the next-token logits at every position of a packed batch.

        Args:
            batch: The packed batch.
            row: The result of `row(batch)`, for a caller that wants to read the blocks' reports from it.
        """
        return self.lm_head(self._states(batch, row))

    def loss(self, batch: PackedBatch, row: Row | None = None) -> Float[Tensor, ""]:
        """Returns the summed cross-entropy of all supervised tokens, in nats, float32.

        The caller divides by the supervised tokens of the whole step; a mean here would weigh batches unevenly. The
        blocks' auxiliary losses are not included: read them from `row`, the result of `row(batch)`.
        """
        return self.loss_and_z(batch, row, with_z=False)[0]

    def loss_and_z(
        self, batch: PackedBatch, row: Row | None = None, *, with_z: bool
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Returns the summed loss and the sum over supervised tokens of log²(Z), Z being the softmax's normaliser.

        A small multiple of the second added to the loss (Chowdhery et al. 2022, arXiv 2204.02311, section 5: 1e-4)
        keeps Z near 1, where bfloat16 rounds logits the least. Without `with_z` it is 0 and costs nothing.
        """
        hidden_YD = self._states(batch, row).index_select(0, batch.target_positions)
        chunks = zip(hidden_YD.split(LOSS_CHUNK), batch.targets.split(LOSS_CHUNK), strict=True)
        if hidden_YD.shape[0] <= LOSS_CHUNK:
            losses = [self._chunk_losses(*chunk, with_z) for chunk in chunks]
        else:
            losses = [checkpoint(self._chunk_losses, *chunk, with_z, use_reentrant=False) for chunk in chunks]
        # Two tensors: FSDP2 rejects views as outputs of a forward pass.
        both = torch.stack(losses)
        return both[:, 0].sum(), both[:, 1].sum()

    @torch.no_grad()
    def score_tokens(self, batch: PackedBatch, row: Row | None = None) -> TokenScores:
        """Returns how well each supervised token is predicted, in the order of `batch.targets`.

        Args:
            batch: The packed batch.
            row: The result of `row(batch)`, for a caller that wants to read the blocks' reports from it.
        """
        hidden_YD = self._states(batch, row).index_select(0, batch.target_positions)
        losses, likeliest = [], []
        for hidden, targets in zip(hidden_YD.split(LOSS_CHUNK), batch.targets.split(LOSS_CHUNK), strict=True):
            logits = self.lm_head(hidden).float()
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
            likeliest.append(logits.argmax(dim=-1) == targets)
        return TokenScores(torch.cat(losses), torch.cat(likeliest))

    def _chunk_losses(self, hidden_YD: Tensor, targets: Tensor, with_z: bool) -> Tensor:
        logits_YV = self.lm_head(hidden_YD).float()
        loss = F.cross_entropy(logits_YV, targets, reduction="sum")
        return torch.stack((loss, logits_YV.logsumexp(dim=-1).square().sum() if with_z else torch.zeros_like(loss)))

    @torch.no_grad()
    def observe(self, row: Row) -> None:
        """Passes the reports of a training row to their blocks, which count them for `end_step`."""
        for report in row.reports:
            block = self.blocks[report.block]
            assert isinstance(block, Block)
            block.observe(report, row)

    @torch.no_grad()
    def end_step(
        self, progress: TrainingProgress, reduce: Callable[[Tensor], Tensor], skip: Bool[Tensor, ""] | None = None
    ) -> None:
        """Passes to each block that counts something the total over all ranks since the end of the last step.

        Args:
            progress: The progress at the next step.
            reduce: Sums counts over all ranks.
            skip: Whether to discard the counts instead; a tensor, so that the host need not wait for it.
        """
        counting = [(block, counts) for block in self.each_block() if (counts := block.counts) is not None]
        if counting:
            sums = reduce(torch.cat([counts for _, counts in counting]))
            for (block, _), own in zip(counting, sums.split([len(counts) for _, counts in counting]), strict=True):
                block.end_step(own, progress, skip)
