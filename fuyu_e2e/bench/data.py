"""Compares the data path with bare decoding and with other readers: one process on one core.

All contenders read the same captioned JPEG images once, in stored order (which spares the others their shuffle
buffers), and fill the same rows. Each other reader runs twice: with its documented decoding by Pillow, and with our
decoding of its encoded images, so that only the reading differs.
"""

import io
import os
import tarfile
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, ImageDraw
from PIL import Image as Pillow
from rich.console import Console
from rich.table import Table

from fuyu_e2e.bench.data_peers import DECODERS, READERS, Decode, Read, decoders, pillow, readers, scaled_by_pillow
from fuyu_e2e.bench.measure import alternate, environment, write_json
from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.image import decode_image, image_size, to_patches
from fuyu_e2e.data.packing import PackedRow, Packer, pack_row
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.sequence import SequenceBuilder, TokenSequence
from fuyu_e2e.data.shards.locations import expand_patterns
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.data.tokenizer import train_tokenizer
from fuyu_e2e.errors import UnusableSampleError, UserError
from fuyu_e2e.model.image_layout import ImagePolicy, ImageSpan, fit_policy

PATCH_SIZE = 16
BUDGETS = {1_024: 2_048, 4_096: 8_192}
"""Patches of an image and tokens of a row: the first scales most of the generated images down, the second none."""
VOCAB_SIZE = 2_048
SHARD_SAMPLES = 100
SIDES = (300, 1_000)
"""Range of the longer side of an image, in pixels."""
TEXTURE = 1_024
"""Side in pixels of the textures that images are cut from."""
SAME = 2
"""Levels of 255 by which pixels may differ and still count as equal."""
OURS, BARE = "fuyu_e2e", "fuyu_e2e's decode_image"


@dataclass(frozen=True)
class Captioned:
    """A JPEG file with its caption."""

    image: bytes
    caption: str


@dataclass(frozen=True)
class Contents:
    """The contents of a contender's rows."""

    images: int
    tokens: int
    """Tokens without padding."""
    patches: Counter[tuple[str, int]]
    """The key of each document, with the patches of its image."""


def data(args: Sequence[str]) -> None:
    """Measures images and tokens per second of one core: bare decoders, the whole path, and the readers of others."""
    parser = ArgumentParser(prog="python -m fuyu_e2e.bench data", description=data.__doc__)
    parser.add_argument("--shards", help="Take JPEG images and captions from here; by default they are made.")
    parser.add_argument("--images", type=int, default=400, help="How many (default: %(default)s).")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("bench-data.json"))
    options = parser.parse_args(args)
    console = Console(highlight=False)
    with TemporaryDirectory() as temporary, _one_core():
        folder = Path(temporary)
        source = photographs() if options.shards is None else _captioned(options.shards)
        samples = list(islice(source, options.images))
        if not samples:
            raise UserError(f"{options.shards} holds no JPEG image with a caption.")
        shards = _write(folder, samples)
        known, absent = decoders(samples[0].image)
        reading, absent_readers = readers(shards, folder)
        absent += absent_readers
        results = []
        for max_patches, budget in BUDGETS.items():
            result = _measure(folder, samples, known, reading, max_patches, budget, options.rounds)
            results.append(result)
            console.print(_decoder_table(result), _path_table(result))
        for contender in absent:
            console.print(f"{contender.name} is absent ({contender.reason}): {contender.install}", soft_wrap=True)
        content = {
            **environment("cpu"),
            "packages": _versions(),
            "images": len(samples),
            "made": options.shards is None,
            "image_bytes": sum(len(sample.image) for sample in samples),
            "rounds": options.rounds,
            "absent": [asdict(contender) for contender in absent],
            "results": results,
        }
        write_json(options.out, content)


@contextmanager
def _one_core() -> Iterator[None]:
    """Keeps this process, with all threads that it starts, on one core."""
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def photographs(seed: int = 0) -> Iterator[Captioned]:
    """Yields images that a JPEG encoder finds as hard as photographs: quality 85, 4:2:0, about 1.8 bits a pixel.

    They are textures whose contrast falls with frequency as in nature, with a few hard edges.
    """
    rng = np.random.default_rng(seed)
    light, colour = _texture(1.4, rng), _texture(1.6, rng)
    words = ["".join(rng.choice(list("aeioubcdfghlmnprst"), rng.integers(2, 10))) for _ in range(2_000)]
    while True:
        longer = int(rng.integers(SIDES[0], SIDES[1] + 1))
        shorter = round(longer / rng.choice([1, 5 / 4, 4 / 3, 3 / 2, 16 / 9]))
        width, height = (longer, shorter) if rng.random() < 0.65 else (shorter, longer)
        planes = [
            np.clip(128 + contrast * _cut(texture, height, width, rng), 0, 255).astype(np.uint8)
            for texture, contrast in ((light, 45), (colour, 15), (colour, 15))
        ]
        picture = Pillow.fromarray(np.stack(planes, 2), "YCbCr").convert("RGB")
        pen = ImageDraw.Draw(picture)
        for _ in range(rng.integers(2, 7)):
            x, y, w, h = (rng.random(4) * (width, height, width / 3, height / 3)).tolist()
            draw = pen.ellipse if rng.random() < 0.5 else pen.rectangle
            draw((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=85, subsampling="4:2:0")
        ranks = np.minimum(rng.zipf(1.3, 20), len(words)) - 1  # few words make up most of a text
        yield Captioned(file.getvalue(), " ".join(words[rank] for rank in ranks))


def _texture(exponent: float, rng: np.random.Generator) -> np.ndarray:
    frequency = np.hypot(np.fft.fftfreq(TEXTURE)[:, None], np.fft.rfftfreq(TEXTURE)[None])
    frequency[0, 0] = 1
    noise = rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)
    texture = np.fft.irfft2(noise / frequency**exponent, (TEXTURE, TEXTURE))
    return (texture - texture.mean()) / texture.std()


def _cut(texture: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    y, x = rng.integers(0, TEXTURE - height + 1), rng.integers(0, TEXTURE - width + 1)
    return texture[y : y + height, x : x + width][:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]


def _captioned(pattern: str) -> Iterator[Captioned]:
    """Yields samples that every contender can read: RGB images without rotation, with a caption."""
    for shard in expand_patterns(pattern):
        for document in read_documents(Path(shard), SampleStats()):
            match document.segments:
                case (Image(image), Text(caption)) if _is_plain(image):
                    yield Captioned(image, caption)


def _is_plain(image: bytes) -> bool:
    try:
        decode_image(image, ImagePolicy(patch_size=PATCH_SIZE))
    except UnusableSampleError:
        return False
    opened = Pillow.open(io.BytesIO(image))
    return (opened.format, opened.mode) == ("JPEG", "RGB") and opened.getexif().get(ExifTags.Base.Orientation, 1) == 1


def _write(folder: Path, samples: Sequence[Captioned]) -> list[Path]:
    shards = []
    for first in range(0, len(samples), SHARD_SAMPLES):
        shards.append(folder / f"images-{first // SHARD_SAMPLES:05}.tar")
        with tarfile.open(shards[-1], "w") as tar:
            for number, sample in enumerate(samples[first : first + SHARD_SAMPLES], first):
                for extension, content in (("jpg", sample.image), ("txt", sample.caption.encode())):
                    info = tarfile.TarInfo(f"{number:08}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return shards


def _measure(
    folder: Path,
    samples: Sequence[Captioned],
    known: dict[str, Decode],
    reading: dict[str, Read],
    max_patches: int,
    budget: int,
    rounds: int,
) -> dict[str, Any]:
    tokenizer = folder / "tokenizer.model"
    if not tokenizer.exists():
        train_tokenizer((sample.caption for sample in samples), VOCAB_SIZE).save(tokenizer)
    module = FuyuDataModule(
        str(tokenizer), PATCH_SIZE, val=str(folder / "images-*.tar"), budget=budget, max_patches=max_patches
    )
    builder, stream = module.builder, module.stream("val")
    natives = [image_size(sample.image, builder.images) for sample in samples]
    sizes = [fit_policy(*native, builder.images) for native in natives]

    def bare(decode: Decode) -> Callable[[], None]:
        def run() -> None:
            for sample, size in zip(samples, sizes, strict=True):
                decode(sample.image, size)

        return run

    paths: dict[str, Callable[[], Iterator[PackedRow]]] = {OURS: stream.rows}
    for name, read in reading.items():
        for decoded in (True, False):
            paths[path_name(name, decoded)] = partial(_packed, read, decoded, builder, budget)
    contents = {name: _contents(rows()) for name, rows in paths.items()}
    for name, found in contents.items():
        if found != contents[OURS]:
            raise RuntimeError(f"{name} reads other images than {OURS}.")
    whole = contents[OURS]
    assert whole.images == len(samples)
    ours = {BARE: lambda image, _: decode_image(image, builder.images)}
    seconds = alternate(
        {name: bare(decode) for name, decode in (ours | known).items()}
        | {name: partial(_drain, rows) for name, rows in paths.items()},
        rounds,
        warm_up=1,
    )
    decoded_by: list[dict[str, Any]] = [
        {
            "name": name,
            "seconds": round(seconds[name], 4),
            "images_per_second": round(len(samples) / seconds[name], 1),
            **_difference(decode, samples, sizes),
        }
        for name, decode in (ours | known).items()
    ]
    fastest = min((line["seconds"], line["name"]) for line in decoded_by if line["max_difference"] <= SAME)
    return {
        "max_patches": max_patches,
        "patch_size": PATCH_SIZE,
        "row_tokens": budget,
        "tokens": whole.tokens,
        "scaled_down": sum(size != native for size, native in zip(sizes, natives, strict=True)),
        "decoders": decoded_by,
        "bare": fastest[1],
        "paths": [
            {
                "name": name,
                "seconds": round(seconds[name], 4),
                "images_per_second": round(whole.images / seconds[name], 1),
                "tokens_per_second": round(whole.tokens / seconds[name]),
                "of_own_decode": round(seconds[BARE] / seconds[name], 4),
                "of_bare_decode": round(fastest[0] / seconds[name], 4),
                "ours_to_this": round(seconds[name] / seconds[OURS], 4),
            }
            for name in paths
        ],
    }


def path_name(reader: str, decoded: bool) -> str:
    """Returns a reader's name in the tables, with its own decoding or ours."""
    return f"{reader}, {'own decode' if decoded else 'our decode'}"


def _packed(read: Read, decoded: bool, builder: SequenceBuilder, budget: int) -> Iterator[PackedRow]:
    def build(key: str, image: Any, caption: str) -> TokenSequence:
        if not decoded:
            return builder.build(Document(key, (Image(image), Text(caption))))
        width, height = image.size
        pixels = scaled_by_pillow(image, fit_policy(width, height, builder.images))
        return captioned_sequence(builder, key, pixels, caption)

    for row in Packer(budget, "skip", SampleStats()).pack(build(*sample) for sample in read(decoded)):
        yield PackedRow(batch=pack_row(row, budget), keys=tuple(sequence.key for sequence in row))


def captioned_sequence(
    builder: SequenceBuilder, key: str, pixels: UInt8[np.ndarray, "H W 3"], caption: str
) -> TokenSequence:
    """Returns the builder's sequence for an image and a caption, given the decoded image."""
    patches = to_patches(pixels, builder.images.patch_size)
    text = builder.build(Document(key, (Text(caption),)))
    span = ImageSpan.of_grid(0, patches.rows, patches.cols, patches.padding)
    tokens = np.full(span.stop, builder.tokenizer.patch_id, np.int64)
    tokens[span.newline_positions] = builder.tokenizer.newline_id
    return TokenSequence(
        key=key,
        tokens=np.concatenate([tokens, text.tokens]),
        loss=np.concatenate([np.zeros(span.stop, bool), text.loss]),
        patches=patches.values,
        images=(span,),
    )


def _contents(rows: Iterator[PackedRow]) -> Contents:
    images = tokens = 0
    patches: Counter[tuple[str, int]] = Counter()
    for row in rows:
        images += len(row.batch.images)
        tokens += sum(row.batch.document_lengths)
        patches.update(zip(row.keys, (span.patches for span in row.batch.images), strict=True))
    return Contents(images, tokens, patches)


def _drain(rows: Callable[[], Iterator[PackedRow]]) -> None:
    for _ in rows():
        pass


def _difference(decode: Decode, samples: Sequence[Captioned], sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Returns by how many levels of 255 pixels differ from Pillow's."""
    largest, means = 0, []
    for sample, size in zip(samples, sizes, strict=True):
        difference = np.abs(decode(sample.image, size).astype(np.int16) - pillow(sample.image, size))
        largest = max(largest, int(difference.max()))
        means.append(float(difference.mean()))
    return {"max_difference": largest, "mean_difference": round(float(np.mean(means)), 4)}


def _versions() -> dict[str, str]:
    """Returns the versions of installed contenders."""
    found = {}
    for package, _ in (*DECODERS.values(), *READERS.values()):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _decoder_table(result: dict[str, Any]) -> Table:
    title = f"JPEG to pixels within {result['max_patches']:,} patches"
    table = Table("decoder", "images/s", "to Pillow", "differs by", "mean", title=title)
    seconds = {line["name"]: line["seconds"] for line in result["decoders"]}
    for line in sorted(result["decoders"], key=lambda line: line["seconds"]):
        ratio = seconds["Pillow"] / line["seconds"]
        table.add_row(line["name"], f"{line['images_per_second']:,.0f}", f"{ratio:.2f}",
                      str(line["max_difference"]), f"{line['mean_difference']:.4f}")  # fmt: skip
    return table


def _path_table(result: dict[str, Any]) -> Table:
    title = f"Shards to rows of {result['row_tokens']:,} tokens; bare decode is {result['bare']}"
    table = Table("whole path", "images/s", "tokens/s", "of bare", "of decode_image", "ours to it", title=title)
    for line in result["paths"]:
        ratios = (f"{line[key]:.2f}" for key in ("of_bare_decode", "of_own_decode", "ours_to_this"))
        table.add_row(line["name"], f"{line['images_per_second']:,.0f}", f"{line['tokens_per_second']:,}", *ratios)
    return table
