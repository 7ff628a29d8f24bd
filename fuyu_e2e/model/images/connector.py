"""The interface of connectors, which turn an image's patches into embeddings at its tokens.

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

if TYPE_CHECKING:  # a decoder's configuration holds a connector's
    import fuyu_e2e.model.config

PATCH_GAIN = 3.0
"""Scales patches of usual contrast, about a third of the value range, to the size of token embeddings."""


class ConnectorConfig(ImageLayout, ABC):
    """Settings of a connector, and its part on the host. Concrete classes are frozen dataclasses."""

    one_per_patch: ClassVar[bool] = False
    """Whether it gives one embedding for each patch, in order."""

    gives_features: ClassVar[bool] = False
    """Whether it gives features for blocks to attend to."""

    @abstractmethod
    def build(self, config: "fuyu_e2e.model.config.FuyuConfig") -> "Connector":
        """Returns a new connector for a decoder of this configuration."""


class ImageStates(NamedTuple):
    """A connector's output for the images of a row."""

    embeddings: Float[Tensor, "N D"]
    """One for each place that the images reserve for an embedding, in the order of the row."""
    features: Float[Tensor, "F W"] | None = None
    """Features of any width that blocks may attend to besides the tokens (`Row.features`)."""
    feature_images: Int64[Tensor, " F"] | None = None
    """For each feature, the number of its image in the row."""


class Connector(nn.Module, ABC):
    """Turns the patches of a row into embeddings."""

    @abstractmethod
    def forward(
        self, patches: UInt8[Tensor, "P C"], *, images: tuple[ImageSpan, ...]
    ) -> Float[Tensor, "N D"] | ImageStates:
        """Returns one embedding for each place that the images reserve, in the order of the row.

        If its configuration says `gives_features`, returns `ImageStates` with features too.

        Without patches it must still use all its weights, on empty tensors, so that a rank whose row is text alone
        joins in their gradient reduction.

        Args:
            patches: Raw patches of all views of all images.
            images: The spans of the images. Keyword only: torch's tensor-parallel hooks drop positional arguments
                after the first.
        """

    @abstractmethod
    def initialize(self) -> None:
        """Draws all weights from torch's global generator."""

    @abstractmethod
    def sharding(self) -> dict[str, ParallelStyle]:
        """Returns the tensor-parallel style of each submodule by name; "" is the connector itself.

        The embeddings must come out whole on each device.
        """

    @abstractmethod
    def flops(self, grids: Sequence[Grid]) -> Flops:
        """Returns the operations of its products over views of these (rows, columns); patches need no gradient."""


def normalized(patches: UInt8[Tensor, "P C"], dtype: torch.dtype) -> Float[Tensor, "P C"]:
    """Returns the pixels scaled to [-1, 1]."""
    return (patches.to(dtype) - 127.5) / 127.5


@torch.no_grad()
def draw_patch_weight(weight: Float[Tensor, "D C"]) -> None:
    """Draws the weight of a projection that reads patches.

    The drawn weight ignores brightness: it is orthogonal to the mean of a patch in each colour, which varies more from
    image to image than the content does. Otherwise the quickstart's model takes about twice the steps to begin to
    read.
    """
    nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    colours = weight.view(weight.shape[0], -1, 3)
    colours.sub_(colours.mean(dim=1, keepdim=True)).mul_(PATCH_GAIN)
