"""What the last part of a member's or file's extension says about its content."""

import re

IMAGES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp")
"""Images that can be read."""
UNREAD_IMAGES = """avif bmp dng emf eps exr gif hdr heic heif ico j2k jp2 jxl nef pbm pdf pgm pnm ppm psd svg tga tif
    tiff wmf xcf"""
UNREAD_SOUND = "aac aif aiff flac m4a mp3 oga ogg opus wav wma"
UNREAD_FILMS = "3gp avi flv m4v mkv mov mp4 mpeg mpg ogv webm wmv"
UNREAD_LISTS = "jpgs videos"
"""Lists of images or films in one member, pickled, which Megatron-Energon reads."""
UNREAD = frozenset(f"{UNREAD_IMAGES} {UNREAD_SOUND} {UNREAD_FILMS} {UNREAD_LISTS}".split())
"""Media that can't be read: a text next to them is about something that the model would not see."""
SIGNATURE = re.compile(rb"(?P<jpg>\xff\xd8\xff)|(?P<png>\x89PNG\r\n\x1a\n)|(?P<webp>RIFF.{4}WEBP)", re.DOTALL)
"""First bytes of JPEG, PNG and WebP, which identify image files in tables."""
COMPRESSED = (".tar.gz", ".tgz")
"""Extensions of shards that must be unpacked, since samples are read from them in any order."""


def image_extension(data: bytes) -> str | None:
    """Returns the extension of an image by its first bytes; None for other data."""
    found = SIGNATURE.match(data)
    return found and found.lastgroup


def last_extension(name: str) -> str:
    """Returns the part of a name after its last dot in lower case; the whole name if it has no dot."""
    return name.rpartition(".")[2].lower()


def is_media(extension: str) -> bool:
    """Returns whether an extension, which may have several parts, is that of an image, sound or film."""
    last = last_extension(extension)
    return last in IMAGES or last in UNREAD
