"""Other packages for the data path, as far as they are installed: JPEG decoders, and readers of shards."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from jaxtyping import UInt8
from PIL import Image as Pillow

from fuyu_e2e.data.image import scale_pixels

Size = tuple[int, int]
Decode = Callable[[bytes, Size], UInt8[np.ndarray, "h w 3"]]
"""Decodes a JPEG file to pixels of a (width, height)."""
Sample = tuple[str, Any, str]
"""(key, image, caption); the image is encoded, or decoded by Pillow."""
Read = Callable[[bool], Iterator[Sample]]
"""Makes one pass over all samples; the flag asks for images decoded by the reader's own means."""


@dataclass(frozen=True)
class Absent:
    """A contender that this machine lacks."""

    name: str
    reason: str
    install: str
    """The command that installs it."""


def _imported(module: str) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return import_module(module)


def _absent(name: str, package: str, error: Exception) -> Absent:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return Absent(name, reason, f"{Path(sys.executable).name} -m pip install {package}")


def scaled_by_pillow(image: Pillow.Image, size: Size) -> UInt8[np.ndarray, "h w 3"]:
    """Returns an image scaled by Pillow."""
    return np.asarray(image if image.size == size else image.resize(size, Pillow.Resampling.BILINEAR))


def _opened(data: bytes) -> Pillow.Image:
    return Pillow.open(io.BytesIO(data), formats=["JPEG"])


def pillow(data: bytes, size: Size) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes and scales with Pillow alone, the reference for all others."""
    return scaled_by_pillow(_opened(data).convert("RGB"), size)


def _pillow_with_draft(data: bytes, size: Size) -> UInt8[np.ndarray, "h w 3"]:
    image = _opened(data)
    image.draft("RGB", size)
    return scaled_by_pillow(image.convert("RGB"), size)


def _pillow_and_torch(data: bytes, size: Size) -> UInt8[np.ndarray, "h w 3"]:
    image = _opened(data)
    image.draft("RGB", size)
    return scale_pixels(np.array(image.convert("RGB")), size)


def _simplejpeg() -> Decode:
    decode = _imported("simplejpeg").decode_jpeg
    return lambda data, size: scale_pixels(decode(data), size)


def _simplejpeg_and_pillow() -> Decode:
    decode = _imported("simplejpeg").decode_jpeg
    return lambda data, size: scaled_by_pillow(Pillow.fromarray(decode(data)), size)


def _simplejpeg_eighths() -> Decode:
    decode = _imported("simplejpeg").decode_jpeg
    return lambda data, size: scale_pixels(decode(data, min_width=size[0], min_height=size[1]), size)


def _turbojpeg() -> Decode:
    turbojpeg = _imported("turbojpeg")
    decode = turbojpeg.TurboJPEG().decode
    return lambda data, size: scale_pixels(decode(data, pixel_format=turbojpeg.TJPF_RGB), size)


def _opencv() -> Decode:
    cv2 = _imported("cv2")
    return lambda data, size: scale_pixels(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB), size)


def _imagecodecs() -> Decode:
    decode = _imported("imagecodecs").jpeg8_decode
    return lambda data, size: scale_pixels(decode(data), size)


def _torchvision() -> Decode:
    module = _imported("torchvision.io")
    rgb = module.ImageReadMode.RGB

    def decode(data: bytes, size: Size) -> UInt8[np.ndarray, "h w 3"]:
        pixels = module.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), rgb)
        return scale_pixels(pixels.permute(1, 2, 0).contiguous().numpy(), size)

    return decode


DECODERS: dict[str, tuple[str, Callable[[], Decode]]] = {
    "Pillow": ("pillow", lambda: pillow),
    "Pillow with draft": ("pillow", lambda: _pillow_with_draft),
    "Pillow with draft + torch": ("pillow", lambda: _pillow_and_torch),
    "simplejpeg + Pillow": ("simplejpeg", _simplejpeg_and_pillow),
    "simplejpeg + torch": ("simplejpeg", _simplejpeg),
    "simplejpeg in eighths + torch": ("simplejpeg", _simplejpeg_eighths),
    "PyTurboJPEG + torch": ("PyTurboJPEG", _turbojpeg),
    "OpenCV + torch": ("opencv-python-headless", _opencv),
    "imagecodecs + torch": ("imagecodecs", _imagecodecs),
    "torchvision + torch": ("torchvision", _torchvision),
}
"""The package of each decoder, and the function that opens it. After a plus comes what scales the image."""


def decoders(example: bytes) -> tuple[dict[str, Decode], list[Absent]]:
    """Returns the decoders that work here, after decoding the example once, and those that don't."""
    found, absent = {}, []
    size = _opened(example).size
    for name, (package, opened) in DECODERS.items():
        try:
            decode = opened()
            decode(example, size)
            found[name] = decode
        except Exception as error:  # a library that doesn't fit the others here may raise anything
            absent.append(_absent(name, package, error))
    return found, absent


def _webdataset(shards: Sequence[Path], folder: Path) -> Read:
    urls = [str(shard) for shard in shards]

    def read(decoded: bool) -> Iterator[Sample]:
        samples = webdataset.WebDataset(urls, shardshuffle=False)
        if decoded:
            yield from samples.decode("pilrgb").to_tuple("__key__", "jpg", "txt")
            return
        for key, image, caption in samples.to_tuple("__key__", "jpg", "txt"):
            yield key, image, caption.decode()

    return read


ENERGON = """\
sample_type:
  __module__: megatron.energon
  __class__: CaptioningSample
field_map:
  image: jpg
  caption: txt
"""


def _energon(shards: Sequence[Path], folder: Path) -> Read:
    energon = _imported("megatron.energon")
    prepare = _imported("megatron.energon.flavors.webdataset.prepare").WebdatasetPreparator.prepare_dataset
    own = folder / "energon"
    own.mkdir()
    for shard in shards:
        os.link(shard, own / shard.name)
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(
            own, [shard.name for shard in shards], split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
        )
    (own / ".nv-meta" / "dataset.yaml").write_text(ENERGON)

    def loader(decoder: Any) -> Any:
        samples = energon.get_train_dataset(
            own,
            worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
            batch_size=None,
            shuffle_buffer_size=None,
            shuffle_over_epochs_multiplier=None,
            parallel_shard_iters=1,
            max_samples_per_sequence=None,
            repeat=False,
            task_encoder=type("Encoder", (energon.DefaultTaskEncoder,), {"decoder": decoder})(),
        )
        # By default it collects garbage every tenth batch, which would take most of its time with single samples.
        return energon.get_savable_loader(samples, gc_collect_every_n_steps=0)

    loaders = {True: loader(energon.SampleDecoder(image_decode="pilrgb")), False: loader(None)}

    def read(decoded: bool) -> Iterator[Sample]:
        for sample in loaders[decoded]:
            yield sample.__key__, sample.image, sample.caption if decoded else sample.caption.decode()

    return read


def _mosaic(shards: Sequence[Path], folder: Path) -> Read:
    streaming = _imported("streaming")
    own = str(folder / "mosaic")
    columns = {"key": "str", "image": "bytes", "caption": "str"}
    with streaming.MDSWriter(out=own, columns=columns) as writer:
        for key, image, caption in _webdataset(shards, folder)(False):
            writer.write({"key": key, "image": image, "caption": caption})
    samples = streaming.StreamingDataset(local=own, batch_size=1)

    def read(decoded: bool) -> Iterator[Sample]:
        for sample in samples:
            image = sample["image"]
            # Does what a column of type `jpeg` does; its writer would encode the images a second time.
            yield sample["key"], _opened(image).convert("RGB") if decoded else image, sample["caption"]

    return read


READERS: dict[str, tuple[str, Callable[[Sequence[Path], Path], Read]]] = {
    "webdataset": ("webdataset", _webdataset),
    "Energon": ("megatron-energon", _energon),
    "Mosaic Streaming": ("mosaicml-streaming", _mosaic),
}
"""The package of each reader, and the function that prepares its data in a folder and opens it."""


def readers(shards: Sequence[Path], folder: Path) -> tuple[dict[str, Read], list[Absent]]:
    """Returns the readers that work here, opened on the shards, and those that don't."""
    found, absent = {}, []
    for name, (package, opened) in READERS.items():
        try:
            found[name] = opened(shards, folder)
        except Exception as error:
            absent.append(_absent(name, package, error))
    return found, absent
