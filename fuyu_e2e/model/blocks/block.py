"""The seam of blocks: `block(x_TD, row) -> x_TD`, the states of some tokens, and what else is known of them."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from fuyu_e2e.model.flops import Operations
from fuyu_e2e.model.recomputation import ActivationCheckpointing
from fuyu_e2e.model.row import Report, Row, TrainingProgress

if TYPE_CHECKING:  # a configuration of a decoder holds those of its blocks
    import fuyu_e2e.model.config


class Block(nn.Module, ABC):
    """A block of the decoder."""

    kind = "custom"
    """What users call such blocks: an adjective."""
    method: str | None = None
    """What the literature calls them."""
    reads_info = False
    """Whether it reads `Row.info`, which costs something to make."""
    selects_tokens = False
    """Whether only some tokens pass it: how many keys a cache will hold of it isn't known before, then."""

    def __init__(self, config: "fuyu_e2e.model.config.FuyuConfig", number: int) -> None:
        super().__init__()
        self.mask = config.block_masks[number]
        """What its tokens see."""
        self.recompute: ActivationCheckpointing = "none"
        """What its backward pass recomputes, to save memory."""

    @abstractmethod
    def forward(self, x_TD: Float[Tensor, "T D"], row: Row) -> Float[Tensor, "T D"]:
        """Returns the states of the row's tokens after the block."""

    @abstractmethod
    def initialize(self) -> None:
        """Has a new block add nothing to the states; its linear layers and norms are drawn by then."""

    @abstractmethod
    def operations(self) -> Operations:
        """Returns what it computes, as a value that can be compared and counts the operations of a row."""

    @abstractmethod
    def saved_bytes(self, tokens: int, work: int, size: int) -> int | float:
        """Returns the bytes that it keeps of a training row for the backward pass.

        Args:
            tokens: Of the row.
            work: Bytes of a value that a product takes or gives.
            size: Bytes of a value of the residual stream and in norms.
        """

    @abstractmethod
    def sharding(self) -> dict[str, ParallelStyle]:
        """Returns what tensor parallelism does with its parts, by their names in it; see `fuyu_e2e.model.parallel`."""

    def observe(self, report: Report, row: Row) -> None:
        """Counts what it reported of a training row."""

    @property
    def counts(self) -> Tensor | None:
        """What it counted since the last step's end, to be summed over ranks; None for a block that counts nothing."""
        return None

    def end_step(self, counts: Tensor, progress: TrainingProgress, skip: Bool[Tensor, ""] | None) -> None:
        """Takes what all ranks counted, and resets its own count.

        Args:
            counts: The sum of `counts` over the ranks.
            progress: Of the next step.
            skip: Whether to change nothing but that; known to the device alone.
        """

    @property
    def compiled(self) -> bool:
        """Whether it is compiled."""
        return self._compiled_call_impl is not None


class BlockConfig(ABC):
    """Settings of a block; a concrete one is a frozen dataclass."""

    @abstractmethod
    def build(self, config: "fuyu_e2e.model.config.FuyuConfig", number: int) -> Block:
        """Returns a new block for a decoder of this configuration.

        Args:
            config: Of the decoder.
            number: Of the block, from 0.
        """
