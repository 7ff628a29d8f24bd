"""The step is exact whatever its micro-batches, resumes where it stopped, and learns."""

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from fuyu_e2e.checkpoint.loading import load_model
from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.document import Document
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.data.shards.mixture import Source
from fuyu_e2e.errors import UserError
from fuyu_e2e.inference.generation import continue_texts
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.image_layout import FUYU_LAYOUT, ImagePolicy, View
from fuyu_e2e.model.images.linear import LinearConfig
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.training.callbacks.data_report import DataReport
from fuyu_e2e.training.callbacks.ending import Ending
from fuyu_e2e.training.callbacks.signals import Stopped
from fuyu_e2e.training.callbacks.time_limit import TimeLimit
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.optimizers import OptimizerConfig
from fuyu_e2e.training.schedule import Schedule

RandomDocument = Callable[[int], Document]


def trainer(path: Path, **settings: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": path,
    }
    return pl.Trainer(**defaults | settings)


class Rows(Callback):
    """Keeps the keys of every batch trained on."""

    def __init__(self) -> None:
        self.keys: list[tuple[int, ...]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        self.keys.append(batch.document_ids)


def module(config: FuyuConfig, **settings: Any) -> FuyuModule:
    torch.manual_seed(3)
    return FuyuModule(config, **settings)


def test_micro_batches_give_the_gradient_of_the_one_big_batch(
    config: FuyuConfig, builder: SequenceBuilder, random_document: RandomDocument, question_data: Any, tmp_path: Path
) -> None:
    """Two micro-batches with very unequal numbers of supervised tokens, through Lightning's own accumulation."""
    sequences = [builder.build(random_document(seed)) for seed in range(8)]
    few, many, one_row = pack_row(sequences[:2]), pack_row(sequences[2:]), pack_row(sequences)
    expected: list[dict[str, torch.Tensor]] = []
    assert few.targets.numel() * 3 < many.targets.numel()

    def gradients(batches: list) -> dict[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = {}

        class Keep(FuyuModule):
            def configure_gradient_clipping(self, *args: Any, **options: Any) -> None:
                weights = dict(self.decoder.named_parameters())
                kept.update({name: weight.grad.clone() for name, weight in weights.items()})
                with torch.enable_grad():
                    mean = self.decoder.loss(one_row) / one_row.targets.numel()
                expected.append(dict(zip(weights, torch.autograd.grad(mean, list(weights.values())), strict=True)))

        class Fixed(FuyuDataModule):
            def train_dataloader(self) -> Any:
                return torch.utils.data.DataLoader(batches, batch_size=None)

        data_module = question_data()
        data_module.__class__ = Fixed
        torch.manual_seed(3)
        trainer(tmp_path, max_steps=1, accumulate_grad_batches=len(batches)).fit(Keep(config), data_module)
        return kept

    together, apart = gradients([one_row]), gradients([few, many])
    assert expected[0]["lm_head.weight"].abs().sum() > 0
    for name, gradient in expected[0].items():
        torch.testing.assert_close(together[name], gradient, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(apart[name], gradient, atol=1e-6, rtol=1e-4)


def test_eight_real_samples_are_learnt_by_heart_within_200_steps(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path
) -> None:
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))

    learner = module(config, optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.0), schedule=Schedule(warmup=0.05))
    data_module = question_data(budget=512, lanes=1, shuffle=8)
    trainer(tmp_path, max_steps=200, gradient_clip_val=1.0, callbacks=[Losses()]).fit(learner, data_module)
    assert losses[0] > 4
    assert max(losses[-5:]) < 0.05
    prompts = list(data_module.builder.prompts(data_module.documents("train", SampleStats()), SampleStats()))
    texts = continue_texts(learner.decoder.eval(), data_module.tokenizer, prompts, max_new_tokens=8)
    assert texts == [prompt.truth for prompt in prompts]


@pytest.mark.parametrize(
    ("clipping", "expected"),
    [
        ({"gradient_clip_val": 0}, lambda before: before),
        ({"gradient_clip_val": 0.5}, lambda before: before * 0.5 / before.norm()),
        ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, lambda before: before.clamp(-0.01, 0.01)),
    ],
    ids=["none", "norm", "value"],
)
def test_gradients_are_clipped_as_lightning_says(
    config: FuyuConfig,
    question_data: Callable[..., FuyuDataModule],
    tmp_path: Path,
    clipping: dict[str, Any],
    expected: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    seen: list[torch.Tensor] = []

    class Keep(FuyuModule):
        def configure_gradient_clipping(self, *args: Any, **options: Any) -> None:
            for clip in (lambda *_, **__: None, super().configure_gradient_clipping):
                clip(*args, **options)
                seen.append(torch.cat([weight.grad.flatten() for weight in self.decoder.parameters()]))

    torch.manual_seed(3)
    trainer(tmp_path, max_steps=1, **clipping).fit(Keep(config), question_data())
    before, after = seen
    assert before.norm() > 0.5
    assert before.abs().max() > 0.01
    torch.testing.assert_close(after, expected(before))


@pytest.mark.parametrize("clip", [-1.0, float("nan")])
def test_a_clipping_that_would_climb_is_refused(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path, clip: float
) -> None:
    with pytest.raises(UserError, match=r"trainer\.gradient_clip_val is (-1.0|nan), but must be 0"):
        trainer(tmp_path, max_steps=1, gradient_clip_val=clip).fit(FuyuModule(config), question_data())


def test_the_same_batches_are_overfitted_in_each_epoch(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path
) -> None:
    rows, usual = Rows(), Rows()
    saved = tmp_path / "a.ckpt"
    overfit = trainer(tmp_path, max_steps=6, overfit_batches=2, callbacks=[rows])
    overfit.fit(module(config), question_data(budget=64))
    overfit.save_checkpoint(saved)
    assert rows.keys[0] != rows.keys[1]
    assert rows.keys == 3 * rows.keys[:2]
    trainer(tmp_path, max_steps=2, callbacks=[usual]).fit(module(config), question_data(budget=64))
    assert rows.keys[:2] == usual.keys
    with pytest.raises(UserError, match=r"was trained with trainer\.overfit_batches"):
        trainer(tmp_path, max_steps=9).fit(module(config), question_data(budget=64), ckpt_path=saved)


@dataclass(frozen=True)
class Twice(LinearConfig):
    """Two views, each the whole image."""

    def views(self, width: int, height: int, policy: ImagePolicy) -> tuple[View, ...]:
        return 2 * super().views(width, height, policy)


def test_images_are_laid_out_as_the_connector_reads_them(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path
) -> None:
    twice = replace(config, connector=Twice())
    for layout, wanted in ((FUYU_LAYOUT, twice), (Twice(), config)):
        with pytest.raises(UserError, match=r"another way than the decoder's connector.*layout=config\.connector"):
            trainer(tmp_path, max_steps=1).fit(module(wanted), question_data(layout=layout))
    learner = module(twice)
    trainer(tmp_path, max_steps=2).fit(learner, data := question_data(layout=Twice(), budget=256))
    assert data.row is not None
    assert {len(span.grids) for span in data.row.batch.images} == {2}
    assert learner.figures is not None
    assert learner.figures.step == 2


def test_an_endless_stream_is_not_begun_anew_in_each_epoch(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path
) -> None:
    run = trainer(tmp_path, max_steps=4, limit_train_batches=2, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(UserError, match="reload_dataloaders_every_n_epochs would restart the stream"):
        run.fit(module(config), question_data())


ROUTING = RoutingConfig(share=0.4, anneal=0.4, explore=0.2)


@pytest.mark.parametrize(
    ("workers", "accumulate", "routing"), [(0, 1, None), (2, 1, None), (2, 3, None), (0, 3, ROUTING), (2, 1, ROUTING)]
)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    config: FuyuConfig,
    question_data: Callable[..., FuyuDataModule],
    tmp_path: Path,
    workers: int,
    accumulate: int,
    routing: RoutingConfig | None,
) -> None:
    def fit(steps: int, stop_at: int | None = None, ckpt_path: Path | None = None) -> tuple[FuyuModule, list]:
        rows = Rows()
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop_at or 100, save_top_k=-1)
        learner = module(config, optimizer=OptimizerConfig(name="muon"), routing=routing)
        run = trainer(
            tmp_path,
            max_steps=steps,
            accumulate_grad_batches=accumulate,
            enable_checkpointing=True,
            callbacks=[rows, saving],
        )
        run.fit(learner, question_data(workers=workers), ckpt_path=ckpt_path)
        return learner, rows.keys

    whole, all_keys = fit(7, stop_at=3)
    resumed, keys = fit(7, ckpt_path=tmp_path / "step=3.ckpt")
    assert keys == all_keys[3 * accumulate :]
    state = whole.decoder.state_dict()
    for name, weight in state.items():
        assert torch.equal(weight, resumed.decoder.state_dict()[name]), name
    assert whole.tokens_seen == resumed.tokens_seen > 0
    if routing is not None:
        assert state["blocks.1.rule.threshold"].isfinite()
        assert state["blocks.1.rule.history"].sum() > 0


def test_routing_anneals_explores_and_counts_over_micro_batches(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path
) -> None:
    """The share falls from 1; a step's scores are those of all its micro-batches; evaluation changes nothing."""
    shares: list[float] = []
    counted: list[int] = []

    class Watch(Callback):
        def on_train_batch_end(
            self, trainer: pl.Trainer, learner: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            [routed] = learner.row.reports
            shares.append(float(routed.passed.sum() / learner.row.info.valid.sum()))

        def on_before_optimizer_step(self, trainer: pl.Trainer, learner: Any, optimizer: Any) -> None:
            counted.append(int(learner.decoder.blocks[1].rule.counts.sum()))

        def on_validation_start(self, trainer: pl.Trainer, learner: Any) -> None:
            self.before = {name: buffer.clone() for name, buffer in learner.decoder.named_buffers()}

        def on_validation_end(self, trainer: pl.Trainer, learner: Any) -> None:
            assert all(torch.equal(self.before[name], buffer) for name, buffer in learner.decoder.named_buffers())
            assert self.before

    learner = module(config, routing=RoutingConfig(share=0.3, anneal=0.5, explore=0.1))
    data_module = question_data(val=str(tmp_path / "val.tar"))
    run = trainer(
        tmp_path, max_steps=10, accumulate_grad_batches=2, val_check_interval=8, callbacks=[Watch()],
        num_sanity_val_steps=1, check_val_every_n_epoch=None,
    )  # fmt: skip
    run.fit(learner, data_module)
    assert shares[0] == shares[1] == 1
    assert shares[-1] < 0.6
    assert len(counted) == 10
    assert all(100 < count <= 256 for count in counted)


def test_z_loss_holds_the_normaliser_and_is_not_in_the_loss_that_is_shown(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path
) -> None:
    """The first loss is the same with it; after some steps the softmax's normaliser is nearer to 1 than without."""
    shown: dict[float, list[float]] = {0.0: [], 0.1: []}
    log_z: dict[float, float] = {}
    for weight, losses in shown.items():

        class Watch(Callback):
            def on_train_batch_end(
                self, trainer: pl.Trainer, learner: Any, outputs: Any, batch: Any, batch_idx: int
            ) -> None:
                losses.append(float(trainer.callback_metrics["train/loss"]))  # noqa: B023
                with torch.no_grad():
                    _, squares = learner.decoder.loss_and_z(batch, with_z=True)
                log_z[weight] = float(squares / batch.targets.numel())  # noqa: B023

        learner = module(config, optimizer=OptimizerConfig(lr=1e-2), z_loss=weight)
        trainer(tmp_path, max_steps=30, callbacks=[Watch()]).fit(learner, question_data())
    assert shown[0.0][0] == shown[0.1][0]
    assert shown[0.1][-1] < shown[0.1][0]
    assert log_z[0.1] < 0.5 * log_z[0.0]
    with pytest.raises(UserError, match=r"model\.z_loss is -1"):
        FuyuModule(config, z_loss=-1.0)


def test_a_named_size_can_be_routed_and_routing_is_set_once() -> None:
    assert FuyuModule("1m", routing=RoutingConfig(share=0.5)).config.routed == (2,)
    routed = FuyuModule("1m", routing=RoutingConfig(share=0.5)).config
    with pytest.raises(UserError, match="leave one of them out"):
        FuyuModule(routed, routing=RoutingConfig())


def test_a_checkpoint_is_all_it_takes_to_generate(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path
) -> None:
    learner, data_module = module(config), question_data()
    run = trainer(tmp_path, max_steps=2)
    run.fit(learner, data_module)
    run.save_checkpoint(tmp_path / "run" / "last.ckpt")
    for path in (tmp_path / "run", tmp_path / "run" / "last.ckpt"):
        model = load_model(path)
        assert model.step == 2
        assert model.tokenizer.digest == data_module.tokenizer.digest
        assert model.builder.images == data_module.images
        for name, weight in learner.decoder.state_dict().items():
            assert torch.equal(weight, model.decoder.state_dict()[name])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"layers": 2}, "decoder.layers is 2 but 3 there"),
        ({"rope_theta": 5e5}, "decoder.rope_theta is 500000.0 but 10000.0 there"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path, change: dict, sentence: str
) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.fit(module(config), question_data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = FuyuConfig(**{**config.__dict__, **change})
    with pytest.raises(UserError, match=sentence):
        trainer(tmp_path, max_steps=2).fit(module(other), question_data(), ckpt_path=tmp_path / "a.ckpt")


def test_a_run_without_an_end_is_refused(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"trainer\.max_steps is -1, not a number of steps"):
        trainer(tmp_path, max_epochs=1).fit(module(config), question_data())


def test_skipped_samples_are_counted_and_shown(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for number in range(4):
            tar.addfile(tarfile.TarInfo(f"{number}.txt"))
        for extension, content in (("png", b"no picture"), ("txt", b"a caption")):
            member = tarfile.TarInfo(f"broken.{extension}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    report = DataReport()
    data_module = question_data(train=[str(tmp_path / "train.tar"), str(tmp_path / "bad.tar")], lanes=1)
    run = trainer(tmp_path, max_steps=6, log_every_n_steps=1, callbacks=[report, Ending()])
    with caplog.at_level("INFO"):
        run.fit(module(config), data_module)
    stats = report.training()
    assert stats.skipped["text-empty"] >= 4
    assert run.callback_metrics["data/skipped/text-empty"] == stats.skipped["text-empty"]
    assert stats.read == stats.used + stats.skipped.total() + stats.waiting
    assert f"{stats.read} read, {stats.used} used, {stats.skipped.total()} skipped" in caplog.text
    first = [line for line in caplog.text.splitlines() if "skipped first: " in line]
    assert len(first) == 2
    assert [line for line in first if f"{tmp_path / 'bad.tar'}: " not in line] == []
    assert "bad.tar: broken)" in next(line for line in first if "image-unreadable" in line)


def test_shares_of_a_mixture_are_logged_beside_those_asked_for(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "texts.tar", "w") as tar:
        for number in range(8):
            data = f"text {number}".encode()
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    sources = {
        "questions": Source(str(tmp_path / "train.tar"), 3.0),
        "texts": Source(str(tmp_path / "texts.tar"), {0: 1.0, 1_000: 9.0}),
    }
    data_module = question_data(train=None, mixture=sources, lanes=2)
    run = trainer(tmp_path, max_steps=20, log_every_n_steps=1, callbacks=[DataReport()])
    run.fit(module(config), data_module)
    said = {name: float(value) for name, value in run.callback_metrics.items()}
    assert said["data/share_asked/questions"] == pytest.approx(3 / 4.16, abs=0.01)
    assert said["data/share_drawn/questions"] == pytest.approx(0.74, abs=0.06)
    assert said["data/share_drawn/questions"] + said["data/share_drawn/texts"] == pytest.approx(1)
    assert said["data/epoch/texts"] > said["data/epoch/questions"] > 1


def test_what_callbacks_of_an_earlier_run_said_is_forgotten(
    config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path
) -> None:
    """The first run's time is over, the second's never is."""
    mine = module(config)
    with pytest.raises(Stopped):
        trainer(tmp_path, max_steps=3, callbacks=[TimeLimit("00:00:00:00")]).fit(mine, question_data())
    again = trainer(tmp_path, max_steps=3, callbacks=[TimeLimit()])
    again.fit(mine, question_data())
    assert again.global_step == 3


@pytest.mark.parametrize(("options", "type_of_number"), [({}, torch.Tensor), ({"sync_dist": True}, float)])
def test_a_number_stays_on_the_host_unless_ranks_are_to_reduce_it(
    config: FuyuConfig, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], type_of_number: type
) -> None:
    """NCCL reduces what lies on GPUs alone: there Lightning brings a plain number, and leaves a tensor where it is."""
    logged: list[Any] = []
    monkeypatch.setattr(pl.LightningModule, "log", lambda self, name, value, **_: logged.append(value))
    module(config).log("mine", 0.5, **options)
    assert [type(value) for value in logged] == [type_of_number]
