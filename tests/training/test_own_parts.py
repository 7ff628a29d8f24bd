"""Connectors, blocks and masks of a user's own: one file each, plugged in by a recipe.

The files are those of `tests/own_parts`, which nothing of the package knows.
"""

import sys
import tarfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fuyu_e2e.checkpoint.loading import TrainedModel, load_model
from fuyu_e2e.cli.main import main
from fuyu_e2e.data.document import Document
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.inference import generation
from fuyu_e2e.model.attention.interface import Passing, RowAttention, reference_attention
from fuyu_e2e.model.cost import cost
from fuyu_e2e.training.settings.recipe import FuyuCLI

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
FOLDER = Path(__file__).parents[1] / "own_parts"
PARTS = {
    "pooled": {"connector": '{"class_path": "pooled.PooledConfig", "init_args": {"side": 3}}'},
    "parallel": {"blocks": '[{"class_path": "parallel.ParallelConfig", "init_args": {"scale": 0.5}}]'},
    "chunked": {"masks": '[{"class_path": "chunked.Chunked", "init_args": {"window": 7}}, {"window": null}]'},
    "crossing": {
        "connector": "crossing.FeaturesConfig",
        "blocks": '[{"class_path": "crossing.CrossingConfig"}, {"class_path": "DenseConfig"}]',
    },
}


@pytest.fixture(autouse=True)
def _found_by_python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in PARTS:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def shards(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, make_png: Callable[..., bytes]
) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("shards")
    tokenizer.save(folder / "tokenizer.model")
    with tarfile.open(folder / "train.tar", "w") as tar:
        for number in range(12):
            picture = make_png(5 + 7 * (number % 5), 9 + 11 * (number % 3), seed=number)
            for ending, data in (("png", picture), ("txt", f"a square {number}".encode())):
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    return (f"--data.tokenizer={folder}/tokenizer.model", f"--data.train={folder}/train.tar")


def fit(shards: tuple[str, ...], run: Path, part: str, steps: int, *more: str) -> FuyuCLI:
    settings = {
        "trainer.max_steps": steps, "trainer.default_root_dir": run, "trainer.enable_progress_bar": "false",
        "trainer.accelerator": "cpu", "checkpoint.every_n_train_steps": 2, "data.lanes": 2, "data.budget": 96,
        "model.decoder.layers": 2, "model.decoder.width": 48, "model.decoder.heads": 3, "model.decoder.kv_heads": 3,
        "model.decoder.head_size": 16, "model.decoder.feed_forward": 64, "model.optimizer.muon_lr": 0.1,
        **{f"model.decoder.{name}": value for name, value in PARTS[part].items()},
    }  # fmt: skip
    recipe = f"--config={shipped('recipes/quickstart.yaml')}"
    args = [f"--{name}={value}" for name, value in settings.items()]
    return FuyuCLI(["fit", recipe, *shards, *args, "--allow-imports", part, *more])


@pytest.fixture(params=PARTS)
def trained(request: pytest.FixtureRequest, tmp_path: Path, shards: tuple[str, ...]) -> tuple[str, TrainedModel, Path]:
    run = tmp_path / "run"
    fit(shards, run, request.param, steps=4)
    return request.param, load_model(run), run


@torch.no_grad()
def test_a_part_of_ones_own_trains_and_generates(
    trained: tuple[str, TrainedModel, Path],
    random_document: Callable[[int], Document],
    make_png: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its cache gives the uncached forward, also of prompts in pieces; commands find it; stock export refuses."""
    part, model, run = trained
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
    picture = run / "picture.png"
    picture.write_bytes(make_png(20, 30))
    args = ["generate", "--checkpoint", str(run), "--image", str(picture), "--prompt", "a"]
    monkeypatch.setattr(sys, "argv", ["fuyu-e2e", *args, "--allow-imports", part])
    assert main() == 0
    monkeypatch.setattr(
        sys, "argv", ["fuyu-e2e", "export", "--checkpoint", str(run), "--to", "transformers", "--out", f"{run}/stock"]
    )
    capsys.readouterr()
    assert main() != 0
    assert "can't be exported as transformers' FuyuForCausalLM" in capsys.readouterr().err


@pytest.mark.parametrize("part", PARTS)
def test_it_goes_on_as_if_it_had_not_stopped(part: str, tmp_path: Path, shards: tuple[str, ...]) -> None:
    whole = fit(shards, tmp_path / "whole", part, steps=4)
    fit(shards, tmp_path / "parts", part, 4)
    first = sorted((tmp_path / "parts" / "checkpoints").iterdir())[0]
    again = fit(shards, tmp_path / "parts", part, 4, f"--ckpt_path={first}")
    for name, weight in whole.model.decoder.state_dict().items():
        assert torch.equal(again.model.decoder.state_dict()[name], weight), name


def test_a_checkpoint_imports_nothing_by_itself(
    trained: tuple[str, TrainedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    part, _, run = trained
    sys.modules.pop(part)
    with pytest.raises(UserError, match=rf"made with {part}\.\w+, which is not imported: say --allow-imports {part} "):
        load_model(run)
    assert part not in sys.modules


class Whole(RowAttention):
    """Attention of one document in products that torch's counter counts in full."""

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return reference_attention(queries, keys, values, (len(queries),))

    def select(self, passing: Passing) -> Any: ...

    def cross(self, passing: Passing) -> Any: ...


@torch.no_grad()
def test_its_operations_are_counted(
    trained: tuple[str, TrainedModel, Path], random_document: Callable[[int], Document]
) -> None:
    part, model, _ = trained
    batch = pack_row([model.builder.build(random_document(2))])
    config, length = model.decoder.config, len(batch.tokens)
    counted = cost(config, document_lengths=batch.document_lengths, grids=batch.grids, targets=len(batch.targets))
    row = model.decoder.row_of(
        batch.positions, [Whole()] * config.layers, read_images=model.decoder.read_images(batch)
    )
    with FlopCounterMode(display=False) as counter:
        model.decoder.loss(batch, row)
    measured = counter.get_total_flops()
    if part == "chunked":  # every second block sees 7 keys at most, and this attention computes all
        hidden = 4 * length * (length - 7) * config.heads * config.head_size
        measured -= hidden * len([mask for mask in config.block_masks if mask.window])
    assert counted.forward_flops == measured
    assert counted.parameters == sum(weight.numel() for weight in model.decoder.parameters())
