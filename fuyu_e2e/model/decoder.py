"""The decoder: one transformer for patches and text.

- a patch enters through ONE linear projection, a token through the embedding; both stand in the same sequence
- each row of patches ends with a newline token, so that the two dimensions of an image are told in one
- causal attention everywhere, inside images too, and never from one document to another
- rotary positions that restart in each document and count patches and newlines like words
- a norm first in each half of a block, on queries and keys, and before the output
- some blocks may be routed: only tokens that a rule chooses pass them (Mixture-of-Depths, `fuyu_e2e.model.routing`)
- output projections of blocks start at zero, so that a new model is its embedding and deepens as it learns
- the loss is computed where tokens carry it and nowhere else, a chunk of logits at a time
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fuyu_e2e.batch import PackedBatch
from fuyu_e2e.model.attention import Attend, RowAttention, rotary
from fuyu_e2e.model.attention_kernels import AttentionBackend, plan_attention
from fuyu_e2e.model.block import Block, DenseBlock, RoutedBlock, build_norm
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.graphs import noticing_too_many
from fuyu_e2e.model.recomputation import ActivationCheckpointing
from fuyu_e2e.model.routing import Layout, Progress, RoutingTrace, Scorer, Threshold

PATCH_GAIN = 3.0
"""Brings patches of usual contrast, about a third of the range of values, to the scale of token embeddings."""
LOSS_CHUNK = 2_048
"""Positions whose logits are in memory at once while the loss is computed."""


class Decoder(nn.Module):
    """A Fuyu (Bavishi et al. 2023): a decoder-only transformer with no image encoder."""

    def __init__(self, config: FuyuConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.patch_projection = nn.Linear(config.patch_values, config.width)
        self.blocks = nn.ModuleList(
            RoutedBlock(config, layer) if layer in config.routed else DenseBlock(config)
            for layer in range(config.layers)
        )
        self.norm = build_norm(config, config.width)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.progress = Progress()
        """How far its training has come, for the annealing of shares; whoever trains it sets this in each step."""
        self.attention: AttentionBackend = "auto"
        """What computes the attention of packed rows."""
        self.activation_checkpointing: ActivationCheckpointing = "none"
        """For memory: what is computed, and what comes of it, stays the same."""
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draws all weights anew from torch's global generator.

        A new model is a uniform guesser: its loss is the logarithm of the vocabulary. That bounds the output
        projection, and where it is tied the embedding too. A new patch projection sees contrast, not brightness: the
        mean of a patch in each colour, which differs more from image to image than what stands in it, says nothing
        at first. Without that, the quickstart's model takes about twice the steps to begin to read.
        """
        width = self.config.width
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, Scorer):
                module.initialize()
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        nn.init.normal_(
            self.lm_head.weight, std=min(0.02, 2 / width) if self.config.tie_embeddings else 0.1 / width**0.5
        )
        colours = self.patch_projection.weight.view(width, -1, 3)
        colours.sub_(colours.mean(dim=1, keepdim=True)).mul_(PATCH_GAIN)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.attention.o_proj.weight)
            nn.init.zeros_(block.mlp.down_proj.weight)

    def embed(
        self,
        tokens: Int64[Tensor, " T"],
        patches: UInt8[Tensor, "P C"],
        patch_positions: Int64[Tensor, " P"],
    ) -> Float[Tensor, "T D"]:
        """Token embeddings, with projected patches in place of their placeholders.

        Runs the projection without patches too, so that a rank with text alone takes part in its gradient.
        """
        x_TD = self.embed_tokens(tokens)
        weight = self.patch_projection.weight
        x_PD = self.patch_projection((patches.to(weight.dtype) - 127.5) / 127.5)
        return x_TD.index_copy(0, patch_positions, x_PD.to(x_TD.dtype))

    def hidden(
        self,
        x_TD: Float[Tensor, "T D"],
        positions: Int64[Tensor, " T"],
        attend: Attend | RowAttention,
        trace: RoutingTrace | None = None,
    ) -> Float[Tensor, "T D"]:
        """The states behind the last block, normalised: what the output projection reads.

        Args:
            x_TD: What `embed` gives.
            positions: Of each token in its document.
            attend: How the blocks attend; a `RowAttention` where some are routed.
            trace: With the layout of the row where some blocks are routed; what happens there is added to it.
        """
        turns = rotary(positions, self.config.rotary_size, self.config.rope_theta)
        recompute = self.activation_checkpointing if torch.is_grad_enabled() else "none"
        for layer, block in enumerate(self.blocks):
            if isinstance(block, RoutedBlock):
                assert trace is not None
                assert trace.layout is not None
                layout = replace(trace.layout, block=torch.full_like(trace.layout.block, layer))
                capacity = block.rule.capacity(layout) if self.training else None
                x_TD, routed = block(x_TD, turns, attend, layer, layout, capacity, recompute=recompute)
                trace.blocks.append(routed)
            else:
                x_TD = block(x_TD, turns, attend, layer, recompute=recompute)
        return self.norm(x_TD)

    def plan(self, lengths: tuple[int, ...], device: torch.device, backend: AttentionBackend) -> RowAttention:
        """The attention of a row of documents with these lengths, in the type that products are computed in.

        Raises:
            UserError: The backend doesn't serve this device, type or size of a head.
        """
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.embed_tokens.weight.dtype
        return plan_attention(lengths, device, dtype, backend, head_size=self.config.head_size)

    def _encode(self, batch: PackedBatch, trace: RoutingTrace | None) -> Float[Tensor, "T D"]:
        plan = self.plan((*batch.document_lengths, batch.padding), batch.tokens.device, self.attention)
        trace = RoutingTrace() if trace is None else trace
        if self.config.routing is not None:
            trace.layout = Layout.of(batch, self.config, self.progress, self.training)
        x_TD = self.embed(batch.tokens, batch.patches, batch.patch_positions)
        compiled = any(block._compiled_call_impl is not None for block in self.blocks)
        with noticing_too_many() if compiled else nullcontext():
            return self.hidden(x_TD, batch.positions, plan, trace)

    def forward(self, batch: PackedBatch, trace: RoutingTrace | None = None) -> Float[Tensor, "T V"]:
        """Logits of the next token at every position; what happens at routed blocks goes to `trace`."""
        return self.lm_head(self._encode(batch, trace))

    def loss(self, batch: PackedBatch, trace: RoutingTrace | None = None) -> Float[Tensor, ""]:
        """The cross-entropy of all supervised tokens, in nats: their sum, float32.

        The caller divides by the supervised tokens of the whole step; a mean here would weigh batches wrongly. What
        happens at routed blocks goes to `trace`, a rule's own loss among it.
        """
        return self.loss_and_z(batch, trace, with_z=False)[0]

    def loss_and_z(
        self, batch: PackedBatch, trace: RoutingTrace | None = None, *, with_z: bool
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The same, and the sum over supervised tokens of log²(Z); Z normalises the softmax.

        A small part of the latter in the loss (Chowdhery et al. 2022, arXiv 2204.02311, section 5: 1e-4) keeps Z near
        1, where bfloat16 rounds logits the least. It is 0, and costs nothing, unless asked for by `with_z`.
        """
        hidden_SD = self._encode(batch, trace).index_select(0, batch.target_positions)
        chunks = zip(hidden_SD.split(LOSS_CHUNK), batch.targets.split(LOSS_CHUNK), strict=True)
        if hidden_SD.shape[0] <= LOSS_CHUNK:
            losses = [self._chunk_losses(*chunk, with_z) for chunk in chunks]
        else:
            losses = [checkpoint(self._chunk_losses, *chunk, with_z, use_reentrant=False) for chunk in chunks]
        # Two sums, not one to be taken apart: torch's FSDP wants no views from a forward pass.
        both = torch.stack(losses)
        return both[:, 0].sum(), both[:, 1].sum()

    @torch.no_grad()
    def token_losses(self, batch: PackedBatch) -> Float[Tensor, " S"]:
        """The cross-entropy of each supervised token, in nats, float32, in the order of `batch.targets`."""
        hidden_SD = self._encode(batch, None).index_select(0, batch.target_positions)
        chunks = zip(hidden_SD.split(LOSS_CHUNK), batch.targets.split(LOSS_CHUNK), strict=True)
        return torch.cat(
            [F.cross_entropy(self.lm_head(hidden).float(), targets, reduction="none") for hidden, targets in chunks]
        )

    def _chunk_losses(self, hidden_SD: Tensor, targets: Tensor, with_z: bool) -> Tensor:
        logits_SV = self.lm_head(hidden_SD).float()
        loss = F.cross_entropy(logits_SV, targets, reduction="sum")
        return torch.stack((loss, logits_SV.logsumexp(dim=-1).square().sum() if with_z else torch.zeros_like(loss)))

    @property
    def _thresholds(self) -> dict[int, Threshold]:
        """The threshold rules, by block."""
        rules = {layer: block.rule for layer, block in enumerate(self.blocks) if isinstance(block, RoutedBlock)}
        return {layer: rule for layer, rule in rules.items() if isinstance(rule, Threshold)}

    @torch.no_grad()
    def observe(self, trace: RoutingTrace) -> None:
        """Counts the scores of a training row, from which `update_thresholds` sets the next step's thresholds."""
        thresholds = self._thresholds
        for routed in trace.blocks:
            if routed.block in thresholds:
                assert trace.layout is not None
                thresholds[routed.block].observe(routed, trace.layout)

    @torch.no_grad()
    def update_thresholds(
        self, progress: Progress, reduce: Callable[[Tensor], Tensor], skip: Bool[Tensor, ""] | None = None
    ) -> None:
        """Sets the thresholds that hold from the next step on, from the scores observed since the last update.

        Args:
            progress: Of the next step.
            reduce: Sums counts over all ranks.
            skip: Whether to drop these scores instead, and leave all as it is; known to the device alone.
        """
        rules = list(self._thresholds.values())
        if not rules:
            return
        assert self.config.routing is not None
        counts = reduce(torch.cat([rule.counts for rule in rules]))
        dense = progress.dense(self.config.routing)
        for rule, own in zip(rules, counts.split([len(rule.counts) for rule in rules]), strict=True):
            rule.update(own, dense, skip)
