"""The configuration of a decoder, `FuyuConfig`, and the named sizes."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from fuyu_e2e.errors import UserError
from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask
from fuyu_e2e.model.blocks.block import BlockConfig
from fuyu_e2e.model.blocks.dense import DenseConfig
from fuyu_e2e.model.components import from_settings, to_settings
from fuyu_e2e.model.dialects import DIALECTS, Dialect, Parts
from fuyu_e2e.model.images import LinearConfig
from fuyu_e2e.model.images.connector import ConnectorConfig
from fuyu_e2e.model.images.masking import PatchMasking
from fuyu_e2e.model.routing.config import RoutingConfig

Rotary = Literal["1d", "2d"]
SizeName = Literal["1m", "10m", "50m", "125m", "350m", "1b", "3b", "8b"]


LINEAR = LinearConfig()
"""Fuyu's connector."""


@dataclass(frozen=True, kw_only=True)
class FuyuConfig:
    """One decoder transformer that reads patches and text in the same sequence.

    Raises:
        UserError: Two values contradict each other; the message says what to change.
    """

    vocab_size: int
    """Rows of the token embedding: the size of the tokenizer."""
    patch_size: int
    """Side of a patch in pixels."""
    layers: int
    """Number of blocks."""
    width: int
    """Size of a token's state between blocks."""
    heads: int
    """Query heads of a block."""
    kv_heads: int
    """Key/value heads of a block, each shared by `heads / kv_heads` query heads; as many as `heads` in `fuyu`."""
    head_size: int
    """Size of one head; even, for rotary positions. In `fuyu` a multiple of 4, and `width / heads`."""
    feed_forward: int
    """Inner width of the SwiGLU, or of the squared ReLU."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    norm_eps: float = 1e-6
    """Added to the mean square, or variance, in every norm."""
    tie_embeddings: bool = False
    """Whether the output projection is the token embedding itself."""
    dialect: Dialect = "qwen3"
    """The combination of block parts; see `fuyu_e2e.model.dialects`."""
    routing: RoutingConfig | None = None
    """Which blocks only some tokens pass; None for a dense decoder."""
    masks: tuple[AttentionMask, ...] = (CAUSAL,)
    """The attention mask of each block: a pattern over depth, repeated from the first block."""
    blocks: tuple[BlockConfig, ...] = ()
    """The kind of each block: a pattern over depth, repeated from the first block; empty for dense blocks only."""
    connector: ConnectorConfig = LINEAR
    """The connector, which turns an image's patches into embeddings at its tokens."""
    image_norm: bool = False
    """Whether the embeddings of images pass an RMSNorm after the connector."""
    grid_embeddings: int | None = None
    """If set, each patch gets learnt embeddings of its row and column in the image; the value is the most rows, and
    columns, that an image may have."""

    rotary: Rotary = "1d"
    """Positions of image tokens: `1d` counts them in sequence, `2d` by row and column of their patch. Text before the
    first image has the same positions either way."""
    patch_masking: PatchMasking | None = None
    """Which patches a learnt embedding replaces in training; None for none."""

    def __post_init__(self) -> None:
        if not self.masks:
            raise UserError("decoder.masks is empty: list one for each block of a pattern, or leave it out.")
        for mask in self.masks:
            mask.check_sees()
        for name in ("vocab_size", "patch_size", "layers", "width", "heads", "kv_heads", "head_size", "feed_forward"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"decoder.{name} is {value}, but must be at least 1.")
        if self.heads % self.kv_heads:
            raise UserError(
                f"decoder.heads is {self.heads} and decoder.kv_heads is {self.kv_heads}: every key/value head serves "
                f"the same number of query heads, so set kv_heads to a divisor of {self.heads}."
            )
        if self.dialect not in DIALECTS:
            raise UserError(
                f"decoder.dialect is {self.dialect!r}, which is unknown; the dialects are {', '.join(DIALECTS)}."
            )
        if self.parts.own_keys and self.kv_heads != self.heads:
            raise UserError(
                f"decoder.heads is {self.heads} and decoder.kv_heads is {self.kv_heads}, but in the dialect "
                f"{self.dialect!r} every head has a key of its own: set kv_heads to {self.heads}, or take the dialect "
                "'qwen3'."
            )
        if self.parts.fills_width and self.heads * self.head_size != self.width:
            raise UserError(
                f"decoder.heads x decoder.head_size is {self.heads * self.head_size} and decoder.width is "
                f"{self.width}, but in the dialect {self.dialect!r} they are the same: change one, or take the "
                "dialect 'qwen3'."
            )
        if self.rotary_size % 2:
            turned, remedy = ("half of its", "a multiple of 4") if self.parts.rotary_part == 0.5 else ("its", "even")
            raise UserError(
                f"decoder.head_size is {self.head_size}, but rotary positions turn {turned} values in pairs: make it "
                f"{remedy}."
            )
        if self.rotary not in get_args(Rotary):
            raise UserError(f"decoder.rotary is {self.rotary!r}, but must be '1d' or '2d'.")
        if self.rotary == "2d":
            self._check_grid_positions()
        if self.rope_theta <= 1:
            raise UserError(f"decoder.rope_theta is {self.rope_theta}, but must be above 1; 10000 is usual.")
        if self.norm_eps <= 0:
            raise UserError(f"decoder.norm_eps is {self.norm_eps}, but must be above 0; 1e-6 is usual.")
        if self.routing is not None:
            self.routing.check_layers(self.layers)
        if self.grid_embeddings is not None:
            if self.grid_embeddings < 1:
                raise UserError(f"decoder.grid_embeddings is {self.grid_embeddings}, but must be at least 1.")
            if not self.connector.one_per_patch:
                raise UserError(
                    f"decoder.grid_embeddings is set, but the connector {type(self.connector).__name__} gives no "
                    "embedding for each patch that a row and a column could belong to: leave it unset, or take "
                    "another connector."
                )

    def _check_grid_positions(self) -> None:
        if self.rotary_size % 4:
            least = 4 if self.parts.rotary_part == 1 else 8
            raise UserError(
                f"decoder.rotary is '2d' and decoder.head_size is {self.head_size}, but rows and columns turn as many "
                f"pairs of its values: make it a multiple of {least}, or leave rotary at '1d'."
            )
        if not self.connector.one_per_patch:
            raise UserError(
                f"decoder.rotary is '2d', but the connector {type(self.connector).__name__} gives no embedding for "
                "each patch that a row and a column could belong to: leave it at '1d', or take another connector."
            )

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "FuyuConfig":
        """Returns the configuration that `to_dict` described; missing settings take their defaults."""
        routing, masking = settings.get("routing"), settings.get("patch_masking")
        return cls(
            **settings
            | {
                "routing": None if routing is None else RoutingConfig(**routing),
                "patch_masking": None if masking is None else PatchMasking(**masking),
                "masks": tuple(
                    from_settings(mask, AttentionMask, AttentionMask) for mask in settings.get("masks", [{}])
                ),
                "blocks": tuple(
                    from_settings(block, DenseConfig, BlockConfig) for block in settings.get("blocks", ())
                ),
                "connector": from_settings(settings.get("connector", {}), LinearConfig, ConnectorConfig),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as primitives; components of another class than the default with their class path."""
        return asdict(self) | {
            "masks": [to_settings(mask, AttentionMask) for mask in self.masks],
            "blocks": [to_settings(block, DenseConfig) for block in self.blocks],
            "connector": to_settings(self.connector, LinearConfig),
        }

    @property
    def parts(self) -> Parts:
        """The parts that the dialect builds blocks from."""
        return DIALECTS[self.dialect]

    @property
    def rotary_size(self) -> int:
        """Values of a head that rotary positions turn, counted from the first."""
        return int(self.head_size * self.parts.rotary_part)

    @property
    def block_masks(self) -> tuple[AttentionMask, ...]:
        """The mask of each block."""
        return tuple(self.masks[block % len(self.masks)] for block in range(self.layers))

    @property
    def needs_image_ids(self) -> bool:
        """Whether a block's mask depends on which tokens belong to the same image."""
        return any(mask.needs_image_ids for mask in self.masks)

    @property
    def routed(self) -> tuple[int, ...]:
        """The numbers of the routed blocks, in order of depth."""
        return () if self.routing is None else self.routing.blocks_of(self.layers)

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch: side x side x 3 channels."""
        return self.patch_size**2 * 3


def named_size(name: str) -> FuyuConfig:
    """Returns the decoder configuration of a named size, `1m` to `8b`.

    The vocabulary is 32,768 (`1m`: 2,048, `10m`: 16,384, `8b`: 65,536), a patch 16 pixels (`1m`: 8, `8b`: 30). A name
    gives the number of parameters, embeddings included, to within a fifth.

    Raises:
        UserError: No size has that name.
    """
    names = ("layers", "width", "heads", "kv_heads", "head_size", "feed_forward", "vocab_size", "patch_size")
    sizes = {
        "1m": (4, 96, 3, 3, 32, 256, 2_048, 8),
        "10m": (6, 192, 6, 2, 32, 512, 16_384, 16),
        "50m": (8, 512, 8, 4, 64, 1_536, 32_768, 16),
        "125m": (12, 768, 12, 4, 64, 2_048, 32_768, 16),
        "350m": (24, 1_024, 16, 8, 64, 2_816, 32_768, 16),
        "1b": (22, 1_920, 15, 5, 128, 5_120, 32_768, 16),
        "3b": (28, 2_816, 22, 11, 128, 7_680, 32_768, 16),
        "8b": (36, 4_096, 32, 8, 128, 12_288, 65_536, 30),
    }
    if name not in sizes:
        raise UserError(f"decoder size {name!r} is unknown; the sizes are {', '.join(get_args(SizeName))}.")
    return FuyuConfig.from_dict(dict(zip(names, sizes[name], strict=True)))
