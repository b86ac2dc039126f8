"""Keyed hashes instead of patient ids: equal ids stay equal, and without the key none is known."""

import hmac
from collections.abc import Iterable
from pathlib import Path

from medft.data.source_file import open_regular
from medft.data.source_section import SourceSection, columns_of
from medft.data.sources import SourcesFile
from medft.data.table_row import Rejected
from medft.errors import RecipeError

MIN_KEY_BYTES = 16
"""Bytes of the shortest key that is accepted."""

_MAX_KEY_BYTES = 2**16

_SHOWN_DIGITS = 32


def group_key_of(spec: SourcesFile, root: Path) -> bytes | None:
    """The key of SOURCES.yaml; None without.

    Args:
        spec: the content of SOURCES.yaml.
        root: its folder.

    Raises:
        RecipeError: the file is missing or short, or a source writes its groups in the clear.
    """
    if spec.group_key is None:
        return None
    for source in spec.sources:
        _check_group_stays_hidden(source)
    return read_group_key(root / spec.group_key)


def read_group_key(path: Path) -> bytes:
    """The content of a key file, without the line end that editors append.

    Raises:
        RecipeError: it cannot be read, or is too short to be a secret.
    """
    try:
        with open_regular(path, max_bytes=_MAX_KEY_BYTES) as file:
            key = file.read().rstrip(b"\r\n")
    except (OSError, ValueError, Rejected) as error:
        detail = error.detail if isinstance(error, Rejected) else "not a path"
        reason = getattr(error, "strerror", None) or detail
        raise RecipeError(
            f"expected group_key to name a file with a secret of at least {MIN_KEY_BYTES} bytes, "
            f"could not read {path} ({reason}): write one, as with openssl rand -hex 32"
        ) from error
    if len(key) < MIN_KEY_BYTES:
        raise RecipeError(
            f"expected at least {MIN_KEY_BYTES} bytes in the file of group_key {path}, it has "
            f"{len(key)}: write a longer secret, as with openssl rand -hex 32"
        )
    return key


def keyed(ids: Iterable[str], key: bytes) -> list[str]:
    """HMAC-SHA256 of each id, shortened to 128 bits, in hexadecimal."""
    return [
        hmac.digest(key, text.encode(errors="surrogatepass"), "sha256").hex()[:_SHOWN_DIGITS]
        for text in ids
    ]


def _check_group_stays_hidden(source: SourceSection) -> None:
    read = {
        "keep": source.keep,
        "text": columns_of(source.text),
        "question": columns_of(source.question) if source.question else [],
        "license": [source.license["column"]] if isinstance(source.license, dict) else [],
        "language": [source.language["column"]] if isinstance(source.language, dict) else [],
    }
    places = [name for name, columns in read.items() if source.group in columns]
    if source.group is not None and places:
        raise RecipeError(
            f"expected group_key to hide the column {source.group} of source {source.name}, "
            f"{' and '.join(places)} would write it in the clear: take it out there"
        )
