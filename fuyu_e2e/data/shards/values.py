"""Interprets values in rows: images as bytes, as paths, or as Hugging Face's datasets store them."""

import re
from pathlib import Path
from typing import Any

from fuyu_e2e.data.shards.extensions import IMAGES, image_extension, is_media
from fuyu_e2e.errors import UnusableSampleError

REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
"""The start of a URL."""


def listed(value: Any) -> list[Any]:
    """Returns a list as it is, null as an empty list, and any other value as a list of one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def is_null(value: Any) -> bool:
    """Returns whether a value is null, or an image of Hugging Face's datasets with both parts null."""
    return value is None or value == {"bytes": None, "path": None}


def is_embedded(value: Any) -> bool:
    """Returns whether a value is an image in the form of Hugging Face's datasets, or the bytes of an image file."""
    if isinstance(value, dict):
        return value.keys() >= {"bytes", "path"}
    return isinstance(value, bytes) and image_extension(value) is not None


def is_image_type(kind: Any) -> bool:
    """Returns whether an Arrow type is that of images in Hugging Face's datasets, or of lists of them."""
    from pyarrow import types

    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    return types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}


def names_media(value: Any) -> bool:
    """Returns whether a value is the path of an image, sound or film; a URL may be the source of a text."""
    return isinstance(value, str) and is_media(extension_of(value)) and not REMOTE.match(value)


def not_read(image: Path | str) -> UnusableSampleError:
    """Returns the error for an image, sound or film of a kind that can't be read."""
    return UnusableSampleError("image-extension", f"{image}: read are {', '.join(IMAGES)}")


def extension_of(path: Path | str) -> str:
    """Returns what follows the last dot of a file's name, in lower case; empty if there is none."""
    return Path(path).suffix[1:].lower()
