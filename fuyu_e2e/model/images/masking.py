"""Patch masking: in training, a learnt embedding replaces some patches of some images."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fuyu_e2e.errors import UserError
from fuyu_e2e.model.batch import PackedBatch


@dataclass(frozen=True, kw_only=True)
class PatchMasking:
    """Which patches are masked, drawn in each training step; after masked image modelling (He et al. 2021, arXiv
    2111.06377), without its reconstruction.

    Raises:
        UserError: A value is out of its range.
    """

    images: float = 0.3
    """Part of the images of which patches are masked."""
    share: float = 0.3
    """The part of such an image's patches that is masked at most; how many is drawn evenly from 0 up to it."""

    def __post_init__(self) -> None:
        for name in ("images", "share"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise UserError(
                    f"decoder.patch_masking.{name} is {value}, but is a part of a whole: set it above 0 and at most "
                    "1, or leave decoder.patch_masking out."
                )

    def draw(self, batch: PackedBatch, step: int) -> Bool[np.ndarray, " N"]:
        """Returns which embeddings of a row's images are masked: by the document, the image in it and the step alone.

        A run that goes on draws what it would have drawn, on any number of processes.

        Args:
            batch: The row.
            step: Of the training.
        """
        starts = np.cumsum([0, *batch.document_lengths])
        masked = [np.empty(0, bool)]
        for span, document in zip(batch.images, batch.image_documents, strict=True):
            key = (batch.document_ids[document], step, span.start - int(starts[document]))
            random = np.random.default_rng(key)
            share = random.uniform(0, self.share) if random.random() < self.images else 0.0
            masked.append(random.random(span.places) < share)
        return np.concatenate(masked)


class MaskedPatches(nn.Module):
    """Puts one learnt embedding, zero at first, in the place of masked ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        """Sets it to zero."""
        nn.init.zeros_(self.embedding)

    def forward(self, x_ND: Float[Tensor, "N D"], masked: Bool[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """Returns the embeddings of a row's images; also where none is masked, with a gradient for the learnt one."""
        return torch.where(masked[:, None], self.embedding.to(x_ND.dtype), x_ND)
