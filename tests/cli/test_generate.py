"""`fuyu-e2e generate`: one prompt, or many with a model that is loaded once."""

import io
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import fuyu_e2e
from fuyu_e2e.checkpoint import loading
from fuyu_e2e.checkpoint.loading import StoredModel
from fuyu_e2e.checkpoint.metadata import ModelMetadata, Provenance
from fuyu_e2e.cli import main
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.errors import UserError
from fuyu_e2e.export.folders import export_own
from fuyu_e2e.inference.device import find_device, product_type
from fuyu_e2e.model.decoder import Decoder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    decoder: Decoder,
    routed_decoder: Callable[..., Decoder],
    builder: SequenceBuilder,
    make_png: Callable[..., bytes],
) -> Path:
    """A working folder with a model, a routed one, two pictures and a file that is none."""
    folder = tmp_path_factory.mktemp("work")
    for name, model in (("model", decoder), ("routed", routed_decoder(share=0.3, skipped="keys"))):
        metadata = ModelMetadata(model.config, builder.tokenizer, builder.images)
        export_own(StoredModel(folder, metadata, dict(model.state_dict()), Provenance(step=7)), folder / name)
    for name, seed in (("a.png", 1), ("b b.png", 2)):
        (folder / name).write_bytes(make_png(9, 14, seed=seed))
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def generate(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """Runs the command in that folder; gives the exit code, what it printed and what it reported."""
    monkeypatch.chdir(folder)

    def generate(*arguments: str, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fuyu-e2e", "generate", "--checkpoint", "model", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code = main()
        return code, *capsys.readouterr()

    return generate


ROOM = ("--max-new-tokens", "5")


@pytest.mark.parametrize("name", ["broken.png", "gone.png"])
def test_an_image_that_can_not_be_read_is_named(name: str, generate: Run) -> None:
    code, printed, reported = generate("--image", "a.png", "--image", name, "--prompt", "What is it?")
    assert (code, printed) == (2, "")
    [sentence] = reported.splitlines()
    assert sentence.startswith(f"fuyu-e2e: Part 2 of the prompt, {name}, can't be ")


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("command", ["generate", "routing"])
def test_products_are_of_the_type_of_the_device(
    command: str, folder: Path, in_bfloat16: set[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    arguments = ["--checkpoint", "routed" if command == "routing" else "model", "--image", "a.png", *ROOM]
    monkeypatch.setattr(sys, "argv", ["fuyu-e2e", command, *arguments])
    assert main() == 0
    assert in_bfloat16 == {torch.bfloat16}


def test_an_empty_prompt_asks_for_a_caption(folder: Path, generate: Run) -> None:
    decoder, processor = fuyu_e2e.load(folder / "model")
    [caption] = fuyu_e2e.generate(decoder, [processor(folder / "a.png")], max_new_tokens=5, eos_id=processor.eos_id)
    assert generate("--image", "a.png", *ROOM) == (0, f"{processor.decode(caption)}\n", "")


def test_prompts_are_read_until_the_input_ends_and_answered_as_one_alone_would_be(
    generate: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one(text: str, *images: str) -> str:
        given = [part for image in images for part in ("--image", image)]
        code, printed, _ = generate(*given, "--prompt", text, *ROOM)
        assert code == 0
        return printed

    expected = [
        one("What is it?", "a.png"),
        one("19 8 3", "a.png"),
        one("What is it?", "b b.png", "a.png"),
        one("", "b b.png", "a.png"),
        one("What is it?"),
    ]
    loaded = []
    load = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda *given: loaded.append(given) or load(*given))
    typed = [
        "What is it?", "19 8 3",
        ":image broken.png", "What is it?",
        ":image 'unclosed",
        ":image 'b b.png' a.png", "What is it?", "",
        ":image", "What is it?",
    ]  # fmt: skip
    code, printed, reported = generate("--image", "a.png", "--interactive", *ROOM, typed="\n".join(typed))
    assert code == 0
    assert printed == "".join(expected)
    unreadable, unclosed = reported.splitlines()
    assert "broken.png" in unreadable
    assert ":image 'unclosed can't be read" in unclosed
    assert len(loaded) == 1


def test_images_of_the_input_may_lie_at_home(folder: Path, generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected, _ = generate("--image", "a.png", "--prompt", "What is it?", *ROOM)
    monkeypatch.setenv("HOME", str(folder))
    assert generate("--interactive", *ROOM, typed=":image ~/a.png\nWhat is it?\n") == (0, expected, "")


def test_a_prompt_and_interactive_exclude_each_other(generate: Run) -> None:
    code, _, reported = generate("--prompt", "a", "--interactive")
    assert code == 2
    assert "not allowed with" in reported


@pytest.mark.parametrize("named", ["cuda:99", "tpu", "meta", "cpu:"])
def test_a_device_that_is_not_there_is_refused(named: str, generate: Run) -> None:
    code, printed, reported = generate("--prompt", "a", "--device", named)
    assert (code, printed) == (2, "")
    [sentence] = reported.splitlines()
    assert sentence.startswith(f"fuyu-e2e: --device {named} can't be used on this machine, which has cpu")


def test_the_device_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert find_device("auto").type == kind
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device abacus"):
        find_device("abacus")


def test_products_are_in_bfloat16_on_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert product_type(torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    for has_it, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has_it=has_it: has_it)
        assert product_type(torch.device("cuda:1")) == expected
