"""Locations of shards: expands paths, globs, braces, folders and URLs."""

import glob
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import braceexpand
import fsspec

from fuyu_e2e.data.shards.extensions import COMPRESSED
from fuyu_e2e.errors import UserError

LISTED = ("s3", "gs", "gcs", "az", "abfs", "hf")
"""Schemes of stores that fsspec can list."""
WEB = ("http", "https")
"""Schemes of servers that can't be listed."""
REMOTE = (*WEB, *LISTED)
"""Schemes of shards that are downloaded."""


def expand_patterns(patterns: str | Sequence[str], *, allow_pipe: bool = False) -> tuple[str, ...]:
    """Returns the shards that paths, globs, brace patterns, folders and URLs name, each once, in the given order.

    Globs, and folders that end in a slash, are expanded if the store can list. Other URLs are not checked until they
    are fetched.

    Raises:
        UserError: A pattern matches nothing or compressed shards, its scheme is not allowed, or its store can't be
            listed.
    """
    shards: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        scheme = scheme_of(pattern)
        if scheme == "pipe" and not allow_pipe:
            raise UserError(
                f"{pattern} would run a command of your shell: set data.allow_pipe to true on the command line if you "
                "trust whoever wrote it."
            )
        if scheme not in ("", "file", "pipe"):
            check_scheme(pattern)
        try:
            # An existing path is not a pattern, even with brackets. A backslash in a command belongs to the shell.
            is_there = is_local(pattern) and local_path(pattern).exists()
            expanded = [pattern] if is_there else list(braceexpand.braceexpand(pattern, escape=scheme != "pipe"))
        except ValueError as error:
            raise UserError(f"{pattern!r} has braces that don't match ({error}): close each, or escape it.") from error
        found = sorted(shard for path in expanded for shard in _expand(path))
        beside = [] if found else [other for path in expanded for other in _compressed_instead(path)]
        if compressed := [shard for shard in [*found, *beside] if _is_compressed(shard)]:
            raise UserError(_unpack(compressed))
        named = (path for path in expanded if is_local(path) and not glob.has_magic(path))
        gone = [path for path in named if not local_path(path).exists()]
        if found and gone:
            raise UserError(f"{pattern!r} names {gone[0]}, which is not there: bring it back, or leave it out.")
        if not found:
            raise UserError(
                f"{pattern!r} matches no shard: see that it names .tar files or a folder of them, and quote a "
                "pattern on the command line so that the shell leaves it alone."
            )
        shards.update(dict.fromkeys(found))
    return tuple(shards)


def is_local(shard: str) -> bool:
    """Returns whether a shard is a file on this machine."""
    return scheme_of(shard) in ("", "file")


def folder_of(shard: str) -> str:
    """Returns the path or URL of a shard's folder, without a query; empty for a `pipe:` shard."""
    if is_local(shard):
        return str(local_path(shard).parent)
    return "" if scheme_of(shard) == "pipe" else without_query(shard).rpartition("/")[0]


def name_of(shard: str) -> str:
    """Returns the last name of a shard's path or URL, without a query; the whole `pipe:` shard."""
    if is_local(shard):
        return local_path(shard).name
    return shard if scheme_of(shard) == "pipe" else without_query(shard).rpartition("/")[2]


def open_store(url: str, timeout: float) -> tuple[Any, str]:
    """Returns fsspec's file system for a URL, and the file's path in it.

    fsspec keeps one file system for each process and set of options, and creates new ones after a fork.
    """
    scheme = scheme_of(url)
    options: dict[str, Any] = {}
    if scheme == "s3":
        # We retry ourselves: s3fs retries five times botocore's five, and would wait for minutes.
        options["config_kwargs"] = {
            "connect_timeout": timeout,
            "read_timeout": timeout,
            "retries": {"total_max_attempts": 1},
        }
    try:
        kind: Any = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        remedy = "install it with: pip install 'fuyu-e2e[s3]'" if scheme == "s3" else str(error)
        raise UserError(f"{shown(url)} needs a package that is not installed: {remedy}.") from error
    store = kind(**options, **kind._get_kwargs_from_urls(url))
    if scheme == "s3":
        store.retries = 1
    return store, kind._strip_protocol(url)


def _expand(path: str) -> list[str]:
    scheme = scheme_of(path)
    if scheme == "pipe":
        return [path]
    if is_local(path):
        path = str(local_path(path))
        if Path(path).is_dir():
            return _shards_among(str(file) for file in Path(path).iterdir())
        if Path(path).exists():
            return [path]
        return glob.glob(path, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    in_folder = path.endswith("/")
    pattern = f"{path}*" if in_folder else path
    if scheme in WEB:
        # Brackets in the host are an IPv6 address, and a question mark starts the query.
        if re.search(r"[*[]", without_query(pattern).split("/", 3)[-1]):
            raise UserError(
                f"{shown(path)}: a web server can't be asked which files it has; name each shard, or write a range "
                "in braces, such as {000..123}.tar."
            )
        return [path]
    if not re.search(r"[*?[]", pattern):
        return [path]
    host = path.split("/")[2]
    try:
        store, within = open_store(pattern, 30.0)
        store.invalidate_cache()
        found = [f"{scheme}://{host}/{name.partition('/')[2]}" for name in store.glob(within)]
        return _shards_among(found) if in_folder else found
    except UserError:
        raise
    except Exception as error:  # each store's client has its own errors
        raise UserError(f"{path} can't be listed ({error}): check its address and your credentials.") from error


def _shards_among(files: Iterable[str]) -> list[str]:
    """Returns the files of a folder that are shards, and compressed ones whose unpacked form is missing."""
    named = set(files)
    unpacked = {path: re.sub(r"[.](tar[.]gz|tgz)$", ".tar", path, flags=re.IGNORECASE) for path in named}
    return [path for path in named if path.endswith(".tar") or (_is_compressed(path) and unpacked[path] not in named)]


def _compressed_instead(path: str) -> list[str]:
    """Returns local compressed shards that match a path to missing uncompressed ones."""
    if not is_local(path) or not path.endswith(".tar"):
        return []
    stem = str(local_path(path)).removesuffix(".tar")
    return sorted(found for end in COMPRESSED for found in glob.glob(stem + end, recursive=True))  # noqa: PTH207


def _is_compressed(shard: str) -> bool:
    return scheme_of(shard) != "pipe" and name_of(shard).lower().endswith(COMPRESSED)


def _unpack(shards: Sequence[str]) -> str:
    """Returns the message that refuses compressed shards, with the command that unpacks them."""
    others = f" and {len(shards) - 1:,} more" if len(shards) > 1 else ""
    said = f"{shown(shards[0])}{others} can't be read sample by sample, being compressed: "
    local = [local_path(shard) for shard in shards if is_local(shard)]
    if not local:
        return said + f"download it, unpack it with `gunzip {shlex.quote(name_of(shards[0]))}`, and upload the .tar."
    if len(local) <= 3:
        named = [shlex.quote(str(path)) for path in local]
    else:
        ends = {
            (str(path.parent), next(end for end in COMPRESSED if path.name.lower().endswith(end))) for path in local
        }
        named = [f"{shlex.quote(folder)}/*{end}" for folder, end in sorted(ends)]
    return said + f"unpack with `gunzip {' '.join(named)}`, and name the .tar."


def check_scheme(url: str) -> None:
    if scheme_of(url) not in REMOTE or "://" not in url:
        raise UserError(
            f"{url} has a scheme that shards are not read from: name a local path, or a URL that begins with "
            f"{', '.join(f'{scheme}://' for scheme in REMOTE)} or file://."
        )


def scheme_of(shard: str) -> str:
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", shard)
    return match[1].lower() if match else ""


def local_path(shard: str) -> Path:
    return Path(re.sub("^file:(//(localhost(?=/))?)?", "", shard, flags=re.IGNORECASE))


def without_query(url: str) -> str:
    return re.split("[?#]", url)[0] if scheme_of(url) in WEB else url


def shown(shard: str) -> str:
    """Returns a shard's name for messages, without the secrets of a signed URL."""
    return re.sub("(?<=//)[^/@]*@", "", without_query(shard)) if scheme_of(shard) in WEB else shard
