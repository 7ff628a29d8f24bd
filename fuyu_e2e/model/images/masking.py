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
    """Which patches are masked, drawn in each training step: masked image modelling (He et al. 2021, arXiv 2111.06377)
    without the reconstruction.

    Raises:
        UserError: A value is out of its range.
    """

    images: float = 0.3
    """Fraction of the images that have masked patches."""
    share: float = 0.3
    """The most that is masked of such an image, as a fraction of its patches; drawn uniformly from 0 up to it."""

    def __post_init__(self) -> None:
        for name in ("images", "share"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise UserError(
                    f"decoder.patch_masking.{name} is {value}, but is a part of a whole: set it above 0 and at most "
                    "1, or leave decoder.patch_masking out."
                )

    def draw(self, batch: PackedBatch, step: int) -> Bool[np.ndarray, " N"]:
        """Returns which image embeddings of a row are masked, depending on the document, the image in it and the step
        alone.

        A resumed run draws the same masks as an uninterrupted one, on any number of processes.

        Args:
            batch: The row.
            step: The training step.
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
    """Replaces masked embeddings by one learnt embedding, which starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        """Sets the learnt embedding to zero."""
        nn.init.zeros_(self.embedding)

    def forward(self, x_ND: Float[Tensor, "N D"], masked: Bool[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """Returns the image embeddings with masked ones replaced; the learnt one gets a gradient even if none is."""
        return torch.where(masked[:, None], self.embedding.to(x_ND.dtype), x_ND)
