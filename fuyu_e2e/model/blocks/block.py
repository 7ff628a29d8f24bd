"""The interface of blocks: `block(x_TD, row) -> x_TD`, from the states of some tokens and further facts about them."""

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
    """One block of the decoder, from token states to token states."""

    kind = "custom"
    """The adjective that messages use for such a block."""
    method: str | None = None
    """The name of the method in the literature."""
    reads_info = False
    """Whether the block reads `Row.info`, which costs something to make."""
    selects_tokens = False
    """Whether only some tokens pass the block; then the number of keys in its cache isn't known in advance."""

    def __init__(self, config: "fuyu_e2e.model.config.FuyuConfig", number: int) -> None:
        super().__init__()
        self.mask = config.block_masks[number]
        """What its tokens see."""
        self.recompute: ActivationCheckpointing = "none"
        """Which activations its backward pass recomputes to save memory."""

    @abstractmethod
    def forward(self, x_TD: Float[Tensor, "T D"], row: Row) -> Float[Tensor, "T D"]:
        """Returns the states of the row's tokens after the block."""

    @abstractmethod
    def initialize(self) -> None:
        """Makes a new block add nothing to the states; its linear layers and norms are drawn already."""

    @abstractmethod
    def operations(self) -> Operations:
        """Returns what the block computes, as a hashable value that counts the operations of a row."""

    @abstractmethod
    def saved_bytes(self, tokens: int, work: int, size: int) -> int | float:
        """Returns the bytes that the block keeps of a training row for the backward pass.

        Args:
            tokens: Tokens of the row.
            work: Bytes of a value that a matrix product reads or writes.
            size: Bytes of a value in the residual stream and in norms.
        """

    @abstractmethod
    def sharding(self) -> dict[str, ParallelStyle]:
        """Returns the tensor-parallel style of each of its parts, by name; see `fuyu_e2e.model.parallel`."""

    def observe(self, report: Report, row: Row) -> None:
        """Counts what the block reported about a training row."""

    @property
    def counts(self) -> Tensor | None:
        """What it counted since the end of the last step, to be summed over ranks; None if it counts nothing."""
        return None

    def end_step(self, counts: Tensor, progress: TrainingProgress, skip: Bool[Tensor, ""] | None) -> None:
        """Takes the counts of all ranks and resets its own.

        Args:
            counts: The sum of `counts` over ranks.
            progress: The progress at the next step.
            skip: Whether to do nothing but the reset; a tensor, so that the host need not wait for it.
        """

    @property
    def compiled(self) -> bool:
        """Whether torch.compile is on for the block."""
        return self._compiled_call_impl is not None


class BlockConfig(ABC):
    """Settings of a block; a concrete one is a frozen dataclass."""

    @abstractmethod
    def build(self, config: "fuyu_e2e.model.config.FuyuConfig", number: int) -> Block:
        """Returns a new block for a decoder of this configuration.

        Args:
            config: The decoder's configuration.
            number: The block's number, from 0.
        """
