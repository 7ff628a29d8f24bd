"""The exported folder: `model.safetensors`, `config.json`, `tokenizer.model` and a card, `README.md`.

`config.json` contains the format and its version, the decoder and image settings, the tokenizer's checksum and the
model's provenance.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from fuyu_e2e.checkpoint.json_files import read_json
from fuyu_e2e.checkpoint.metadata import ModelMetadata, Provenance
from fuyu_e2e.checkpoint.safetensors_io import read_weights
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.version import __version__

CONFIG = "config.json"
TOKENIZER = "tokenizer.model"
FORMAT = "fuyu_e2e"
FORMAT_VERSION = 1


def is_exported(path: Path) -> bool:
    """Returns whether a path is a folder with a `config.json`, of this project or another."""
    return (path / CONFIG).is_file()


def folder_config(metadata: ModelMetadata, provenance: Provenance) -> dict[str, Any]:
    """Returns the content of `config.json`."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **metadata.settings(),
        "tokenizer_sha256": metadata.tokenizer.digest,
        "provenance": asdict(provenance),
    }


def read_folder(folder: Path) -> tuple[ModelMetadata, dict[str, Tensor], Provenance]:
    """Reads an exported folder, without ever running anything in it.

    Returns:
        The description, the weights by the decoder's names, and the provenance.

    Raises:
        UserError: Names the file that is missing, damaged, or doesn't belong to the others.
    """
    path = folder / CONFIG
    config = read_json(path)
    if config.get("format") != FORMAT:
        if config.get("model_type") == "fuyu":
            raise UserError(
                f"{folder} is a model of transformers: make it one of ours with `fuyu-e2e import --from {folder} "
                "--out DIR`, and name DIR."
            )
        raise UserError(f"{path} describes no model of fuyu-e2e.")
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} is of format {config.get('format_version')}, but fuyu-e2e {__version__} reads format "
            f"{FORMAT_VERSION}: install version {config.get('version')}."
        )
    tokenizer = Tokenizer.from_file(folder / TOKENIZER)
    if tokenizer.digest != config.get("tokenizer_sha256"):
        raise UserError(
            f"{folder / TOKENIZER} is not the tokenizer that {path} names by its sha256: fetch the folder again."
        )
    metadata = ModelMetadata.of_settings(config, tokenizer, str(path))
    try:
        provenance = Provenance(**config["provenance"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} doesn't say how the model was trained ({error}): fetch it again.") from error
    return metadata, read_weights(folder), provenance


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill, which is renamed to `folder` when complete.

    Raises:
        UserError: `folder` is not empty, or can't be created.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already holds something: name another place, or remove it.")
    missing = [parent for parent in folder.absolute().parents if not parent.exists()]
    with ExitStack() as stack:
        stack.callback(_remove_empty, missing)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Next to its place, so that the rename below moves no bytes.
            unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        except OSError as error:
            raise UserError(
                f"{folder} can't be made ({error.strerror}: {error.filename}): name another place."
            ) from error
        stack.callback(shutil.rmtree, unfinished, ignore_errors=True)
        yield unfinished
        unfinished.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)


def _remove_empty(folders: list[Path]) -> None:
    """Removes the empty ones of some nested folders, given innermost first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
