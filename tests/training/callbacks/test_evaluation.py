"""A run that evaluates as it goes is the run that doesn't, and leaves curves and pictures of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.modules.module import register_module_forward_hook

from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.errors import UserError
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.training import module
from fuyu_e2e.training.callbacks import evaluation as during_training
from fuyu_e2e.training.callbacks import routing_report
from fuyu_e2e.training.callbacks.evaluation import EvaluationInTraining
from fuyu_e2e.training.callbacks.random_state import RandomState
from fuyu_e2e.training.callbacks.routing_report import RoutingReport
from fuyu_e2e.training.callbacks.samples import SampleGenerations
from fuyu_e2e.training.module import FuyuModule


@pytest.fixture
def task(tmp_path: Path, write_shard: Callable[..., None], make_png: Callable[..., bytes]) -> str:
    """A task of eight questions about four pictures, one of them unreadable."""
    samples = []
    for number in range(8):
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": str(number)}]
        described = {"conversations": turns, "image": f"i{number // 2}", "groups": {"kind": "ab"[number % 2]}}
        samples.append((described, b"bad" if number == 7 else make_png(8, 8, seed=number // 2)))
    write_shard(tmp_path / "asked.tar", samples)
    (tmp_path / "mine.yaml").write_text(
        "format: shards\ndata: {shards: asked.tar}\nmetrics: [accuracy, character_error_rate]\ngroups: [kind]\n"
        "max_new_tokens: 4\n"
    )
    return str(tmp_path / "mine.yaml")


@pytest.fixture
def fit(config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path) -> Callable[..., Any]:
    """Trains four steps of two micro-batches; gives the weights, and what was drawn at random after them."""

    def fit(
        *callbacks: pl.Callback, routed: bool = False, val: str | None = None, **settings: Any
    ) -> tuple[dict[str, torch.Tensor], tuple[float, float], bool]:
        torch.manual_seed(3)
        np.random.seed(3)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=4,
            accumulate_grad_batches=2,
            logger=TensorBoardLogger(tmp_path / "curves", name="", version=""),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[RandomState(), *callbacks],
            **settings,
        )
        trained = FuyuModule(config, routing=RoutingConfig(blocks=(1,)) if routed else None)
        trainer.fit(trained, question_data(val=val))
        weights = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
        return weights, (float(torch.rand(())), float(np.random.rand())), trained.decoder.training

    return fit


@pytest.mark.parametrize("routed", [False, True])
def test_training_is_bitwise_as_without(fit: Callable[..., Any], task: str, routed: bool) -> None:
    without, with_it = fit(routed=routed), fit(EvaluationInTraining((task,), every_n_steps=2, limit=8), routed=routed)
    assert without[0].keys() == with_it[0].keys()
    assert all(torch.equal(tensor, with_it[0][name]) for name, tensor in without[0].items())
    assert without[1:] == with_it[1:]


def test_samples_answers_and_depth_are_computed_in_the_precision_of_the_run(
    fit: Callable[..., Any], task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, set[torch.dtype]] = {"samples": set(), "answers": set(), "depth": set()}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            hook = register_module_forward_hook(
                lambda layer, _, output: found[name].add(output.dtype) if isinstance(layer, torch.nn.Linear) else None
            )
            with hook:
                return function(*arguments, **settings)

        return call

    monkeypatch.setattr(module, "continue_texts", watched("samples", module.continue_texts))
    monkeypatch.setattr(during_training, "evaluate", watched("answers", during_training.evaluate))
    monkeypatch.setattr(routing_report, "token_depth", watched("depth", routing_report.token_depth))
    evaluation = EvaluationInTraining((task,), every_n_steps=4, limit=2)
    settings = {"precision": "bf16-mixed", "val_check_interval": 8, "check_val_every_n_epoch": None}
    fit(evaluation, SampleGenerations(1), RoutingReport(1, 2), routed=True, val=str(tmp_path / "val.tar"), **settings)
    assert found == {name: {torch.bfloat16} for name in ("samples", "answers", "depth")}


def test_figures_and_pictures_are_logged_at_their_steps(fit: Callable[..., Any], task: str, tmp_path: Path) -> None:
    fit(EvaluationInTraining((task,), every_n_steps=2, limit=8))
    curves = EventAccumulator(str(tmp_path / "curves")).Reload()
    for name in ("", "/kind/a", "/kind/b", "/without_image", "/other_image"):
        assert [event.step for event in curves.Scalars(f"eval/mine/accuracy{name}")] == [1, 3], name
    assert curves.Scalars("eval/mine/character_error_rate")[-1].value > 0
    assert [event.value for event in curves.Scalars("eval/mine/unusable")] == [1, 1]
    assert [event.step for event in curves.Images("eval/mine/wrong")] == [1, 3]


@pytest.mark.parametrize("setting", ["every_n_steps", "limit", "batch_tokens"])
def test_wrong_settings_are_refused_by_name(setting: str) -> None:
    with pytest.raises(UserError, match=f"evaluate.{setting}"):
        EvaluationInTraining(**{setting: 0})


def test_a_missing_task_ends_the_run_before_it_begins(fit: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="no-such-task"):
        fit(EvaluationInTraining(("no-such-task",)))


def test_a_task_without_a_question_ends_the_run_before_it_begins(
    fit: Callable[..., Any], task: str, tmp_path: Path, write_shard: Callable[..., None]
) -> None:
    write_shard(tmp_path / "asked.tar", [({"conversations": []}, b"")])
    with pytest.raises(UserError, match="chat-turns 1"):
        fit(EvaluationInTraining((task,)))
