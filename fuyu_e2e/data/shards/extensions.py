"""What the last part of a member's or file's extension says that it holds."""

IMAGES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp")
"""Images that are read."""
UNREAD_IMAGES = """avif bmp dng emf eps exr gif hdr heic heif ico j2k jp2 jxl nef pbm pdf pgm pnm ppm psd svg tga tif
    tiff wmf xcf"""
UNREAD_SOUND = "aac aif aiff flac m4a mp3 oga ogg opus wav wma"
UNREAD_FILMS = "3gp avi flv m4v mkv mov mp4 mpeg mpg ogv webm wmv"
UNREAD_LISTS = "jpgs videos"
"""Several images or films in one member, pickled, which Megatron-Energon reads."""
UNREAD = frozenset(f"{UNREAD_IMAGES} {UNREAD_SOUND} {UNREAD_FILMS} {UNREAD_LISTS}".split())
"""What is not read: a text beside it speaks of what the model would not see."""
SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}
"""The first bytes of JPEG and PNG, which image files in a table are told by."""
COMPRESSED = (".tar.gz", ".tgz")
"""How the names of shards end that have to be unpacked: samples are read where they stand, in any order."""
TEXTS = ("txt", "json")
"""Text beside an image, or a sample by itself."""


def image_extension(data: bytes) -> str | None:
    """Returns the extension of an image by its first bytes; None where it is of no kind that is read."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((extension for begins, extension in SIGNATURES.items() if data.startswith(begins)), None)


def last_extension(name: str) -> str:
    """Returns the part of a name after its last dot, in lower case; the whole of a name without a dot."""
    return name.rpartition(".")[2].lower()


def is_media(extension: str) -> bool:
    """Returns whether an extension, which may have several parts, is that of an image, sound or film."""
    last = last_extension(extension)
    return last in IMAGES or last in UNREAD
