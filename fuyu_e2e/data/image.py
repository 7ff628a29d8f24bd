"""Images of any resolution: safe decoding, a patch budget instead of a fixed size, and raw patches.

An image keeps its native size. Only one that needs more patches than the budget is scaled down, with its aspect ratio,
until it fits; none is scaled up, cropped or squared. The bottom and right are padded to whole patches.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags
from PIL import Image as Pillow

from fuyu_e2e.errors import UnusableSampleError
from fuyu_e2e.model.image_layout import FUYU_LAYOUT, ImageLayout, ImagePolicy, View

try:
    import simplejpeg  # the extra `fast-jpeg`
except ImportError:
    simplejpeg = None

# Pillow's warnings (corrupt EXIF, huge sizes) are harmless or refused here. Filtered once for the process:
# `warnings.catch_warnings` around each image would hide warnings of other threads, such as a checkpoint's writer.
warnings.filterwarnings("ignore", module=r"PIL\.")

FORMATS = ("JPEG", "PNG", "WEBP")
"""The only Pillow decoders that untrusted bytes may reach."""
PADDING = 1
"""Pixel value that fills up the last patches: transformers' Fuyu pads images of 0..255 with 1.0."""
GROUND = (255, 255, 255)
"""The colour under transparent pixels."""

TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}
"""The transform that each EXIF orientation but the first requires."""
SIDEWAYS = range(5, 9)
"""Orientations that swap width and height."""


@dataclass(frozen=True)
class ImagePatches:
    """An image as `rows` x `cols` patches, row by row from the top."""

    rows: int
    cols: int
    values: UInt8[np.ndarray, "P C"]
    """Each patch flattened row, column, channel: the order of transformers' Fuyu."""
    padding: tuple[int, int] = (0, 0)
    """Rows of pixels at the bottom, and columns at the right, that only pad the last patches."""


def load_views(data: bytes, policy: ImagePolicy, layout: ImageLayout) -> tuple[ImagePatches, ...]:
    """Returns the patches of each view of an encoded image, which is decoded once.

    Raises:
        UnusableSampleError: As in `decode_image`.
    """
    pixels, views = _decode(data, policy, layout)
    scaled = {size: scale_pixels(pixels, size) for size in {view.size for view in views}}
    return tuple(to_patches(_crop(scaled[view.size], view), policy.patch_size) for view in views)


def _crop(pixels: UInt8[np.ndarray, "H W 3"], view: View) -> UInt8[np.ndarray, "h w 3"]:
    if view.crop is None:
        return pixels
    left, top, right, bottom = view.crop
    return pixels[top:bottom, left:right]


def decode_image(data: bytes, policy: ImagePolicy) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the pixels of an image as a person sees it, scaled down to the policy's largest size and patch budget.

    Applies EXIF rotation, puts transparency on white, scales 16-bit grey to 8 bits, and takes the first frame of an
    animation.

    Raises:
        UnusableSampleError: `image-empty`, `image-too-many-bytes`, `image-too-many-pixels` and `image-aspect` before
            anything is decoded; `image-unreadable` if Pillow can't read the image to its end.
        MemoryError: The machine is at fault, not the sample, so it is not skipped.
    """
    pixels, views = _decode(data, policy, FUYU_LAYOUT)
    return scale_pixels(pixels, views[0].size)


def _decode(
    data: bytes, policy: ImagePolicy, layout: ImageLayout
) -> tuple[UInt8[np.ndarray, "H W 3"], tuple[View, ...]]:
    """Returns the pixels of an image at a size that is large enough for all its views, and the views."""
    with _opened(data, policy) as image:
        native = image.size
        if image.format == "PNG":
            image.load()  # as its `getexif` does: EXIF may follow the pixels, whose damage is another matter
        orientation = _orientation(image.getexif)
        turned = orientation in SIDEWAYS
        views = layout.views(*(native[::-1] if turned else native), policy)
        size = max(view.size[0] for view in views), max(view.size[1] for view in views)
        pixels = _decoded(data, image, size[::-1] if turned else size)
    if turn := TURNS.get(orientation):
        pixels = turn(pixels).copy()
    return pixels, views


def check_image(data: bytes, policy: ImagePolicy) -> None:
    """Decodes an image to its end, as small as its format allows, and discards the result.

    Raises:
        UnusableSampleError: As in `decode_image`.
    """
    with _opened(data, policy) as image:
        _decoded(data, image, (1, 1))


def image_size(data: bytes, policy: ImagePolicy) -> tuple[int, int]:
    """Returns the width and height of an encoded image in pixels after EXIF rotation, without decoding it.

    Raises:
        UnusableSampleError: As in `decode_image`, as far as the header shows.
    """
    with _opened(data, policy) as image:
        # For PNG, Pillow's usual way reads all pixels to find EXIF after them; EXIF there is ignored here.
        turned = _orientation(partial(Pillow.Image.getexif, image)) in SIDEWAYS
        return image.size[::-1] if turned else image.size


@contextmanager
def _opened(data: bytes, policy: ImagePolicy) -> Iterator[Pillow.Image]:
    if not data:
        raise UnusableSampleError("image-empty")
    if len(data) > policy.max_bytes:
        raise UnusableSampleError("image-too-many-bytes", f"{len(data):,} bytes")
    try:
        with Pillow.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size, policy)
            yield image
    except (UnusableSampleError, MemoryError):
        raise
    except Pillow.DecompressionBombError as error:
        raise UnusableSampleError("image-too-many-pixels", str(error)) from error
    except Exception as error:  # Pillow's plugins raise nearly anything on bytes that are not what they claim to be
        # Pillow's message names the in-memory file object, which helps nobody.
        said = re.sub(r" <_io\.\w+ object at 0x\w+>", "", str(error))
        raise UnusableSampleError("image-unreadable", f"{type(error).__name__}: {said}") from error


def _check_size(width: int, height: int, policy: ImagePolicy) -> None:
    if width * height > policy.max_pixels:
        raise UnusableSampleError("image-too-many-pixels", f"{width} x {height}")
    if max(width, height) > policy.max_aspect * min(width, height):
        raise UnusableSampleError("image-aspect", f"{width} x {height}")


def _decoded(data: bytes, image: Pillow.Image, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """Returns an image's pixels, at least as large as `size` on both sides unless the image itself is smaller.

    A JPEG decodes at a fraction of its size if that is enough, rounded up; other formats decode whole.
    """
    native = image.size
    image.draft(None, size)
    _scale_transparent_colour(data, image)
    pixels = _jpeg_pixels(data, image, native)
    return np.asarray(_to_rgb(image)) if pixels is None else pixels


def _jpeg_pixels(data: bytes, image: Pillow.Image, native: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"] | None:
    """Returns the pixels of a JPEG of size `native` at the size of `image`; None if Pillow has to read it.

    The pixels equal Pillow's bit for bit. Everything that this decoder complains about is left to Pillow, so that it
    never changes which images are refused and why.
    """
    if simplejpeg is None or image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    try:
        # Never decodes another size than the one checked, even if two readers of the header differ.
        if simplejpeg.decode_jpeg_header(data)[1::-1] != native:
            return None
        pixels = simplejpeg.decode_jpeg(data, min_width=image.width, min_height=image.height)
    except ValueError:
        return None
    return pixels if pixels.shape[1::-1] == image.size else None


def _orientation(read_exif: Callable[[], Pillow.Exif]) -> int:
    """Returns the EXIF orientation of an image; 1, upright, if there is none that can be read."""
    try:
        return read_exif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # Pillow raises nearly anything on a damaged block; the pixels don't need it
        return 1


def _scale_transparent_colour(data: bytes, image: Pillow.Image) -> None:
    """Scales a PNG's transparent colour to the eight bits of Pillow's pixels, or removes it.

    With 16 bits, all colours that share the upper eight become transparent.
    """
    if image.format != "PNG" or (colour := image.info.get("transparency")) is None:
        return
    depth = data[24]  # in the header, the first chunk, at a fixed offset
    if image.mode in ("1", "L") and isinstance(colour, int):
        image.info["transparency"] = colour * 255 // (2**depth - 1)
    elif depth == 16 and isinstance(colour, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _to_rgb(image: Pillow.Image) -> Pillow.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip to white
        wide = np.asarray(image)
        grey = ((wide.astype(np.uint32) + 128) // 257).astype(np.uint8)
        grey[wide == image.info.get("transparency", -1)] = GROUND[0]
        return Pillow.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        return Pillow.alpha_composite(Pillow.new("RGBA", layered.size, (*GROUND, 255)), layered).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def scale_pixels(pixels: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns pixels at another size, by a triangle filter that widens with the scale: Pillow's, up to 2 of 255
    levels.

    torch takes a third of Pillow's time.
    """
    if pixels.shape[1::-1] == size:
        return pixels
    import torch  # takes seconds to import, and only images that are scaled need it

    image = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))[None].permute(0, 3, 1, 2)
    scaled = torch.nn.functional.interpolate(image, size[::-1], mode="bilinear", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


def to_patches(pixels: UInt8[np.ndarray, "H W 3"], patch_size: int) -> ImagePatches:
    """Returns pixels cut into patches; pads the last row and column with `PADDING`."""
    height, width = pixels.shape[:2]
    rows, cols = math.ceil(height / patch_size), math.ceil(width / patch_size)
    if (rows * patch_size, cols * patch_size) != (height, width):
        padded = np.empty((rows * patch_size, cols * patch_size, 3), np.uint8)
        padded[:height, :width] = pixels
        padded[height:] = padded[:, width:] = PADDING
        pixels = padded
    # Each row of a patch is moved as a single value, in less than half the time.
    lines = np.ascontiguousarray(pixels).ravel().view(f"V{patch_size * 3}").reshape(rows, patch_size, cols)
    values = lines.swapaxes(1, 2).ravel().view(np.uint8)
    padding = (rows * patch_size - height, cols * patch_size - width)
    return ImagePatches(rows, cols, values.reshape(rows * cols, patch_size * patch_size * 3), padding)


def to_pixels(patches: ImagePatches) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the pixels that patches were cut from, including padding."""
    side = math.isqrt(patches.values.shape[1] // 3)
    grid = patches.values.reshape(patches.rows, patches.cols, side, side, 3).swapaxes(1, 2)
    return grid.reshape(patches.rows * side, patches.cols * side, 3)
