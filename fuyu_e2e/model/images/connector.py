"""The seam between images and the decoder: a connector turns an image's patches into embeddings at its tokens.

A connector is two classes. Its `ConnectorConfig` holds its settings and decides on the host which views of an image
are cut into patches, and which tokens the image takes. Its `Connector` is the module that computes the embeddings.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from fuyu_e2e.model.flops import Flops
from fuyu_e2e.model.image_layout import Grid, ImageLayout, ImageSpan

if TYPE_CHECKING:  # a configuration of a decoder holds one of a connector
    import fuyu_e2e.model.config

PATCH_GAIN = 3.0
"""Brings patches of usual contrast, about a third of the range of values, to the scale of token embeddings."""


class ConnectorConfig(ImageLayout, ABC):
    """Settings of a connector, and its half on the host; a concrete one is a frozen dataclass."""

    one_per_patch: ClassVar[bool] = False
    """Whether it gives one embedding for each patch, in their order."""

    gives_features: ClassVar[bool] = False
    """Whether it gives features for blocks to attend to."""

    @abstractmethod
    def build(self, config: "fuyu_e2e.model.config.FuyuConfig") -> "Connector":
        """Returns a new connector for a decoder of this configuration."""


class ImageStates(NamedTuple):
    """What a connector makes of the images of a row."""

    embeddings: Float[Tensor, "N D"]
    """At each place that images have for one, in the order of the row."""
    features: Float[Tensor, "F W"] | None = None
    """What blocks may attend to beside the tokens (`Row.features`), of any width."""
    feature_images: Int64[Tensor, " F"] | None = None
    """For each feature, the number of its image in the row."""


class Connector(nn.Module, ABC):
    """Turns the patches of a row into embeddings."""

    @abstractmethod
    def forward(
        self, patches: UInt8[Tensor, "P C"], *, images: tuple[ImageSpan, ...]
    ) -> Float[Tensor, "N D"] | ImageStates:
        """Returns the embedding at each place that images have for one, in the order of the row.

        Or, where its configuration says `gives_features`, `ImageStates` with features too.

        Given no patches it computes nothing, but with all its weights, so that a rank whose row is text alone takes
        part in their gradients.

        Args:
            patches: Raw patches of all views of all images.
            images: Their spans. By keyword alone: torch's hooks of tensor parallelism drop other arguments but the
                first.
        """

    @abstractmethod
    def initialize(self) -> None:
        """Draws all weights anew from torch's global generator."""

    @abstractmethod
    def sharding(self) -> dict[str, ParallelStyle]:
        """Returns what tensor parallelism splits: a style for each submodule, by its name; "" is the connector itself.

        The embeddings have to come out whole on each device.
        """

    @abstractmethod
    def flops(self, grids: Sequence[Grid]) -> Flops:
        """Returns the operations of its products over views of these grids; patches need no gradient."""


def normalized(patches: UInt8[Tensor, "P C"], dtype: torch.dtype) -> Float[Tensor, "P C"]:
    """Returns pixels as values in [-1, 1]."""
    return (patches.to(dtype) - 127.5) / 127.5


@torch.no_grad()
def draw_patch_weight(weight: Float[Tensor, "D C"]) -> None:
    """Draws the weight of a product that reads patches.

    It sees contrast, not brightness: the mean of a patch in each colour, which differs more from image to image than
    what stands in it, says nothing at first. Without that, the quickstart's model takes about twice the steps to begin
    to read.
    """
    nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    colours = weight.view(weight.shape[0], -1, 3)
    colours.sub_(colours.mean(dim=1, keepdim=True)).mul_(PATCH_GAIN)
