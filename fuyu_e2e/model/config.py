"""What a decoder is made of: `FuyuConfig` with its `RoutingConfig`, and the named sizes."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from fuyu_e2e.errors import UserError
from fuyu_e2e.model.images.connector import ConnectorConfig
from fuyu_e2e.model.images.linear import LinearConfig
from fuyu_e2e.model.images.mlp import MLPConfig

SizeName = Literal["1m", "10m", "50m", "125m", "350m", "1b", "3b", "8b"]


Dialect = Literal["qwen3", "fuyu"]
RuleName = Literal["threshold", "topk", "image_topk", "fixed", "random"]
Share = float | tuple[float, ...]
LINEAR = LinearConfig()
"""Fuyu's connector."""
CONNECTORS: tuple[type[ConnectorConfig], ...] = (LinearConfig, MLPConfig)
"""Those that stored settings may name."""


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258): blocks that only some tokens pass.

    Raises:
        UserError: A value is out of its range, or two contradict each other.
    """

    rule: RuleName = "threshold"
    """How tokens are chosen; see `fuyu_e2e.model.routing`."""
    share: Share = 0.125
    """Share of the tokens that passes a routed block: one for all, or one for each routed block in order of depth.
    Under `image_topk` the share of each image's patches."""
    text_share: Share | None = None
    """Where set, `share` is that of patches, and this that of all other tokens: words and newlines."""
    blocks: tuple[int, ...] | None = None
    """Which blocks are routed, counted from 0. Unset: every second one from the last but one down, none in the first
    quarter."""
    skipped: Literal["nothing", "keys"] = "nothing"
    """What a token leaves behind in a block that it skips: `nothing` (the paper's), or its key and value, so that
    later tokens still see it there."""
    keep_starts: bool = False
    """Whether the first token of each document passes whatever its score."""
    keep_newlines: bool = False
    """Whether newline tokens pass whatever their score."""
    anneal: float = 0.1
    """Part of the training over which the share falls from 1 to what it is to be."""
    explore: float = 0.05
    """Part of the choices in training that are drawn at random with the right share; falls to 0 over the run."""
    slack: float = 0.25
    """Room for tokens beyond the share, as a part of it, in the fixed capacity of a routed block in training."""

    def __post_init__(self) -> None:
        if self.rule not in get_args(RuleName):
            raise UserError(
                f"routing.rule is {self.rule!r}, which is unknown; the rules are {', '.join(get_args(RuleName))}."
            )
        for name in ("share", "text_share"):
            for share in _listed(getattr(self, name)):
                if not 0 < share <= 1:
                    raise UserError(
                        f"routing.{name} holds {share}, but is a share of the tokens: set it above 0 and at most 1. "
                        "A block that nothing passes is one to leave out."
                    )
        if self.text_share is not None and self.rule in ("topk", "image_topk"):
            raise UserError(
                f"routing.text_share is set, but the rule {self.rule!r} can't keep it: leave it unset, or take "
                "'threshold', 'fixed' or 'random'."
            )
        if self.skipped not in ("nothing", "keys"):
            raise UserError(f"routing.skipped is {self.skipped!r}, but must be 'nothing' or 'keys'.")
        for name in ("anneal", "explore"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UserError(f"routing.{name} is {value}, but is a part of a whole and must lie in [0, 1].")
        if not self.slack >= 0:
            raise UserError(f"routing.slack is {self.slack}, but must be 0 or above; 0.25 is usual.")

    def dense(self, done: float) -> float:
        """1 while all tokens pass, falling to 0 over the first part of a training, where shares are as asked.

        Args:
            done: The part of the training that is done.
        """
        if done == 0:
            return 1.0  # no threshold is known in the first step
        return max(0.0, 1 - done / self.anneal) if self.anneal else 0.0


def _listed(share: Share | None) -> tuple[float, ...]:
    return () if share is None else tuple(share) if isinstance(share, tuple | list) else (share,)


@dataclass(frozen=True)
class RoutedShares:
    """The shares of one routed block."""

    patches: float
    """Share of the patches that passes."""
    others: float
    """Share of all other tokens: words and newlines."""


def annealed(share: Any, dense: Any) -> Any:
    """A share, a float or a tensor of them, while training is still partly dense: 1 where `dense` is 1."""
    return share + (1 - share) * dense


@dataclass(frozen=True, kw_only=True)
class FuyuConfig:
    """One decoder transformer that reads patches and text in the same sequence.

    Each dialect is, weight for weight, what a text model of transformers computes, with rotary positions in the
    rotate-half layout:

    - `qwen3`, as its Qwen3: RMSNorm before each half of a block and on queries and keys, SwiGLU, grouped-query
      attention, no biases
    - `fuyu`, as its Persimmon, the text model of the released Fuyu-8B: LayerNorm in the same places, squared ReLU,
      every head with a key of its own, rotary positions on the first half of each head, biases everywhere but in
      the output projection

    Raises:
        UserError: Two values contradict each other; the sentence says what to change.
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
    """The combination of block parts."""
    routing: RoutingConfig | None = None
    """Which blocks only some tokens pass; None for a dense decoder."""
    connector: ConnectorConfig = LINEAR
    """What turns an image's patches into embeddings at its tokens."""
    image_norm: bool = False
    """Whether embeddings of images pass an RMSNorm behind the connector."""
    grid_embeddings: int | None = None
    """Where set, learnt embeddings of a patch's row and column in its image are added to its own: the most rows, and
    columns, that there can be."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "patch_size",
            "layers",
            "width",
            "heads",
            "kv_heads",
            "head_size",
            "feed_forward",
        ):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"decoder.{name} is {value}, but must be at least 1.")
        if self.heads % self.kv_heads:
            raise UserError(
                f"decoder.heads is {self.heads} and decoder.kv_heads is {self.kv_heads}: every key/value head serves "
                f"the same number of query heads, so set kv_heads to a divisor of {self.heads}."
            )
        if self.dialect not in get_args(Dialect):
            raise UserError(
                f"decoder.dialect is {self.dialect!r}, which is unknown; the dialects are "
                f"{', '.join(get_args(Dialect))}."
            )
        if self.dialect == "fuyu":
            self._check_fuyu()
        if self.rotary_size % 2:
            turned, remedy = ("half of its", "a multiple of 4") if self.dialect == "fuyu" else ("its", "even")
            raise UserError(
                f"decoder.head_size is {self.head_size}, but rotary positions turn {turned} values in pairs: make it "
                f"{remedy}."
            )
        if self.rope_theta <= 1:
            raise UserError(f"decoder.rope_theta is {self.rope_theta}, but must be above 1; 10000 is usual.")
        if self.norm_eps <= 0:
            raise UserError(f"decoder.norm_eps is {self.norm_eps}, but must be above 0; 1e-6 is usual.")
        if self.routing is not None:
            self._check_routing(self.routing)
        if self.grid_embeddings is not None:
            if self.grid_embeddings < 1:
                raise UserError(f"decoder.grid_embeddings is {self.grid_embeddings}, but must be at least 1.")
            if not self.connector.one_per_patch:
                raise UserError(
                    f"decoder.grid_embeddings is set, but the connector {type(self.connector).__name__} gives no "
                    "embedding for each patch that a row and a column could belong to: leave it unset, or take "
                    "another connector."
                )

    def _check_fuyu(self) -> None:
        if self.kv_heads != self.heads:
            raise UserError(
                f"decoder.heads is {self.heads} and decoder.kv_heads is {self.kv_heads}, but in the dialect 'fuyu' "
                f"every head has a key of its own: set kv_heads to {self.heads}, or take the dialect 'qwen3'."
            )
        if self.heads * self.head_size != self.width:
            raise UserError(
                f"decoder.heads x decoder.head_size is {self.heads * self.head_size} and decoder.width is "
                f"{self.width}, but in the dialect 'fuyu' they are the same: change one, or take the dialect 'qwen3'."
            )

    def _check_routing(self, routing: RoutingConfig) -> None:
        blocks = range(self.layers) if routing.blocks is None else routing.blocks
        if outside := [block for block in blocks if not 0 <= block < self.layers]:
            raise UserError(f"routing.blocks holds {outside[0]}, but the blocks are 0 to {self.layers - 1}.")
        if len(self.routed) == self.layers:
            raise UserError(
                f"routing.blocks names all {self.layers} blocks: a token that skips each one is never processed, so "
                "leave at least one dense; every second one is usual."
            )
        if not self.routed:
            raise UserError(
                f"A decoder of {self.layers} blocks has none to route, as the first quarter and the last stay dense: "
                "set decoder.layers to at least 3, or name routing.blocks."
            )
        for name in ("share", "text_share"):
            listed = getattr(routing, name)
            if isinstance(listed, tuple | list) and len(listed) != len(self.routed):
                raise UserError(
                    f"routing.{name} lists {len(listed)} shares for the {len(self.routed)} routed blocks "
                    f"{', '.join(map(str, self.routed))}: give one for each, or a single one for all."
                )

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "FuyuConfig":
        """The inverse of `to_dict`; settings that are missing have their defaults."""
        routing = settings.get("routing")
        connector = settings.get("connector", {"class_path": _class_path(LINEAR), "init_args": {}})
        known = {_class_path(kind): kind for kind in CONNECTORS}
        return cls(
            **settings
            | {
                "routing": None if routing is None else RoutingConfig(**routing),
                "connector": known[connector["class_path"]](**connector["init_args"]),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings in primitives; the connector as recipes name it, by the path of its class."""
        connector = {"class_path": _class_path(self.connector), "init_args": asdict(self)["connector"]}
        return asdict(self) | {"connector": connector}

    @property
    def rotary_size(self) -> int:
        """How many values of a head rotary positions turn, from its first on."""
        return self.head_size // 2 if self.dialect == "fuyu" else self.head_size

    @property
    def routed(self) -> tuple[int, ...]:
        """The routed blocks, in order of depth."""
        if self.routing is None:
            return ()
        if self.routing.blocks is not None:
            return tuple(sorted(set(self.routing.blocks)))
        return tuple(range(self.layers - 2, math.ceil(self.layers / 4) - 1, -2)[::-1])

    def shares(self, block: int) -> RoutedShares:
        """The shares that the routed block number `block` is asked to keep."""
        assert self.routing is not None

        def at_depth(share: Share) -> float:
            return share if isinstance(share, int | float) else share[self.routed.index(block)]

        patches = at_depth(self.routing.share)
        if self.routing.rule == "image_topk":
            return RoutedShares(patches, 1.0)
        return RoutedShares(patches, patches if self.routing.text_share is None else at_depth(self.routing.text_share))

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch: side x side x 3 channels."""
        return self.patch_size**2 * 3


def _class_path(connector: ConnectorConfig | type[ConnectorConfig]) -> str:
    kind = connector if isinstance(connector, type) else type(connector)
    return f"{kind.__module__}.{kind.__qualname__}"


def named_size(name: str) -> FuyuConfig:
    """The decoder of a named size, `1m` to `8b`.

    The vocabulary is 32,768 (`1m`: 2,048, `10m`: 16,384, `8b`: 65,536), a patch 16 pixels (`1m`: 8, `8b`: 30).
    Names give the parameters, embeddings included, to within a fifth.

    Raises:
        UserError: No size has that name.
    """
    sizes = {
        #        layers, width, heads, kv_heads, head_size, feed_forward, vocab_size, patch_size
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
    layers, width, heads, kv_heads, head_size, feed_forward, vocab_size, patch_size = sizes[name]
    return FuyuConfig(
        vocab_size=vocab_size,
        patch_size=patch_size,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        feed_forward=feed_forward,
    )
