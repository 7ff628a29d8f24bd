"""Images of any resolution: patches are slices, budgets hold, and nothing slips through."""

import io
import math
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from fuyu_e2e.errors import UnusableSampleError, UserError
from fuyu_e2e.image import PADDING, ImagePolicy, decode_image, fit_budget, load_patches, to_patches, to_pixels

POLICY = ImagePolicy(patch_size=8)


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encode(image: Pillow.Image | np.ndarray, file_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Pillow.Image) else Pillow.fromarray(image)).save(file, file_format, **options)
    return file.getvalue()


def rejection(data: bytes, policy: ImagePolicy = POLICY) -> str:
    with pytest.raises(UnusableSampleError) as caught:
        decode_image(data, policy)
    return caught.value.reason


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 50), (50, 1), (8, 8), (16, 24), (17, 23), (3, 600), (7, 9)],
    ids=["one pixel", "one row", "one column", "one patch", "aligned", "not a multiple", "very wide", "just over"],
)
@pytest.mark.parametrize("patch_size", [1, 8, 14])
def test_a_patch_is_exactly_that_slice_of_the_pixels(height: int, width: int, patch_size: int) -> None:
    image = pixels(height, width)
    patches = to_patches(image, patch_size)
    assert (patches.rows, patches.cols) == (math.ceil(height / patch_size), math.ceil(width / patch_size))
    for row in range(patches.rows):
        for col in range(patches.cols):
            expected = np.full((patch_size, patch_size, 3), PADDING, np.uint8)
            there = image[row * patch_size : (row + 1) * patch_size, col * patch_size : (col + 1) * patch_size]
            expected[: there.shape[0], : there.shape[1]] = there
            assert patches.values[row * patches.cols + col].tolist() == expected.ravel().tolist()


@given(height=st.integers(1, 70), width=st.integers(1, 70), patch_size=st.integers(1, 20))
def test_patches_put_together_are_the_image(height: int, width: int, patch_size: int) -> None:
    image = pixels(height, width, seed=height)
    together = to_pixels(to_patches(image, patch_size))
    assert (together[:height, :width] == image).all()
    assert (together[height:] == PADDING).all()
    assert (together[:, width:] == PADDING).all()


def test_patches_are_those_of_transformers_fuyu() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra `export`")
    torch = pytest.importorskip("torch")
    processor = pytest.importorskip("transformers.models.fuyu.image_processing_fuyu")
    assert transformers
    stock = (getattr(processor, "FuyuImageProcessorPil", None) or processor.FuyuImageProcessor)()
    image = pixels(40, 90)
    padded = np.full((60, 90, 3), stock.padding_value, np.float32)
    padded[:40] = image
    theirs = stock.patchify_image(torch.from_numpy(padded).permute(2, 0, 1)[None], {"height": 30, "width": 30})
    assert (theirs[0].numpy() == to_patches(image, 30).values).all()


@given(width=st.integers(1, 3_000), height=st.integers(1, 3_000), max_patches=st.integers(1, 400))
def test_the_budget_holds_and_is_used(width: int, height: int, max_patches: int) -> None:
    policy = ImagePolicy(patch_size=8, max_patches=max_patches)
    new_width, new_height = fit_budget(width, height, policy)
    patches = math.ceil(new_width / 8) * math.ceil(new_height / 8)
    assert patches <= max_patches
    if math.ceil(width / 8) * math.ceil(height / 8) <= max_patches:
        assert (new_width, new_height) == (width, height), "an image within the budget keeps its size"
        return
    assert new_width <= width
    assert new_height <= height
    scale = new_width / width if width >= height else new_height / height
    assert abs(new_width - width * scale) <= 1.5
    assert abs(new_height - height * scale) <= max(1.5, 0.5 / min(width, height) * max(width, height))
    next_width, next_height = (max(1, round(side * scale * 1.02 + 1)) for side in (width, height))
    assert math.ceil(next_width / 8) * math.ceil(next_height / 8) > max_patches, "it could have been larger"


def test_a_large_image_is_scaled_down_to_the_budget_and_looks_the_same() -> None:
    gradient = np.linspace(0, 255, 640, dtype=np.uint8)[None, :, None].repeat(480, 0).repeat(3, 2)
    policy = ImagePolicy(patch_size=16, max_patches=100)
    for file_format in ("PNG", "JPEG"):
        small = decode_image(encode(gradient, file_format), policy)
        assert math.ceil(small.shape[0] / 16) * math.ceil(small.shape[1] / 16) in range(80, 101)
        middle = small[small.shape[0] // 2, :, 0].astype(float)
        assert np.abs(middle - np.linspace(0, 255, len(middle))).max() < 6


# What slips through Pillow and webdataset by default, each with the behaviour that is right.


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_truncated_images_are_refused(file_format: str) -> None:
    whole = encode(pixels(64, 64), file_format)
    assert decode_image(whole, POLICY).shape == (64, 64, 3)
    assert rejection(whole[: len(whole) // 2]) == "image-unreadable"


def test_empty_and_garbage_images_are_refused() -> None:
    assert rejection(b"") == "image-empty"
    assert rejection(b"not an image at all") == "image-unreadable"
    assert rejection(encode(pixels(8, 8), "BMP")) == "image-unreadable"


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.linspace(0, 65_535, 256).astype(np.uint16)[None].repeat(4, 0)
    decoded = decode_image(encode(Pillow.fromarray(grey)), POLICY)
    assert decoded[0, :, 0].tolist() == list(range(256))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS"])
def test_transparent_pixels_show_the_white_ground_not_their_hidden_colour(mode: str) -> None:
    layered = np.zeros((8, 8, 4), np.uint8)
    layered[:, :4] = (200, 200, 200, 255)  # the right half is black, and not there
    image = Pillow.fromarray(layered)
    if mode == "LA":
        image = image.convert("LA")
    elif mode == "P":
        image = image.quantize()
    elif mode == "tRNS":
        image = image.convert("RGB")
        data = encode(image, transparency=(0, 0, 0))
    data = encode(image) if mode != "tRNS" else data
    decoded = decode_image(data, POLICY)
    assert (decoded[:, 4:] == 255).all()
    assert np.abs(decoded[:, :4].astype(int) - 200).max() < 3


def test_half_transparent_pixels_are_mixed_with_the_ground() -> None:
    layered = np.full((8, 8, 4), (0, 0, 0, 128), np.uint8)
    assert np.abs(decode_image(encode(layered), POLICY).astype(int) - 127).max() <= 1


def test_exif_rotation_is_applied() -> None:
    image = Pillow.fromarray(pixels(8, 24))
    exif = Pillow.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(image, exif=exif), POLICY).shape == (24, 8, 3)
    assert (decode_image(encode(image, exif=exif), POLICY) == np.rot90(np.asarray(image), -1)).all()


def header_only_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = zlib.compress(b"\0" * ((width + 1) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_small_file_of_100_megapixels_is_refused_before_it_is_decoded() -> None:
    bomb = header_only_png(10_000, 10_000)
    assert len(bomb) < 200_000
    started_at = time.process_time()
    assert rejection(bomb) == "image-too-many-pixels"
    assert time.process_time() - started_at < 0.05, "decoding it takes ten times as long"
    assert decode_image(header_only_png(100, 100), POLICY).shape == (100, 100, 3)


def test_sizes_that_pillow_itself_refuses_are_counted_alike() -> None:
    assert rejection(header_only_png(20_000, 10_000)) == "image-too-many-pixels"


def test_extreme_shapes_are_used_up_to_the_stated_limit() -> None:
    assert decode_image(encode(pixels(1, 1)), POLICY).shape == (1, 1, 3)
    assert decode_image(encode(pixels(1, 200)), POLICY).shape == (1, 200, 3)
    assert rejection(encode(pixels(1, 201))) == "image-aspect"
    assert rejection(encode(Pillow.new("L", (60_000, 1)))) == "image-aspect"


def test_a_file_of_too_many_bytes_is_not_opened() -> None:
    data = encode(pixels(30, 30))
    assert rejection(data, ImagePolicy(patch_size=8, max_bytes=len(data) - 1)) == "image-too-many-bytes"


@pytest.mark.parametrize("mode", ["CMYK", "L", "P", "1"])
def test_other_colour_modes_are_converted(mode: str) -> None:
    image = Pillow.new("RGB", (16, 16), (255, 255, 255)).convert(mode)
    data = encode(image, "JPEG" if mode == "CMYK" else "PNG")
    assert decode_image(data, POLICY).min() > 250


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(file_format: str) -> None:
    frames = [Pillow.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    options = {"save_all": True, "append_images": frames[1:], "duration": 100}
    if file_format == "WEBP":
        options["lossless"] = True
    decoded = decode_image(encode(frames[0], file_format, **options), POLICY)
    assert decoded[0, 0].tolist() == [255, 0, 0]


@given(data=st.data())
def test_damaged_images_are_refused_or_read_but_never_crash(data: st.DataObject) -> None:
    encoded = encode(pixels(20, 20), data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"])))
    damaged = bytearray(encoded)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    try:
        assert load_patches(bytes(damaged), POLICY).values.dtype == np.uint8
    except UnusableSampleError as error:
        assert error.reason.startswith("image-")


@pytest.mark.parametrize("name", ["patch_size", "max_patches", "max_pixels", "max_bytes", "max_aspect"])
def test_limits_that_refuse_everything_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 0"):
        ImagePolicy(**{"patch_size": 8} | {name: 0})
