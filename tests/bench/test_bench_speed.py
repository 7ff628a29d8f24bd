"""The benchmarks of speed compare the same work, and figure rightly with times and bytes."""

import json
import subprocess
from collections import Counter
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import fuyu_e2e.bench.limit as bench_limit
import fuyu_e2e.bench.profile_parts as bench_parts
import fuyu_e2e.bench.scale as bench_scale
import fuyu_e2e.bench.train as bench_train
from fuyu_e2e.bench.decoders import new_decoder
from fuyu_e2e.bench.documents import EOS, NEWLINE, PATCH, histogram, mixture
from fuyu_e2e.bench.own_process import peak_memory
from fuyu_e2e.bench.profile_parts import PARTS
from fuyu_e2e.bench.scale import Point, Step
from fuyu_e2e.bench.stock import NO_LOSS, grouped_by_length, stock_training_batch
from fuyu_e2e.bench.train import CASES, CONTENDERS, build
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.errors import UserError
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.cost import cost, decode_step_flops
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.training.optimizers import MuonAdamW

TINY = FuyuConfig(vocab_size=64, patch_size=4, layers=2, width=32, heads=2, kv_heads=1, head_size=16, feed_forward=64)
CASE = replace(CASES["small"], budget=256, rows=2, sides=(2, 6))


def test_a_mixture_has_captions_questions_and_text_with_images_of_many_shapes() -> None:
    rows = mixture(TINY, rows=8, budget=512, sides=(3, 12))
    documents = [document for row in rows for document in row]
    assert all(400 < sum(map(len, row)) <= 512 for row in rows)
    assert rows[0][0].tokens.tolist() == mixture(TINY, rows=1, budget=512, sides=(3, 12))[0][0].tokens.tolist()
    shapes = {(span.rows, span.cols) for document in documents for span in document.images}
    assert len(shapes) > 10
    assert {max(shape) for shape in shapes} <= set(range(3, 13))
    kinds = Counter(len(document.images) for document in documents)
    assert kinds[1] > 1.5 * kinds[0] > 0
    for document in documents:
        assert (document.tokens == PATCH).sum() == len(document.patches)
        assert (document.tokens == NEWLINE).sum() == sum(span.rows for span in document.images)
        assert document.tokens[-1] == EOS
        assert not document.loss[: sum(span.stop for span in document.images)].any()


def test_lengths_are_counted_in_steps_of_two() -> None:
    assert histogram([1, 16, 17, 32, 33, 500]) == {"up to 16": 2, "up to 32": 2, "up to 64": 1, "up to 512": 1}


def test_stock_batches_are_padded_on_the_left_and_hold_the_same() -> None:
    documents = mixture(TINY, rows=1, budget=512, sides=(3, 12))[0]
    batch = stock_training_batch(documents, "cpu")
    for row, document in enumerate(documents):
        kept = batch["attention_mask"][row].bool()
        assert kept.tolist() == [False] * (kept.numel() - len(document)) + [True] * len(document)
        assert batch["input_ids"][row, kept].tolist() == document.tokens.tolist()
        labels = batch["labels"][row]
        assert (labels[kept] != NO_LOSS).tolist() == document.loss.tolist()
        assert (labels[~kept] == NO_LOSS).all()


def test_grouped_by_length_the_same_documents_need_less_padding() -> None:
    batches = mixture(TINY, rows=4, budget=512, sides=(3, 12))
    grouped = grouped_by_length(batches)
    assert Counter(d.key for batch in grouped for d in batch) == Counter(d.key for batch in batches for d in batch)
    ours, theirs = (sum(len(batch) * max(map(len, batch)) for batch in some) for some in (grouped, batches))
    assert ours < theirs
    sizes = [sum(map(len, batch)) for batch in grouped]
    assert max(sizes) < 1.6 * min(sizes)


def test_new_decoders_are_alike_and_drawn_where_they_run() -> None:
    one, other = new_decoder(TINY, "cpu"), new_decoder(TINY, "cpu")
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    torch.manual_seed(0)
    torch.testing.assert_close(Decoder(TINY).state_dict(), one.state_dict(), rtol=0, atol=0)
    assert {tensor.device.type for tensor in new_decoder(TINY, "meta").state_dict().values()} == {"meta"}


def test_contenders_have_the_same_weights_and_the_same_loss() -> None:
    pytest.importorskip("transformers", reason="needs the extra `transformers`")
    eager = [name for name, contender in CONTENDERS.items() if not contender.compiled and "flash" not in name]
    trainees = build(CASE, eager, "cpu")
    whole = [name for name in eager if not CONTENDERS[name].grouped]
    losses = {name: float(trainees[name].forward(trainees[name].batches[0]).detach()) for name in whole}
    assert len(losses) == 3
    assert list(losses.values()) == pytest.approx([losses["ours"]] * 3, rel=1e-5)
    assert isinstance(trainees["ours"].optimizer, MuonAdamW), "the trainer's own"
    assert all(group["fused"] for group in trainees["transformers, sdpa"].optimizer.param_groups)
    settings = ("lr", "betas", "weight_decay", "eps")
    ours, theirs = ([[group[name] for name in settings] for group in trainees[name].optimizer.param_groups]
                    for name in ("ours", "transformers, sdpa"))  # fmt: skip
    assert ours == theirs
    trainees["ours"].epoch()
    assert float(trainees["ours"].forward(trainees["ours"].batches[0]).detach()) < losses["ours"], "it is trained"


def test_train_counts_tokens_without_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With times that are given, rates and ratios follow."""
    pytest.importorskip("transformers", reason="needs the extra `transformers`")
    seconds = {"transformers, sdpa": 4.0, "transformers, eager": 8.0, "ours": 2.0}
    monkeypatch.setattr(bench_train, "CASES", {"small": CASE})
    monkeypatch.setattr(bench_train, "peak_memory", lambda run, case, name, device: len(name))
    monkeypatch.setattr(bench_train, "alternate", lambda running, *_, **__: {name: seconds[name] for name in running})
    monkeypatch.setattr(bench_train, "peak_rate", lambda *_: (1e9, "measured"))
    out = tmp_path / "train.json"
    bench_train.train(["--sizes", "small", "--contenders", *seconds, "--out", str(out)])
    written = json.loads(out.read_text())
    assert {"device", "torch", "transformers", "date", "precision", "peak_source"} <= set(written)
    [case] = written["cases"]
    rows = [pack_row(row, CASE.budget) for row in CASE.documents]
    tokens = sum(sum(row.document_lengths) for row in rows)
    flops = sum(
        cost(
            CASE.config, document_lengths=row.document_lengths, grids=row.grids, targets=len(row.targets)
        ).training_flops
        for row in rows
    )
    assert case["tokens"] == tokens < 2 * CASE.budget
    assert sum(case["document_lengths"].values()) == sum(len(row.document_lengths) for row in rows)
    found = {result["contender"]: result for result in case["results"]}
    assert found["ours"]["tokens_per_second"] == pytest.approx(tokens / 2, abs=0.1)
    assert found["ours"]["mfu"] == pytest.approx(flops / 2 / 1e9, rel=1e-2)
    assert found["ours"]["times_as_fast"] == 2
    assert found["transformers, eager"]["times_as_fast"] == 0.5
    assert found["ours"]["padding"] == pytest.approx(1 - tokens / (2 * CASE.budget), abs=1e-4)
    assert found["transformers, sdpa"]["padding"] > 0.1
    assert found["ours"]["peak_memory_bytes"] == 4
    assert (tmp_path / "train.png").stat().st_size > 5_000


def test_a_contender_that_fails_stands_beside_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra `transformers`")

    def out_of_memory(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(bench_train, "CASES", {"small": CASE})
    monkeypatch.setattr(bench_train, "peak_memory", lambda *_: 1)
    monkeypatch.setattr(bench_train, "_first_loss", out_of_memory)
    bench_train.train(["--sizes", "small", "--contenders", "ours", "--out", str(tmp_path / "train.json")])
    [result] = json.loads((tmp_path / "train.json").read_text())["cases"][0]["results"]
    assert result == {
        "contender": "ours",
        "failed": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
    }


def test_without_transformers_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuyu_e2e.bench.stock.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"transformers, which is missing: pip install 'transformers>=5.16'"):
        bench_train.train(["--contenders", "ours"])


def test_scale_keeps_all_but_one_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_scale, "peak_memory", lambda run, point, device: 1_000 * len(point.batch().tokens))
    out = tmp_path / "scale.json"
    bench_scale.scale(["--parts", "rows", "images", "--rows", "600", "1200", "--sides", "2", "6", "--rounds", "1",
                       "--out", str(out)])  # fmt: skip
    written = json.loads(out.read_text())
    rows, images = written["rows"], written["images"]
    assert [row["tokens"] for row in rows] == [2 * 272, 4 * 272]
    assert {row["document"] for row in rows} == {272}
    assert rows[0]["training_flops_per_token"] == rows[1]["training_flops_per_token"]
    assert [image["document"] for image in images] == [2 * 3 + 32, 6 * 7 + 32]
    for result in (*rows, *images):
        assert result["microseconds_per_token"] > 0
        assert 900 < result["bytes_per_token"] < 1_000
    assert (tmp_path / "scale.png").stat().st_size > 5_000


def test_a_step_of_scale_trains() -> None:
    step = Step(Point(TINY, 200, 3), "cpu")
    before = float(step.decoder.loss(step.batch).detach())
    for _ in range(20):
        step()
    assert float(step.decoder.loss(step.batch).detach()) < before


def test_weak_scaling_is_read_from_what_the_trainer_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes log 150 tokens a second each to one's 200, and the first log of a run doesn't count."""
    ran: list[dict[str, str]] = []

    def log(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess:
        assert Path(command[1]).read_text().startswith("import sys")
        settings = dict(argument.removeprefix("--").split("=", 1) for argument in command[3:])
        ran.append(settings | {"threads": env["OMP_NUM_THREADS"]})
        folder = Path(settings["trainer.logger.save_dir"]) / "lightning_logs" / "version_0"
        folder.mkdir(parents=True)
        speed = {"1": 200, "2": 300}[settings["trainer.devices"]]
        (folder / "metrics.csv").write_text(
            f"step,tokens/s,lr\n1,3,\n2,{speed - 10},\n2,,1\n3,{speed},\n4,{speed + 10},\n"
        )
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", log)
    monkeypatch.setattr(bench_scale, "PICTURES", 20)
    one, two = bench_scale._processes([1, 2], 60, "cpu")
    assert one == {"value": 1, "tokens_per_second": 200, "efficiency": 1}
    assert two == {"value": 2, "tokens_per_second": 300, "efficiency": 0.75}
    assert [run["trainer.devices"] for run in ran] == ["1", "2", "1", "2"]
    assert len({run["threads"] for run in ran}) == 1, "each process has as many threads, however many there are"


def test_the_operations_of_a_step_are_shared_out_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(TINY)
    batch = pack_row(mixture(TINY, rows=1, budget=256, sides=(3, 6))[0])
    found: list[tuple[Any, str]] = []

    def by_part(events: Any) -> list[tuple[Any, str]]:
        found.extend(shared_out(events))
        return found

    def update() -> None:
        for weight in decoder.parameters():
            weight.grad = None

    shared_out = bench_parts._by_part
    monkeypatch.setattr(bench_parts, "_by_part", by_part)
    parts = bench_parts.profile_parts(decoder, repeat(batch), update, 3, "cpu")
    assert set(parts) == {*PARTS, "idle"}
    assert all(milliseconds > 0 for part, milliseconds in parts.items() if part != "idle")
    multiplied = Counter(part for event, part in found if event.name in ("aten::mm", "aten::addmm"))
    linear = sum(weight.ndim == 2 for weight in decoder.blocks.parameters())
    # The backward pass, two multiplications to the forward's one, is shared out as well; patches have no gradient.
    assert multiplied == {"projections": 3 * (3 * linear + 2), "loss": 3 * 3}
    named = Counter((event.name, part) for event, part in found)
    attended = {part: count for (name, part), count in named.items() if name == "aten::scaled_dot_product_attention"}
    assert set(attended) == {"attention"}
    assert {part for name, part in named if name == "LogSoftmaxBackward0"} == {"loss"}
    assert {part for name, part in named if name in ("EmbeddingBackward0", "SiluBackward0")} == {"rest"}
    assert named["part: data", "data"] == named["part: optimizer", "optimizer"] == 3
    assert not any(module._forward_hooks for module in decoder.modules()), "nothing is left behind"


def test_python_counts_where_a_part_is_python() -> None:
    """Of the data and the optimizer; elsewhere only what operations take, each without those inside it."""

    def event(name: str, microseconds: float, inside: Any = None) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            self_cpu_time_total=microseconds,
            cpu_parent=inside,
            device_type=torch.autograd.DeviceType.CPU,
            time_range=SimpleNamespace(start=0),
            scope=0,
            sequence_nr=-1,
        )

    data, loss = event("part: data", 1), event("part: loss", 10)
    events = [data, event("aten::to", 100, data), loss, event("aten::mm", 1_000, loss), event("aten::add", 10_000)]
    sums = bench_parts._sum_up(events, "cpu")
    assert sums == dict.fromkeys(PARTS, 0) | {"data": 101, "loss": 1_000, "rest": 10_000}


def test_decoding_counts_as_the_last_token_of_a_document() -> None:
    """The operations of a document of n tokens and logits everywhere, less those of the first n - 1, keys apart."""
    by_hand = 2 * (cost(TINY, document_lengths=(1,), grids=(), targets=1).forward_flops)
    assert decode_step_flops(TINY, (1, 1)) == by_hand
    assert decode_step_flops(TINY, (10, 5)) - by_hand == 4 * 2 * 16 * 2 * (9 + 4)


def test_limit_gives_shares_and_lightnings_overhead(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_limit, "CASES", {"small": CASE})
    monkeypatch.setattr(bench_limit, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(bench_limit, "copy_bandwidth", lambda *_: 1e9)
    monkeypatch.setattr(bench_limit, "NEW_TOKENS", 4)
    monkeypatch.setattr(bench_limit, "PICTURES", 100)
    recipe = yaml.safe_load((repository / "recipes" / "quickstart.yaml").read_text())
    recipe["data"]["budget"] = 256
    recipe["model"]["decoder"]["layers"] = 2
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(bench_limit, "shipped", lambda name: tmp_path / "small.yaml")
    out = tmp_path / "limit.json"
    bench_limit.limit(["--sizes", "small", "--decoders", "quickstart", "--eager", "--steps", "8", "--rounds", "1",
                       "--out", str(out)])  # fmt: skip
    written = json.loads(out.read_text())
    assert [share["what"].split(",")[0] for share in written["shares"]] == ["training step", "decoding", "decoding"]
    for share in written["shares"]:
        assert share["of_matmul_rate"] == round(share["flops"] / share["seconds"] / 1e9, 4)
        assert share["of_bandwidth"] == round(share["least_bytes"] / share["seconds"] / 1e9, 4)
    assert set(written["milliseconds_by_part"]) == {*PARTS, "idle"}
    lightning = written["lightning"]
    trainer, bare = lightning["trainer_seconds_per_step"], lightning["bare_seconds_per_step"]
    assert lightning["overhead"] == pytest.approx(trainer / bare - 1, rel=1e-4, abs=1e-4 + 2e-6 * trainer / bare**2)
    assert (tmp_path / "limit.png").stat().st_size > 5_000


def hold(megabytes: int) -> None:
    torch.ones(megabytes, 2**18)
    torch.ones(megabytes // 2, 2**18)


def test_memory_of_a_process_of_its_own_is_its_peak() -> None:
    np.ones(2**27)  # a gibibyte that a child would inherit as its own peak, were getrusage asked
    assert peak_memory(hold, 200) == pytest.approx(200 * 2**20, rel=0.05)
