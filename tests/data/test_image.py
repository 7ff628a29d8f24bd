"""Images of any resolution: patches are slices, budgets hold, and nothing slips through."""

import contextlib
import io
import math
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, ImageOps
from PIL import Image as Pillow

from fuyu_e2e.data import image as image_module
from fuyu_e2e.data.image import (
    PADDING,
    check_image,
    decode_image,
    image_size,
    load_views,
    to_patches,
    to_pixels,
)
from fuyu_e2e.errors import UnusableSampleError, UserError
from fuyu_e2e.model.image_layout import FUYU_LAYOUT, ImagePolicy, fit_policy

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


@pytest.mark.parametrize(("height", "width"), [(60, 90), (40, 90), (60, 71), (31, 1)])
def test_patches_are_those_of_transformers_fuyu(height: int, width: int) -> None:
    pytest.importorskip("transformers", reason="needs the extra `export`")
    # The processor on Pillow, which unlike the other needs no torchvision.
    from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

    image = pixels(height, width)
    ours = to_patches(image, 30)
    stock = FuyuImageProcessorPil(
        size={"height": ours.rows * 30, "width": ours.cols * 30}, do_rescale=False, do_normalize=False
    )
    theirs = stock.patchify_image(stock([[image]], input_data_format="channels_last")["images"][0][0])
    assert (theirs == ours.values).all()


def patch_count(width: int, height: int) -> int:
    return math.ceil(width / 8) * math.ceil(height / 8)


@given(width=st.integers(1, 3_000), height=st.integers(1, 3_000), max_patches=st.integers(1, 400))
def test_the_budget_holds_and_is_used(width: int, height: int, max_patches: int) -> None:
    policy = ImagePolicy(patch_size=8, max_patches=max_patches)
    new_width, new_height = fit_policy(width, height, policy)
    assert patch_count(new_width, new_height) <= max_patches
    if patch_count(width, height) <= max_patches:
        assert (new_width, new_height) == (width, height), "an image within the budget keeps its size"
        return
    longer, shorter = max(width, height), min(width, height)
    new_longer, new_shorter = (new_width, new_height) if width >= height else (new_height, new_width)
    assert new_longer < longer
    assert abs(new_shorter - shorter * new_longer / longer) <= 1, "it keeps its aspect ratio"
    next_shorter = max(1, round(shorter * (new_longer + 0.51) / longer))
    assert patch_count(new_longer + 1, next_shorter) > max_patches, "it could have been larger"


@given(width=st.integers(1, 3_000), height=st.integers(1, 3_000), rows=st.integers(1, 30), cols=st.integers(1, 30))
def test_an_image_over_the_largest_size_is_scaled_to_fit_it(width: int, height: int, rows: int, cols: int) -> None:
    policy = ImagePolicy(patch_size=8, max_patches=900, max_size=(rows * 8, cols * 8))
    new_width, new_height = fit_policy(width, height, policy)
    assert new_height <= rows * 8
    assert new_width <= cols * 8
    if height <= rows * 8 and width <= cols * 8:
        assert (new_width, new_height) == (width, height)
    else:
        scale = min(rows * 8 / height, cols * 8 / width)
        assert abs(new_width - width * scale) <= 1
        assert abs(new_height - height * scale) <= 1


def test_the_largest_size_holds_for_an_image_as_it_is_turned() -> None:
    exif = Pillow.Exif()
    exif[ExifTags.Base.Orientation] = 6
    policy = ImagePolicy(patch_size=8, max_size=(16, 64))
    assert decode_image(encode(Pillow.new("RGB", (16, 64)), "PNG", exif=exif), policy).shape == (16, 64, 3)
    assert decode_image(encode(Pillow.new("RGB", (16, 64)), "PNG"), policy).shape == (16, 4, 3)
    with pytest.raises(UserError, match=r"max_size is \[12, 64\].*multiples of the patch size 8"):
        ImagePolicy(patch_size=8, max_size=(12, 64))


@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    max_patches=st.integers(1, 60),
    file_format=st.sampled_from(["JPEG", "PNG", "WEBP"]),
    orientation=st.integers(0, 9),
)
def test_the_size_does_not_depend_on_format_or_orientation(
    width: int, height: int, max_patches: int, file_format: str, orientation: int
) -> None:
    policy = ImagePolicy(patch_size=8, max_patches=max_patches, max_aspect=400.0)
    exif = Pillow.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    decoded = decode_image(encode(Pillow.new("RGB", (width, height)), file_format, exif=exif), policy)
    expected = fit_policy(width, height, policy)
    assert decoded.shape[:2] == (expected if orientation in (5, 6, 7, 8) else expected[::-1])


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
    with pytest.raises(UnusableSampleError) as error:
        decode_image(b"not an image at all", POLICY)
    assert "object at" not in str(error.value)
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


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("block", [b"GARBAGE!" * 3, b"Exif\0\0II", b"Exif\0\0MM\0*\0\0\0\xff"])
def test_damaged_exif_turns_nothing_and_costs_no_image(file_format: str, block: bytes) -> None:
    data = encode(Pillow.new("RGB", (24, 8), (200, 30, 30)), file_format, exif=block)
    assert decode_image(data, POLICY).shape == (8, 24, 3)
    assert image_size(data, POLICY) == (24, 8)
    check_image(data, POLICY)


def test_exif_rotation_is_applied() -> None:
    image = Pillow.fromarray(pixels(8, 24))
    exif = Pillow.Exif()
    exif[ExifTags.Base.Orientation] = 6
    assert decode_image(encode(image, exif=exif), POLICY).shape == (24, 8, 3)
    assert (decode_image(encode(image, exif=exif), POLICY) == np.rot90(np.asarray(image), -1)).all()


def raw_png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 0, **before: bytes) -> bytes:
    """A PNG, grey unless `colour` is 2, whose rows need not be what its header says, with the chunks `before` them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    others = b"".join(chunk(kind.encode(), data) for kind, data in before.items())
    return b"\x89PNG\r\n\x1a\n" + header + others + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_grey_that_is_marked_transparent_is_white() -> None:
    data = raw_png(2, 1, b"\0" + struct.pack(">2H", 300, 0), depth=16, tRNS=struct.pack(">H", 300))
    assert decode_image(data, POLICY)[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_grey_of_few_bits_that_is_marked_transparent_is_white(depth: int) -> None:
    """Every value of the depth in a row of its own, one of them transparent."""
    highest = 2**depth - 1
    rows = b"".join(bytes([0, value << (8 - depth)]) for value in range(highest + 1))
    for hidden in range(0, highest + 1, 1 if depth < 8 else 51):
        data = raw_png(1, highest + 1, rows, depth=depth, tRNS=struct.pack(">H", hidden))
        shown = [255 if value == hidden else value * 255 // highest for value in range(highest + 1)]
        assert decode_image(data, ImagePolicy(patch_size=8, max_aspect=256.0))[:, 0, 0].tolist() == shown


def test_a_16_bit_colour_that_is_marked_transparent_is_white() -> None:
    pixels = [(0x1234, 0x5678, 0x9ABC), (0x1234, 0x5678, 0x0000)]
    rows = b"\0" + b"".join(struct.pack(">3H", *pixel) for pixel in pixels)
    data = raw_png(2, 1, rows, depth=16, colour=2, tRNS=struct.pack(">3H", *pixels[0]))
    assert decode_image(data, POLICY)[0].tolist() == [[255, 255, 255], [0x12, 0x56, 0x00]]


def test_a_small_file_of_100_megapixels_is_refused() -> None:
    bomb = raw_png(10_000, 10_000, b"\0" * (10_001 * 10_000))
    assert len(bomb) < 200_000
    assert rejection(bomb) == "image-too-many-pixels"


def test_a_small_file_of_much_text_is_refused() -> None:
    text = b"comment\0\0" + zlib.compress(bytes(2_000_000))
    assert rejection(raw_png(1, 1, b"\0\0", zTXt=text)) == "image-unreadable"


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (8193, 8192, "image-too-many-pixels"),
        (20_000, 10_000, "image-too-many-pixels"),
        (2_001, 10, "image-aspect"),
        (8192, 8192, "image-unreadable"),
    ],
    ids=["over our limit", "over Pillow's own limit", "too long", "within the limits"],
)
def test_sizes_are_judged_by_the_header_before_anything_is_decoded(width: int, height: int, reason: str) -> None:
    assert rejection(raw_png(width, height, b"rows that can't be decoded")) == reason


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


@given(
    start=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8 "]),
    rest=st.binary(min_size=1, max_size=200),
)
def test_random_bytes_are_refused(start: bytes, rest: bytes) -> None:
    assert rejection(start + rest).startswith("image-")


@given(data=st.data())
def test_damaged_images_are_refused_or_read_but_never_crash(data: st.DataObject) -> None:
    encoded = encode(pixels(20, 20), data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"])))
    damaged = bytearray(encoded)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    with contextlib.suppress(UnusableSampleError):
        assert load_views(bytes(damaged), POLICY, FUYU_LAYOUT)[0].values.dtype == np.uint8


def test_warnings_of_other_threads_are_shown_while_an_image_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that could not be written says so from a thread, at any moment."""

    def check_size_while_a_thread_warns(width: int, height: int, policy: ImagePolicy) -> None:
        thread = threading.Thread(target=warnings.warn, args=("The checkpoint could not be written.",))
        thread.start()
        thread.join()

    monkeypatch.setattr(image_module, "_check_size", check_size_while_a_thread_warns)
    with pytest.warns(UserWarning, match="could not be written"):
        decode_image(encode(pixels(8, 8)), POLICY)


def test_lack_of_memory_is_not_blamed_on_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    data = encode(pixels(8, 8))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", exhausted)
    with pytest.raises(MemoryError):
        decode_image(data, POLICY)


@pytest.mark.parametrize("name", ["patch_size", "max_patches", "max_pixels", "max_bytes"])
def test_limits_that_refuse_everything_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 0"):
        ImagePolicy(**{"patch_size": 8} | {name: 0})


@pytest.mark.parametrize("max_aspect", [0.5, float("nan")])
def test_an_aspect_that_no_image_has_is_refused(max_aspect: float) -> None:
    with pytest.raises(UserError, match="max_aspect is"):
        ImagePolicy(patch_size=8, max_aspect=max_aspect)


# The faster JPEG decoder, where it is installed, changes nothing but the time.


def outcome(data: bytes, policy: ImagePolicy) -> str | list:
    try:
        return decode_image(data, policy).tolist()
    except UnusableSampleError as error:
        return error.reason


def same_without_simplejpeg(data: bytes, policy: ImagePolicy) -> bool:
    pytest.importorskip("simplejpeg", reason="needs the extra `fast-jpeg`")
    with pytest.MonkeyPatch.context() as patch:
        fast = outcome(data, policy)
        patch.setattr(image_module, "simplejpeg", None)
        return fast == outcome(data, policy)


def smooth(height: int, width: int) -> np.ndarray:
    small = Pillow.fromarray(pixels(5, 5, seed=height))
    return np.asarray(small.resize((width, height), Pillow.Resampling.BICUBIC))


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    max_patches=st.integers(1, 200),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    quality=st.integers(20, 100),
    subsampling=st.integers(0, 2),
    progressive=st.booleans(),
    orientation=st.integers(0, 9),
)
def test_jpegs_have_the_same_pixels_with_either_decoder(
    width: int,
    height: int,
    max_patches: int,
    mode: str,
    quality: int,
    subsampling: int,
    progressive: bool,
    orientation: int,
) -> None:
    exif = Pillow.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = Pillow.fromarray(smooth(height, width)).convert(mode)
    options = {"quality": quality, "progressive": progressive, "exif": exif}
    if mode == "RGB":
        options["subsampling"] = subsampling
    policy = ImagePolicy(patch_size=8, max_patches=max_patches, max_aspect=400.0)
    assert same_without_simplejpeg(encode(image, "JPEG", **options), policy)


def test_the_faster_decoder_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    simplejpeg = pytest.importorskip("simplejpeg", reason="needs the extra `fast-jpeg`")
    used = []
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg", lambda data, **options: used.append(data) or decode(data, **options)
    )
    files = [encode(smooth(90, 100), "JPEG"), encode(smooth(400, 300), "JPEG"), encode(smooth(90, 100), "PNG")]
    for data in files:
        decode_image(data, ImagePolicy(patch_size=8, max_patches=200))
    assert used == files[:2]


@given(data=st.data(), cut=st.booleans())
def test_damaged_jpegs_have_the_same_fate_with_either_decoder(data: st.DataObject, cut: bool) -> None:
    encoded = bytearray(encode(smooth(64, 90), "JPEG", progressive=data.draw(st.booleans())))
    if cut:
        encoded = encoded[: data.draw(st.integers(0, len(encoded) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    assert same_without_simplejpeg(bytes(encoded), ImagePolicy(patch_size=8, max_patches=50))


@given(
    width=st.integers(2, 400),
    height=st.integers(2, 400),
    max_patches=st.integers(1, 600),
    orientation=st.integers(1, 8),
)
def test_images_are_turned_and_scaled_as_pillow_does_it(
    width: int, height: int, max_patches: int, orientation: int
) -> None:
    exif = Pillow.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = Pillow.fromarray(pixels(height, width))
    policy = ImagePolicy(patch_size=8, max_patches=max_patches, max_aspect=400.0)
    decoded = decode_image(encode(image, exif=exif), policy)
    image.getexif()[ExifTags.Base.Orientation] = orientation
    expected = ImageOps.exif_transpose(image).resize(decoded.shape[1::-1], Pillow.Resampling.BILINEAR)
    assert np.abs(decoded.astype(int) - np.asarray(expected)).max() <= 2


@given(st.data())
def test_a_check_refuses_what_decoding_refuses(data: st.DataObject) -> None:
    """At whatever size a policy has an image decoded, and for the same reason."""
    form = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    height, width = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    file = io.BytesIO()
    pixels = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), np.uint8)
    Pillow.fromarray(pixels).save(file, form)
    damaged = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(0, 2))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    cut = bytes(damaged[: data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))])
    policy = ImagePolicy(patch_size=8, max_patches=data.draw(st.sampled_from([1, 9, 1024])))
    reasons = []
    for read in (decode_image, check_image):
        try:
            read(cut, policy)
            reasons.append("")
        except UnusableSampleError as error:
            reasons.append(error.reason)
    assert reasons[0] == reasons[1]
