"""Options after any connector: a norm of the embeddings, and learnt row and column embeddings."""

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fuyu_e2e.errors import UserError
from fuyu_e2e.model.device_copy import to_device
from fuyu_e2e.model.image_layout import ImageSpan


class ImageNorm(nn.RMSNorm):
    """RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) of each embedding of an image, with a learnt scale."""

    def forward(self, x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        # Under autocast, connectors give bfloat16: a norm is a single kernel only if its input has its weight's dtype.
        return super().forward(x_ND.to(self.weight.dtype))


class GridEmbeddings(nn.Module):
    """Adds learnt embeddings of its row and column to each patch, as ViTs with factorized positions do.

    Both start at zero (NaViT, Dehghani et al. 2023, arXiv 2307.06304, section 2.1, draws them): a new model computes
    the same as without them. Rows and columns get separate gradients, so the two tables don't stay equal.

    Args:
        most: The most rows, and columns, of a view.
        width: The decoder's width.
    """

    def __init__(self, most: int, width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(most, width))
        self.columns = nn.Parameter(torch.empty(most, width))

    def reset_parameters(self) -> None:
        """Sets all embeddings to zero."""
        nn.init.zeros_(self.rows)
        nn.init.zeros_(self.columns)

    def forward(self, x_PD: Float[Tensor, "P D"], images: tuple[ImageSpan, ...]) -> Float[Tensor, "P D"]:
        """Returns the patches' embeddings plus those of their row and column; patches are ordered by view, row by row.

        Raises:
            UserError: A view has more than `most` rows or columns.
        """
        rows, columns = to_device(self._places(images), x_PD.device)
        return x_PD + self.rows.index_select(0, rows) + self.columns.index_select(0, columns)

    def _places(self, images: tuple[ImageSpan, ...]) -> Int64[Tensor, "2 P"]:
        grids = [grid for span in images for grid in span.grids]
        most = self.rows.shape[0]
        for grid in grids:
            if max(grid) > most:
                raise UserError(
                    f"An image has {grid[0]} x {grid[1]} patches, but decoder.grid_embeddings is {most}, the most "
                    f"rows and columns that there can be: set it to at least {max(grid)}, or data.max_size so that "
                    "images are scaled down to fit."
                )
        indices = (np.indices(grid).reshape(2, -1) for grid in grids)
        return torch.from_numpy(np.concatenate([np.empty((2, 0), np.int64), *indices], axis=1))
