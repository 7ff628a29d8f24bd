"""Weights in safetensors files, which contain tensors and names, and nothing that could run.

The layout is that of the Hugging Face Hub: `model.safetensors`, or above 5 GB several files and
`model.safetensors.index.json`, which says in which file each tensor is.
"""

import json
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fuyu_e2e.checkpoint.json_files import read_json
from fuyu_e2e.errors import UserError

FILE = "model.safetensors"
INDEX = f"{FILE}.index.json"
SHARD_SIZE = "5GB"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
"""Weight files that may contain code."""


def write_weights(weights: dict[str, Tensor], folder: Path, shard_size: int | str = SHARD_SIZE) -> None:
    """Writes weights into a folder.

    Not by huggingface_hub's `save_torch_state_dict`, which refuses tensors that are parts of a larger one.

    Args:
        weights: Tensors by name, which don't share memory.
        folder: An existing folder.
        shard_size: The most bytes of a file, as a number or as "5GB"; larger weights go into several files.
    """
    split = split_torch_state_dict_into_shards(weights, max_shard_size=shard_size)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: weights[name].contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes it readable only for its owner
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Returns the weights in a folder by name, on the CPU, in their stored dtypes.

    Raises:
        UserError: Names the file that is missing or damaged, or the tensor that isn't where the index says.
    """
    if not (folder / INDEX).is_file():
        return _read(folder, FILE)
    named = read_json(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise UserError(f"{folder / INDEX} has no weight_map from tensors to files: fetch the folder again.")
    weights: dict[str, Tensor] = {}
    for file in sorted(set(named.values())):
        if Path(file).name != file:
            raise UserError(f"{folder / INDEX} names the file {file!r}, which lies outside its folder: don't use it.")
        found = _read(folder, file)
        if strange := sorted(found.keys() ^ {name for name, listed in named.items() if listed == file}):
            said = "is in" if strange[0] in found else "is missing from"
            raise UserError(f"{strange[0]} {said} {folder / file}, against {INDEX}: fetch the folder again.")
        weights |= found
    return weights


def _read(folder: Path, file: str) -> dict[str, Tensor]:
    path = folder / file
    if not path.is_file():
        if pickled := sorted(found.name for pattern in PICKLED for found in folder.glob(pattern)):
            raise UserError(
                f"{folder} holds {pickled[0]} but no {file}: such a file may hold code, so it is not opened. Get the "
                "weights as safetensors."
            )
        raise UserError(f"{path} is missing: fetch the folder again.")
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no safetensors file, or is damaged ({error}): fetch it again.") from error
