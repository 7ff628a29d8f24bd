"""Connectors and the options after them, against their definitions in float64."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils.flop_counter import FlopCounterMode

from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.errors import UserError
from fuyu_e2e.export.graphs import export_decode_step, export_prefill
from fuyu_e2e.export.transformers import to_transformers
from fuyu_e2e.inference import generation
from fuyu_e2e.inference.cache import KeyValueCache
from fuyu_e2e.inference.depth import token_depth
from fuyu_e2e.inference.depth_map import _images, depth_map
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.config import LINEAR, FuyuConfig, RoutingConfig
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.image_layout import Grid, ImagePolicy, ImageSpan, View, fit_policy
from fuyu_e2e.model.images.connector import Connector, ConnectorConfig
from fuyu_e2e.model.images.linear import LinearConfig
from fuyu_e2e.model.images.mlp import MLPConfig

MakePng = Callable[..., bytes]
SHAPES = [(4, 20), (13, 7), (9, 9), (1, 1)]
"""Pixels of images in one row: 1 x 5, 4 x 2, 3 x 3 and 1 x 1 patches."""


@dataclass(frozen=True)
class MeanConfig(ConnectorConfig):
    """One embedding for each image, of the mean of its patches; a resampler in small."""

    def tokens(self, grids: tuple[Grid, ...]) -> np.ndarray:
        return np.array([False])

    def build(self, config: FuyuConfig) -> "Mean":
        return Mean(config.patch_values, config.width)


class Mean(Connector):
    def __init__(self, patch_values: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(patch_values, width)

    def forward(self, patches: Tensor, *, images: tuple[ImageSpan, ...]) -> Tensor:
        parts = patches.float().split([span.patches for span in images])
        means = [part.mean(dim=0, keepdim=True) for part in parts]
        return self.projection(torch.cat([patches.new_empty(0, patches.shape[1]).float(), *means]) / 255)

    def initialize(self) -> None:
        nn.init.normal_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def sharding(self) -> dict[str, ParallelStyle]:
        return {}

    def flops(self, grids: Sequence[Grid]) -> tuple[int, int]:
        return 0, 0


@dataclass(frozen=True)
class NoTokensConfig(MeanConfig):
    """No embedding at all."""

    def tokens(self, grids: tuple[Grid, ...]) -> np.ndarray:
        return np.empty(0, bool)

    def build(self, config: FuyuConfig) -> "Mean":
        return Nothing(config.patch_values, config.width)


class Nothing(Mean):
    def forward(self, patches: Tensor, *, images: tuple[ImageSpan, ...]) -> Tensor:
        return super().forward(patches, images=images)[:0]


@dataclass(frozen=True)
class FeaturesConfig(NoTokensConfig):
    """Features for blocks to read."""

    gives_features: ClassVar[bool] = True


@dataclass(frozen=True)
class ThumbnailConfig(LinearConfig):
    """The image, and all of it on one patch."""

    one_per_patch: ClassVar[bool] = True

    def views(self, width: int, height: int, policy: ImagePolicy) -> tuple[View, ...]:
        return View(fit_policy(width, height, policy)), View((policy.patch_size, policy.patch_size))


@pytest.fixture
def make(config: FuyuConfig) -> Callable[..., Decoder]:
    """Makes a decoder all of whose weights have something to say."""

    def build(**settings: Any) -> Decoder:
        torch.manual_seed(0)
        decoder = Decoder(replace(config, **settings))
        with torch.no_grad():
            for weight in decoder.parameters():
                weight.add_(torch.randn_like(weight) * 0.2)
        return decoder.eval()

    return build


@pytest.fixture
def several(builder: SequenceBuilder, make_png: MakePng) -> Callable[[ConnectorConfig], PackedBatch]:
    """Makes a row of two documents with images of several sizes, and one of text, as a connector lays them out."""

    def lay_out(connector: ConnectorConfig) -> PackedBatch:
        images = [Image(make_png(*shape, seed=1)) for shape in SHAPES]
        documents = [
            (images[0], Text("7"), images[1]),
            (Text("4072"),),
            (Text("1", loss=False), *images[2:], Text("a")),
        ]
        ours = replace(builder, layout=connector)
        return pack_row([ours.build(Document(str(n), segments)) for n, segments in enumerate(documents)], 100)

    return lay_out


def float64(decoder: Decoder, name: str) -> np.ndarray:
    return decoder.get_parameter(name).detach().double().numpy()


def normalized(batch: PackedBatch) -> np.ndarray:
    return (batch.patches.double().numpy() - 127.5) / 127.5


def linear(decoder: Decoder, batch: PackedBatch) -> np.ndarray:
    weight, bias = (float64(decoder, f"patch_projection.{name}") for name in ("weight", "bias"))
    return normalized(batch) @ weight.T + bias


def mlp(decoder: Decoder, batch: PackedBatch) -> np.ndarray:
    up, up_bias, down, down_bias = (
        float64(decoder, f"patch_projection.{layer}.{name}")
        for layer in ("up_proj", "down_proj")
        for name in ("weight", "bias")
    )
    hidden = normalized(batch) @ up.T + up_bias
    gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return gelu @ down.T + down_bias


@pytest.mark.parametrize(
    ("connector", "definition"), [(LINEAR, linear), (MLPConfig(), mlp), (MLPConfig(hidden=20), mlp)]
)
def test_a_connector_is_its_definition(
    make: Callable[..., Decoder],
    several: Callable[..., PackedBatch],
    connector: ConnectorConfig,
    definition: Callable[..., np.ndarray],
) -> None:
    decoder, batch = make(connector=connector), several(connector)
    expected = definition(decoder, batch)
    assert expected.std() > 0.5
    with torch.no_grad():
        given = decoder.embed_images(batch.patches, batch.images).embeddings
    np.testing.assert_allclose(given.numpy(), expected, atol=1e-5, rtol=1e-5)


def test_the_norm_is_its_definition(make: Callable[..., Decoder], several: Callable[..., PackedBatch]) -> None:
    decoder, batch = make(image_norm=True), several(LINEAR)
    raw = linear(decoder, batch)
    eps = decoder.config.norm_eps
    expected = raw / np.sqrt((raw**2).mean(axis=1, keepdims=True) + eps) * float64(decoder, "image_norm.weight")
    with torch.no_grad():
        given = decoder.embed_images(batch.patches, batch.images).embeddings
    np.testing.assert_allclose(given.numpy(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("connector", [LINEAR, MLPConfig(), ThumbnailConfig()])
def test_each_patch_has_the_embeddings_of_its_own_row_and_column(
    make: Callable[..., Decoder], several: Callable[..., PackedBatch], connector: ConnectorConfig
) -> None:
    decoder, batch = make(connector=connector, grid_embeddings=5), several(connector)
    without = make(connector=connector)
    without.load_state_dict(
        {name: tensor for name, tensor in decoder.state_dict().items() if not name.startswith("grid_embeddings")}
    )
    rows, columns = (float64(decoder, f"grid_embeddings.{name}") for name in ("rows", "columns"))
    added = np.zeros((len(batch.tokens), decoder.config.width))
    for span in batch.images:
        place = span.start
        for height, width in span.grids:
            for row in range(height):
                for column in range(width):
                    added[place] = rows[row] + columns[column]
                    place += 1
                place += 1  # its newline
        assert place == span.stop
    assert len(batch.images) == 4
    tokens = [batch.tokens, batch.patches, batch.patch_positions, batch.images]
    with torch.no_grad():
        inputs = generation.Inputs(*tokens)
        embedded = [one.embed(inputs, one.embed_images(*tokens[1::2])) for one in (decoder, without)]
        given = embedded[0] - embedded[1]
    np.testing.assert_allclose(given.numpy(), added, atol=1e-5, rtol=1e-5)


def test_a_new_model_with_grid_embeddings_is_the_one_without(
    config: FuyuConfig, several: Callable[..., PackedBatch]
) -> None:
    decoders = []
    for grid_embeddings in (None, 8):
        torch.manual_seed(0)
        decoders.append(Decoder(replace(config, grid_embeddings=grid_embeddings)))
    weights = decoders[0].state_dict()
    assert all(torch.equal(weights[name], decoders[1].state_dict()[name]) for name in weights)
    batch = several(LINEAR)
    assert torch.equal(decoders[0].logits(batch), decoders[1].logits(batch))


@pytest.mark.parametrize("connector", [LINEAR, MLPConfig(hidden=20), MeanConfig()])
def test_a_row_of_text_gives_all_that_images_pass_a_gradient(
    make: Callable[..., Decoder], builder: SequenceBuilder, connector: ConnectorConfig
) -> None:
    """Else a rank with text alone would wait for ever for the others, or they for it."""
    grids = 8 if connector.one_per_patch else None
    decoder = make(connector=connector, image_norm=True, grid_embeddings=grids)
    batch = pack_row([builder.build(Document("text", (Text("4072"),)))])
    decoder.loss(batch).backward()
    named = ("patch_projection", "image_norm", "grid_embeddings")
    gradients = {name: weight.grad for name, weight in decoder.named_parameters() if name.startswith(named)}
    assert len(gradients) >= 3
    assert all(gradient is not None and (gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("connector", [MLPConfig(), MLPConfig(hidden=20)])
def test_every_weight_of_a_new_connector_and_its_options_can_learn(
    config: FuyuConfig, several: Callable[..., PackedBatch], connector: ConnectorConfig
) -> None:
    torch.manual_seed(0)
    decoder = Decoder(replace(config, connector=connector, image_norm=True, grid_embeddings=5))
    batch = several(connector)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        decoder.loss(batch).backward()
        optimizer.step()
    assert not [name for name, weight in decoder.named_parameters() if not weight.grad.abs().sum() > 0]


@torch.no_grad()
def test_new_connectors_give_embeddings_of_one_scale(config: FuyuConfig, several: Callable[..., PackedBatch]) -> None:
    torch.manual_seed(0)
    batch = several(LINEAR)
    usual, *others = (
        connector.build(config) for connector in (LINEAR, MLPConfig(), MLPConfig(hidden=20), MLPConfig(hidden=200))
    )
    for connector in (usual, *others):
        connector.initialize()
    scale = usual(batch.patches, images=batch.images).std()
    for connector in others:
        assert connector(batch.patches, images=batch.images).std() / scale == pytest.approx(1, abs=0.2)


SEVERAL_KINDS = [
    {"image_norm": True, "grid_embeddings": 5},
    {"connector": MLPConfig(), "grid_embeddings": 5},
    {"connector": ThumbnailConfig(), "grid_embeddings": 5},
    {"connector": MeanConfig(), "image_norm": True},
    {"connector": NoTokensConfig()},
]


@torch.no_grad()
@pytest.mark.parametrize("settings", SEVERAL_KINDS)
def test_a_prompt_read_in_pieces_is_the_prompt_read_at_once(
    make: Callable[..., Decoder],
    several: Callable[..., PackedBatch],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    """Pieces of seven tokens go through the middle of images."""
    monkeypatch.setitem(generation.PREFILL_TOKENS, "cpu", 7)
    decoder = make(**settings)
    batch = several(decoder.config.connector)
    cache = KeyValueCache(decoder, 3, 64)
    lasts = generation.prefill(decoder, batch, cache)
    ends = torch.tensor(batch.document_lengths).cumsum(0) - 1
    torch.testing.assert_close(decoder.lm_head(lasts), decoder.logits(batch)[ends], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ["threshold", "image_topk"])
@pytest.mark.parametrize("connector", [MeanConfig(), NoTokensConfig(), ThumbnailConfig()])
def test_routed_blocks_see_the_tokens_of_images_not_their_patches(
    make: Callable[..., Decoder], several: Callable[..., PackedBatch], connector: ConnectorConfig, rule: str
) -> None:
    decoder = make(connector=connector, routing=RoutingConfig(rule=rule, share=0.5, blocks=(1,)))
    batch = several(connector)
    row = decoder.train().row(batch)
    assert sum(row.info.image_lengths_host) == len(batch.patch_positions) == len(row.info.patch_image)
    assert decoder.loss(batch, row).isfinite()


@pytest.mark.parametrize(
    ("connector", "drawn"), [(LINEAR, 4), (ThumbnailConfig(), 8), (MeanConfig(), 0), (NoTokensConfig(), 0)]
)
def test_a_depth_map_shows_views_whose_patches_have_tokens_of_their_own(
    make: Callable[..., Decoder], builder: SequenceBuilder, make_png: MakePng, connector: ConnectorConfig, drawn: int
) -> None:
    decoder = make(connector=connector, routing=RoutingConfig(share=0.5, blocks=(1,)))
    images = [Image(make_png(*shape)) for shape in SHAPES]
    prompt = replace(builder, layout=connector).prompt(Document("key", (*images, Text("7", loss=False))))
    depth = token_depth(decoder, prompt, [])
    panels = _images(depth)
    assert len(panels) == drawn
    shares = np.concatenate([np.empty(0), *(panel.ravel() for _, panel in panels)])
    assert (shares == depth.counts.numpy()[prompt.patch_positions][: len(shares)]).all()
    for pixels, panel in panels:
        assert (panel.shape[0] * 4, panel.shape[1] * 4) == pixels.shape[:2]
    assert depth_map(depth, builder.tokenizer).height > 0


@pytest.mark.parametrize("connector", [LINEAR, MLPConfig(), MLPConfig(hidden=20)])
def test_operations_agree_with_torchs_counter(config: FuyuConfig, connector: ConnectorConfig) -> None:
    module, grids = connector.build(config), [(3, 4), (1, 1)]
    images = tuple(ImageSpan.of_grid(0, *grid) for grid in grids)
    patches = torch.zeros(13, config.patch_values, dtype=torch.uint8)
    with FlopCounterMode(display=False) as forward:
        embeddings = module(patches, images=images)
    with FlopCounterMode(display=False) as backward:
        embeddings.sum().backward()
    total = forward.get_total_flops() + backward.get_total_flops()
    flops = module.flops(grids)
    assert (flops.forward, flops.training) == (forward.get_total_flops(), total)


@pytest.mark.parametrize("connector", [LINEAR, MLPConfig(), MLPConfig(hidden=20)])
def test_settings_survive_as_primitives(config: FuyuConfig, connector: ConnectorConfig) -> None:
    whole = replace(config, connector=connector, image_norm=True, grid_embeddings=5)
    assert FuyuConfig.from_dict(whole.to_dict()) == whole
    before = {name: value for name, value in config.to_dict().items() if name in ("routing", *vars(config))}
    for name in ("connector", "image_norm", "grid_embeddings"):
        del before[name]
    assert FuyuConfig.from_dict(before) == config, "a checkpoint from before there were connectors"


def test_an_image_larger_than_the_grid_embeddings_is_refused(
    make: Callable[..., Decoder], several: Callable[..., PackedBatch]
) -> None:
    decoder, batch = make(grid_embeddings=4), several(LINEAR)
    said = r"1 x 5 patches, but decoder\.grid_embeddings is 4.*set it to at least 5, or data\.max_size"
    with pytest.raises(UserError, match=said):
        decoder.loss(batch)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"grid_embeddings": 0}, r"decoder\.grid_embeddings is 0, but must be at least 1"),
        (
            {"grid_embeddings": 4, "connector": MeanConfig()},
            "the connector MeanConfig gives no embedding",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(config: FuyuConfig, settings: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(config, **settings)


def test_a_hidden_size_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"decoder\.connector\.hidden is 0, but must be at least 1"):
        MLPConfig(hidden=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"connector": MLPConfig()}, r"decoder\.connector MLPConfig"),
        ({"connector": ThumbnailConfig()}, r"decoder\.connector ThumbnailConfig"),
        ({"image_norm": True}, r"decoder\.image_norm True"),
        ({"grid_embeddings": 4}, r"decoder\.grid_embeddings 4"),
    ],
)
def test_what_transformers_has_no_place_for_is_not_exported(
    make: Callable[..., Decoder], settings: dict, said: str
) -> None:
    decoder = make(**settings)
    with pytest.raises(UserError, match=f"A decoder with {said}.* can't be exported as transformers'"):
        to_transformers(decoder.state_dict(), decoder.config)


def test_a_graph_of_fixed_shapes_reads_no_grids(make: Callable[..., Decoder]) -> None:
    export = partial(export_prefill, tokens=20, patches=6, capacity=30)
    for settings in ({"grid_embeddings": 4}, {"connector": MeanConfig()}):
        with pytest.raises(UserError, match="no graph of fixed shapes"):
            export(make(**settings))
    assert export(make(connector=MLPConfig(), image_norm=True)) is not None
    with pytest.raises(UserError, match="the connector FeaturesConfig has no graph of fixed shapes"):
        export_decode_step(make(connector=FeaturesConfig()), sequences=1, capacity=30)
