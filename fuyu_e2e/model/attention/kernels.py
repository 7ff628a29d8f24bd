"""Attention within documents by GPU kernels, and the choice of a backend.

    documents   torch's scaled dot product over groups of documents of similar length; any device, any dtype
    varlen      torch.nn.attention.varlen: FlashAttention (Dao 2023, arXiv 2307.08691) over documents laid end to end;
                CUDA, bfloat16 or float16
    flash       the same kernel, or a newer one, from the flash_attn package if it is installed
    flex        torch's flex_attention (Dong et al. 2024, arXiv 2412.05496) with a block mask; CUDA, any dtype

FlashAttention kernels support windows and no other mask: blocks with other masks use flex instead.

Only the device knows which tokens a block selects. The number of selected tokens of each document stays there, so that
the host never waits.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from fuyu_e2e.errors import UserError
from fuyu_e2e.model.attention.grouped import GroupedRow, MaskedAttention, PlacedRow, TiledRow
from fuyu_e2e.model.attention.interface import Attend, Passing, Places, RowAttention, seen_by
from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask
from fuyu_e2e.model.device_copy import to_device

AttentionBackend = Literal["auto", "documents", "varlen", "flash", "flex"]
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""Causal attention within documents: (queries "T H K", keys "T G K", values "T G K", start of each document and end of
the last, at least the longest length) to outputs "T H K"."""


HEAD_STEP, LARGEST_HEAD = 8, 256
"""FlashAttention takes head sizes that are multiples of the first, up to the second."""


def plan_attention(
    lengths: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    backend: AttentionBackend = "auto",
    *,
    head_size: int,
    mask: AttentionMask = CAUSAL,
    images: tuple[tuple[int, int], ...] = (),
) -> RowAttention:
    """Returns the attention of a row of documents with these lengths, laid end to end.

    Args:
        lengths: Tokens of each document, and of the padding after them.
        device: The device of the row.
        dtype: The dtype of queries, keys and values.
        backend: The backend; `auto` takes the fastest for the device.
        head_size: Values of a head.
        mask: What a token sees of its document.
        images: The (start, stop) indices of each image in the row.

    Raises:
        UserError: The backend doesn't serve this device, dtype or head size.
    """
    backend = _fastest(device, dtype, head_size) if backend == "auto" else backend
    if backend == "documents":
        return GroupedRow.of(lengths, device) if mask == CAUSAL else TiledRow.of(mask, lengths, images, device)
    check_device(backend, device)
    if backend == "flex":
        return FlexRow.of(lengths, device, mask, images)
    if dtype not in (torch.bfloat16, torch.float16):
        raise UserError(
            f"model.attention {backend} works in bfloat16 or float16, and this is {dtype}: leave it at auto, or say "
            "--trainer.precision bf16-mixed."
        )
    if not _fits(head_size):
        raise UserError(
            f"model.attention {backend} needs heads of a multiple of {HEAD_STEP} values, {LARGEST_HEAD} at most, and "
            f"decoder.head_size is {head_size}: leave it at auto, or change head_size."
        )
    kernel = _varlen_kernel(backend, mask)
    return FlexRow.of(lengths, device, mask, images) if kernel is None else VarlenRow.of(lengths, device, kernel, mask)


def check_device(backend: AttentionBackend, device: torch.device) -> None:
    """Refuses a GPU backend on another device.

    Raises:
        UserError: The backend needs a CUDA device.
    """
    if backend not in ("auto", "documents") and device.type != "cuda":
        raise UserError(f"model.attention {backend} needs a CUDA device, and this is {device.type}: leave it at auto.")


@cache
def _fastest(device: torch.device, dtype: torch.dtype, head_size: int) -> AttentionBackend:
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or not _fits(head_size):
        return "documents"
    if torch.cuda.get_device_capability(device) < (8, 0):  # FlashAttention 2 begins with Ampere
        return "documents"
    return "flash" if _flash_attention() else "varlen" if find_spec("torch.nn.attention.varlen") else "documents"


def _fits(head_size: int) -> bool:
    return head_size % HEAD_STEP == 0 and head_size <= LARGEST_HEAD


@cache
def _flash_attention() -> Callable[..., Tensor] | None:
    """Returns the flash_attn kernel, or None: a package of that name may hold only newer kernels, or fail to load."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@cache
def _varlen_kernel(backend: str, mask: AttentionMask = CAUSAL) -> Kernel | None:
    """Returns the kernel under a mask; None if it can't compute that mask."""
    window = (-1 if mask.window is None else mask.window - 1, 0)
    expressible = type(mask) is AttentionMask and not mask.sinks and mask.images == "causal"
    if backend == "flash":
        if (kernel := _flash_attention()) is None:
            raise UserError(
                "model.attention flash needs flash_attn_varlen_func of the flash_attn package, version 2: install it, "
                "or leave it at auto."
            )
        return partial(_flash, kernel, window) if expressible else None
    if not find_spec("torch.nn.attention.varlen"):
        raise UserError(f"model.attention varlen needs torch 2.10 or newer, and this is {torch.__version__}.")
    from torch.nn.attention.varlen import varlen_attn

    knows = frozenset(inspect.signature(varlen_attn).parameters)
    if not expressible or (mask != CAUSAL and "window_size" not in knows):
        return None
    return partial(_torch_varlen, varlen_attn, knows, window)


def _flash(
    kernel: Any, window: tuple[int, int], queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, longest: int
) -> Tensor:
    return kernel(queries, keys, values, starts, starts, longest, longest, causal=True, window_size=window)


def _torch_varlen(
    kernel: Any,
    knows: frozenset[str],
    window: tuple[int, int],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    longest: int,
) -> Tensor:
    options: dict[str, Any] = {"window_size": window} if "window_size" in knows else {"is_causal": True}
    if queries.shape[1] != keys.shape[1]:
        if "enable_gqa" in knows:
            options["enable_gqa"] = True
        else:  # torch before 2.12
            repeat = queries.shape[1] // keys.shape[1]
            keys, values = keys.repeat_interleave(repeat, dim=1), values.repeat_interleave(repeat, dim=1)
    return kernel(queries, keys, values, starts, starts, longest, longest, **options)


@dataclass(frozen=True)
class VarlenRow(PlacedRow):
    """A row for a kernel that takes the starts of its documents."""

    kernel: Kernel
    starts: Int[Tensor, " bounds"]
    """The start of each document, and the end of the last; int32."""
    longest: int
    """Tokens of the longest document, rounded up to a power of two, to limit the graphs of a compiled block."""

    @classmethod
    def of(
        cls, lengths: tuple[int, ...], device: torch.device, kernel: Kernel, mask: AttentionMask = CAUSAL
    ) -> "VarlenRow":
        """Plans a row of documents with these lengths."""
        starts = _starts(lengths, device)
        longest = 1 << (max(lengths) - 1).bit_length()
        return cls(mask, _places(starts, sum(lengths)), kernel, starts, longest)

    def __call__(
        self,
        queries: Float[Tensor, "T H K"],
        keys: Float[Tensor, "T G K"],
        values: Float[Tensor, "T G K"],
    ) -> Float[Tensor, "T H K"]:
        """Returns the attention of every token to the tokens of its document that the mask shows it."""
        if not len(queries):  # a block selected none
            return queries
        return self.kernel(queries, keys, values, self.starts, self.longest)

    def select(self, passing: Passing) -> Attend:
        """Returns attention among the selected tokens; capacity filler forms one more document."""
        if self.mask.window is not None:  # it counts skipped tokens too, which the kernel can't see
            selected = self.selected(passing)
            return MaskedAttention.of(self.mask, selected, selected)
        documents = len(self.starts) - 1
        own = passing.documents(self.places.document, documents)
        counts = torch.zeros(documents + 1, dtype=torch.int64, device=own.device).scatter_add_(
            0, own, torch.ones_like(own)
        )
        starts = F.pad(counts.cumsum(0), (1, 0)).int()
        places = Places(own, torch.arange(len(own), device=own.device), None)  # in order, as a causal mask needs
        return VarlenRow(self.mask, places, self.kernel, starts, len(own))

    def cross(self, passing: Passing) -> Attend:
        """Returns attention of the selected tokens to the whole row; the kernels take no positions, so by a mask."""
        return MaskedAttention.of(self.mask, self.places.take(passing.index), self.places)


@dataclass(frozen=True)
class FlexRow(PlacedRow):
    """A row under a mask of which blocks of queries see which blocks of keys."""

    shown: BlockMask
    """Which queries see which keys."""

    @classmethod
    def of(
        cls,
        lengths: tuple[int, ...],
        device: torch.device,
        mask: AttentionMask = CAUSAL,
        images: tuple[tuple[int, int], ...] = (),
    ) -> "FlexRow":
        """Plans a row of documents with these lengths."""
        starts = _starts(lengths, device)
        image = None
        if mask.needs_image_ids:
            bounds = to_device(torch.tensor(images, dtype=torch.int32).flatten(), device)
            order = torch.arange(sum(lengths), dtype=bounds.dtype, device=device)
            # Bounds alternate between starts and stops, so every second stretch between them is an image.
            stretch = torch.searchsorted(bounds, order, right=True)
            image = torch.where(stretch % 2 == 1, stretch // 2, -1)
        places = _places(starts, sum(lengths))._replace(image=image)
        return cls(mask, places, _block_mask(mask, places, places))

    def __call__(
        self,
        queries: Float[Tensor, "Q H K"],
        keys: Float[Tensor, "S G K"],
        values: Float[Tensor, "S G K"],
    ) -> Float[Tensor, "Q H K"]:
        """Returns the attention of every query to the keys that it sees."""
        flex: Any = _compiled_flex() if queries.is_cuda else flex_attention
        attended = flex(
            queries.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            block_mask=self.shown,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
        return attended[0].transpose(0, 1)

    def select(self, passing: Passing) -> Attend:
        """Returns attention among the selected tokens; capacity filler forms one more document."""
        own = self.selected(passing)
        return FlexRow(self.mask, own, _block_mask(self.mask, own, own))

    def cross(self, passing: Passing) -> Attend:
        """Returns attention of the selected tokens to the whole row."""
        own = self.places.take(passing.index)
        return FlexRow(self.mask, self.places, _block_mask(self.mask, own, self.places))


def _starts(lengths: tuple[int, ...], device: torch.device) -> Int[Tensor, " bounds"]:
    """Returns the start of each document, and the end of the last."""
    return to_device(F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0)).int(), device)


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _places(starts: Int[Tensor, " bounds"], length: int) -> Places:
    """Returns the places of `length` tokens; computed on the device from the starts, so that little is copied
    there."""
    order = torch.arange(length, dtype=starts.dtype, device=starts.device)
    document = torch.searchsorted(starts, order, right=True) - 1
    return Places(document, order.long() - starts.index_select(0, document), None)


def _block_mask(mask: AttentionMask, queries: Places, keys: Places) -> BlockMask:
    return create_block_mask(
        lambda batch, head, query, key: seen_by(mask, queries.take(query), keys.take(key)),
        None,
        None,
        len(queries.document),
        len(keys.document),
        device=queries.document.device,
    )
