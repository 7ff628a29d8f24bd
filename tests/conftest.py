"""What most tests need: a tokenizer trained in process, small decoders, and random sequences."""

import os

# Two processes that run tests side by side, of two threads each, would wait for each other; so would what they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

from fuyu_e2e.training.settings.environment import set_defaults

set_defaults()  # before torch is loaded

import copy
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers
from PIL import Image as Pillow
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from fuyu_e2e.checkpoint.loading import TrainedModel
from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.progress_bar import ProgressBar
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.data.tokenizer import Tokenizer, train_tokenizer
from fuyu_e2e.eval import checkpoint_scores
from fuyu_e2e.inference import device, generation
from fuyu_e2e.model.attention.interface import Passing, RowAttention, reference_attention
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.cost import cost
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.image_layout import ImagePolicy
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.model.row import TrainingProgress

# The usual run draws the same examples each time, on any machine; `--hypothesis-profile=explore` looks for new ones.
# A test that needs fewer takes a part of `settings.default.max_examples`. How fast an example is decides nothing.
settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    max_examples=35,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile(
    "explore",
    settings.get_profile("suite"),
    derandomize=False,
    max_examples=50 * settings.get_profile("suite").max_examples,
    print_blob=True,
)
settings.load_profile("suite")  # as conftest.py is read; pytest's own option comes later

VOCAB_SIZE = 320
PATCH_SIZE = 4

LONG = ("training", "test_cli.py", "export", "inference", "bench", "checkpoint", "shards")
"""Where the tests lie that take longest."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, or in the end one worker would wait for the other's."""
    order = {name: number for number, name in enumerate(LONG)}
    tests = Path(__file__).parent
    items.sort(key=lambda item: order.get(item.path.relative_to(tests).parts[0], len(LONG)))


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    """Two, unless the environment asks for fewer: beside other work, two threads wait for each other."""
    torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", "2"))))


@pytest.fixture(autouse=True, scope="session")
def _same_examples_whatever_was_imported() -> Iterator[None]:
    """Hypothesis mixes in the constants of all local modules loaded so far, which differ with the tests run before."""
    with pytest.MonkeyPatch.context() as patch:
        if settings.default.derandomize:
            patch.setattr(providers, "_get_local_constants", providers.Constants)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["Read the digits.", "What is it?", "a red square", "4072", "19 8 3"] * 10, VOCAB_SIZE)


@pytest.fixture(scope="session")
def builder(tokenizer: Tokenizer) -> SequenceBuilder:
    return SequenceBuilder(tokenizer, ImagePolicy(patch_size=PATCH_SIZE))


@pytest.fixture(scope="session")
def config() -> FuyuConfig:
    return FuyuConfig(
        vocab_size=VOCAB_SIZE,
        patch_size=PATCH_SIZE,
        layers=3,
        width=48,
        heads=4,
        kv_heads=2,
        head_size=12,
        feed_forward=80,
    )


@pytest.fixture(scope="session")
def decoder(config: FuyuConfig) -> Decoder:
    """A decoder whose blocks have something to say, unlike a new one's."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return decoder.eval()


@pytest.fixture(scope="session")
def routed_decoder(
    config: FuyuConfig, builder: SequenceBuilder, random_document: Callable[[int], Document]
) -> Callable[..., Decoder]:
    """Makes a decoder of five blocks of which two are routed, with random weights and settled thresholds."""
    made: dict[str, Decoder] = {}
    rows = [pack_row([builder.build(random_document(seed)) for seed in range(s, s + 50)]) for s in (100, 150)]

    def make(**routing: Any) -> Decoder:
        if (name := repr(routing)) not in made:
            torch.manual_seed(0)
            decoder = Decoder(replace(config, layers=5, routing=RoutingConfig(**{"blocks": (1, 3)} | routing)))
            with torch.no_grad():
                for name_, weight in decoder.named_parameters():
                    weight.add_(torch.randn_like(weight) * (0.05 if ".rule." in name_ else 0.2))
            for _ in range(2):  # the later block's scores settle once the earlier one's threshold has
                for name_, buffer in decoder.named_buffers():
                    if name_.endswith(".history"):
                        buffer.zero_()
                for batch in rows:
                    row = decoder.eval().row(batch)
                    decoder.logits(batch, row)
                    decoder.observe(row)
                decoder.end_step(TrainingProgress(), lambda counts: counts)
            made[name] = decoder
        return copy.deepcopy(made[name]).eval()

    return make


def png(height: int, width: int, seed: int = 0) -> bytes:
    """An encoded image of random pixels."""
    return encoded(np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, 3), np.uint8))


def encoded(pixels: np.ndarray) -> bytes:
    """Pixels as a PNG file."""
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def encode_png() -> Callable[[np.ndarray], bytes]:
    return encoded


@pytest.fixture(scope="session")
def make_png() -> Callable[..., bytes]:
    return png


@pytest.fixture(scope="session")
def random_document() -> Callable[[int], Document]:
    """Makes the document of a seed: text, an image, several images, questions and answers, extreme shapes."""

    def make(seed: int) -> Document:
        rng = np.random.default_rng(seed)

        def image() -> Image:
            shape = [(1, 1), (1, 97), (90, 1), (13, 7), (8, 8), (5, 40), (33, 18)][rng.integers(7)]
            return Image(png(*shape, seed=seed))

        def text(loss: bool) -> Text:
            return Text("".join(rng.choice(list("abc 0123?é"), rng.integers(1, 30))), loss)

        kinds = {
            "text": [text(True)],
            "caption": [image(), text(True)],
            "question": [image(), text(False), text(True)],
            "chat": [image(), text(False), text(True), text(False), text(True)],
            "interleaved": [text(True), image(), text(True), image(), image(), text(True)],
        }
        return Document(f"doc{seed}", tuple(list(kinds.values())[seed % len(kinds)]))

    return make


@pytest.fixture
def question_data(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., FuyuDataModule]:
    """Makes a data module over a shard of question/answer samples; `val.tar` beside it holds others."""
    tokenizer.save(tmp_path / "tokenizer.model")
    for name, numbers in (("train.tar", range(8)), ("val.tar", range(8, 16))):
        with tarfile.open(tmp_path / name, "w") as tar:
            for number in numbers:
                asked = {"from": "human", "value": "<image>\nWhat is it?"}
                turns = [asked, {"from": "gpt", "value": f"{number * 37}"}]
                members = {
                    "png": png(8 + number % 8, 20, seed=number),
                    "json": json.dumps({"conversations": turns}).encode(),
                }
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{number}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))

    def make(**changed: Any) -> FuyuDataModule:
        settings = {"budget": 128, "lanes": 2, "shuffle": 4, "train": str(tmp_path / "train.tar")} | changed
        return FuyuDataModule(str(tmp_path / "tokenizer.model"), 4, **settings)

    return make


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float | None, float]]:
    """What each piece of long work said there was to do, and how much of it was counted as done."""
    found: dict[str, tuple[float | None, float]] = {}
    original = ProgressBar.__exit__

    def end(self: ProgressBar, *error: object) -> None:
        original(self, *error)  # type: ignore[arg-type]
        found[self.title] = (self.total, self.done)

    monkeypatch.setattr(ProgressBar, "__exit__", end)
    return found


@pytest.fixture
def in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[torch.dtype]]:
    """Lets commands take the CPU for a device that multiplies in bfloat16; gives the types of what layers give."""
    monkeypatch.setattr(device, "product_type", lambda _: torch.bfloat16)
    monkeypatch.setattr(checkpoint_scores, "product_type", lambda _: torch.bfloat16)
    found: set[torch.dtype] = set()
    with register_module_forward_hook(
        lambda layer, _, output: found.add(output.dtype) if isinstance(layer, torch.nn.Linear) else None
    ):
        yield found


class WholeDocument(RowAttention):
    """Attention of one document in products that torch's counter counts in full."""

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return reference_attention(queries, keys, values, (len(queries),))

    def select(self, passing: Passing) -> Any: ...

    def cross(self, passing: Passing) -> Any: ...


@pytest.fixture
def check_cached_generation(
    random_document: Callable[[int], Document], monkeypatch: pytest.MonkeyPatch
) -> Callable[[TrainedModel], None]:
    """Checks that a model's cache gives the uncached forward, also of prompts in pieces."""

    @torch.no_grad()
    def check(model: TrainedModel) -> None:
        prompts = [model.builder.prompt(random_document(seed).prompt) for seed in range(8)]
        for piece in (2_048, 5):
            monkeypatch.setitem(generation.PREFILL_TOKENS, "cpu", piece)
            together = generation.generate(model.decoder, prompts, max_new_tokens=12, eos_id=-1)
            for prompt, written in zip(prompts, together, strict=True):
                longer = type(prompt)(
                    key=prompt.key,
                    tokens=torch.tensor([*prompt.tokens.tolist(), *written]).numpy(),
                    loss=torch.ones(len(prompt) + len(written), dtype=torch.bool).numpy(),
                    patches=prompt.patches,
                    images=prompt.images,
                )
                logits = model.decoder.logits(pack_row([longer]))
                assert logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == written

    return check


@pytest.fixture
def check_operations(random_document: Callable[[int], Document]) -> Callable[[TrainedModel], None]:
    """Checks that what a model says that it computes, and how many weights it has, is what torch counts."""

    @torch.no_grad()
    def check(model: TrainedModel) -> None:
        batch = pack_row([model.builder.build(random_document(2))])
        config, length = model.decoder.config, len(batch.tokens)
        counted = cost(config, document_lengths=batch.document_lengths, grids=batch.grids, targets=len(batch.targets))
        read = model.decoder.visible_image(batch)
        row = model.decoder.row_of(batch.positions, [WholeDocument()] * config.layers, visible_image=read)
        with FlopCounterMode(display=False) as counter:
            model.decoder.loss(batch, row)
        # A block with a window sees fewer keys, and this attention computes all.
        unseen = sum(length - mask.keys_per_query(length) for mask in config.block_masks)
        unseen_flops = 4 * length * unseen * config.heads * config.head_size
        assert counted.forward_flops == counter.get_total_flops() - unseen_flops
        assert counted.parameters == sum(weight.numel() for weight in model.decoder.parameters())

    return check


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parent.parent


@pytest.fixture(scope="session")
def write_shard(make_png: Callable[..., bytes]) -> Callable[..., None]:
    """Writes a shard of samples: JSON, and a picture by number, or the bytes of one."""

    def write(path: Path, samples: list[tuple[dict[str, Any], bytes]]) -> None:
        with tarfile.open(path, "w") as tar:
            for number, (described, picture) in enumerate(samples):
                for extension, content in (("png", picture), ("json", json.dumps(described).encode())):
                    info = tarfile.TarInfo(f"{number:04}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))

    return write
