"""Draws depth: for each image, how many routed blocks each patch passed; and the text in the same colours."""

import itertools

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from fuyu_e2e.data.tokenizer import SPACE, Tokenizer
from fuyu_e2e.inference.depth import TokenDepth

WIDTH = 960
"""Width of a picture in pixels."""
PICTURE_HEIGHT = 420
"""Largest height of an enlarged image, in pixels."""
MARGIN = 16
LINE = 34
"""Distance between lines of text, in pixels."""
INK, GROUND = (30, 30, 30), (255, 255, 255)
SCALE = (
    (0.0, (247, 247, 247)),
    (0.25, (254, 217, 118)),
    (0.5, (253, 141, 60)),
    (0.75, (227, 26, 28)),
    (1.0, (110, 0, 60)),
)
"""Colours from no routed block to all of them, light to dark, so that they read in grey too."""


def depth_map(depth: TokenDepth, tokenizer: Tokenizer) -> Pillow.Image:
    """Draws the images of a prompt, each next to its heat map, then the text, a legend and the shares by type."""
    most = len(depth.blocks)
    panels = [_panel(*drawn, most) for drawn in _images(depth)]
    font = ImageFont.load_default(20)
    lines = _lines(depth, tokenizer, font)
    height = sum(panel.height + MARGIN for panel in panels) + LINE * (len(lines) + 3) + 2 * MARGIN
    sheet = Pillow.new("RGB", (WIDTH, height), GROUND)
    pen = ImageDraw.Draw(sheet)
    top = MARGIN
    for panel in panels:
        sheet.paste(panel, (MARGIN, top))
        top += panel.height + MARGIN
    for line in lines:
        left = MARGIN
        for piece, share in line:
            width = int(pen.textlength(piece, font=font)) + 8
            pen.rectangle([left, top, left + width - 2, top + LINE - 8], fill=colour(share), outline=(200, 200, 200))
            pen.text((left + 4, top + 1), piece, fill=INK if share < 0.6 else GROUND, font=font)
            left += width
        top += LINE
    _legend(pen, depth, top + MARGIN // 2, font)
    return sheet


def colour(share: float) -> tuple[int, int, int]:
    """Returns the colour of a share between 0 and 1."""
    for (low, start), (high, end) in itertools.pairwise(SCALE):
        if share <= high:
            part = (share - low) / (high - low)
            red, green, blue = (round(a + (b - a) * part) for a, b in zip(start, end, strict=True))
            return red, green, blue
    return SCALE[-1][1]


def _images(depth: TokenDepth) -> list[tuple[UInt8[np.ndarray, "H W 3"], Float[np.ndarray, "rows cols"]]]:
    """Returns the pixels of each view of each image, and the fraction of routed blocks that each of its patches
    passed.

    Returns nothing if the images' embeddings don't correspond to patches.
    """
    spans = depth.sequence.images
    if any(span.places != span.patches for span in spans):
        return []
    passed = (depth.counts / len(depth.blocks)).numpy()[depth.sequence.patch_positions]
    grids = [grid for span in spans for grid in span.grids]
    ends = np.cumsum([rows * cols for rows, cols in grids])
    shares = [part.reshape(grid) for part, grid in zip(np.split(passed, ends[:-1]), grids, strict=False)]
    return list(zip(depth.sequence.pictures, shares, strict=True))


def _panel(pixels: UInt8[np.ndarray, "H W 3"], shares: Float[np.ndarray, "rows cols"], most: int) -> Pillow.Image:
    height, width = pixels.shape[:2]
    scale = min((WIDTH - 3 * MARGIN) / 2 / width, PICTURE_HEIGHT / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    plain = Pillow.fromarray(pixels).resize(size, Pillow.Resampling.NEAREST)
    heat = np.array([[colour(float(share)) for share in row] for row in shares], np.uint8)
    hot = Pillow.fromarray(heat).resize(size, Pillow.Resampling.NEAREST)
    # The light and dark of the picture stay visible through the colours.
    hot = Pillow.blend(hot, plain.convert("L").convert("RGB"), 0.25)
    pen = ImageDraw.Draw(hot)
    rows, cols = shares.shape
    if (side := min(size[0] // cols, size[1] // rows)) >= 20:
        font = ImageFont.load_default(max(10, side // 3))
        for (row, col), share in np.ndenumerate(shares):
            place = ((col + 0.5) * size[0] / cols, (row + 0.5) * size[1] / rows)
            ink = INK if share < 0.6 else GROUND
            pen.text(place, str(round(float(share) * most)), fill=ink, font=font, anchor="mm")
    panel = Pillow.new("RGB", (2 * size[0] + MARGIN, size[1]), GROUND)
    panel.paste(plain, (0, 0))
    panel.paste(hot, (size[0] + MARGIN, 0))
    return panel


def _lines(
    depth: TokenDepth, tokenizer: Tokenizer, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[list[tuple[str, float]]]:
    """Returns the tokens outside images, broken into lines, each with its share of blocks."""
    inside = {place for span in depth.sequence.images for place in range(span.start, span.stop)}
    tokens = [*depth.sequence.tokens.tolist(), *depth.continuation]
    lines: list[list[tuple[str, float]]] = [[]]
    used = 0.0
    for place, token in enumerate(tokens):
        if place in inside:
            continue
        piece = tokenizer.piece(token).replace(SPACE, "\u00b7")  # Pillow's own font lacks sentencepiece's space
        width = font.getlength(piece) + 8
        if used + width > WIDTH - 2 * MARGIN and lines[-1]:
            lines.append([])
            used = 0.0
        lines[-1].append((piece, float(depth.counts[place]) / len(depth.blocks)))
        used += width
    return lines if lines[0] else []


def _legend(
    pen: ImageDraw.ImageDraw, depth: TokenDepth, top: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    most, left = len(depth.blocks), MARGIN
    pen.text((left, top), "routed blocks passed:", fill=INK, font=font)
    left += int(pen.textlength("routed blocks passed: ", font=font))
    for count in range(most + 1):
        pen.rectangle([left, top, left + 30, top + LINE - 8], fill=colour(count / most), outline=(200, 200, 200))
        ink = INK if count / most < 0.6 else GROUND
        pen.text((left + 15, top + 12), str(count), fill=ink, font=font, anchor="mm")
        left += 34
    shares = ", ".join(f"{name} {share:.0%}" for name, share in depth.shares.items())
    pen.text((MARGIN, top + LINE), f"share of depth: {shares}", fill=INK, font=font)
