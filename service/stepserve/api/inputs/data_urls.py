"""Images inside the body as text: `data:` URLs as the world writes them, and bare base64.

What media type is declared is of no meaning: the content decides.
"""

from __future__ import annotations

import base64
import binascii
from urllib.parse import unquote_to_bytes

from stepserve.domain.checks.wording import shown
from stepserve.domain.errors import InvalidRequestError

SCHEME = "data:"
BASE64 = "base64"
MOST_HEADER_CHARACTERS = 500
FILE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")

MOST_ESCAPED_CHARACTERS = 2**20
"""Of data that is no base64: every escape costs many times its length in memory."""

SPACE = b" \t\r\n\f\v"
"""Base64 is often wrapped into lines."""

URL_SAFE = bytes.maketrans(b"-_", b"+/")
ESCAPES = (
    (b"%2b", b"+"),
    (b"%2f", b"/"),
    (b"%3d", b"="),
    (b"%2d", b"-"),
    (b"%5f", b"_"),
    *((b"%%%02x" % space, b"") for space in SPACE),
)
"""What of base64 may be written in the way of addresses."""


def is_address(text: str) -> bool:
    """Whether a text is an address, which names a scheme; base64 has no colon."""
    return ":" in text[:MOST_HEADER_CHARACTERS]


def is_data_url(text: str) -> bool:
    """Whether a text is an image itself, with a `data:` before it."""
    return text[: len(SCHEME)].lower() == SCHEME


def read_data_url(url: str, field: str) -> bytes:
    """Return what a `data:` URL holds.

    Raises:
        InvalidRequestError: names `field`; the URL has no data, or is not encoded as it says.
    """
    header, comma, data = url[len(SCHEME) :].partition(",")
    if not comma or len(header) > MOST_HEADER_CHARACTERS:
        raise InvalidRequestError(
            f"{field} must be written as 'data:image/png;base64,' and the data, got {shown(url)}",
            field,
        )
    if header.rpartition(";")[2].strip().lower() == BASE64:
        return read_base64(data, field)
    if len(data) > MOST_ESCAPED_CHARACTERS:
        raise InvalidRequestError(
            f"{field} is a 'data:' URL of {len(data)} characters without ';base64'; the limit is "
            f"{MOST_ESCAPED_CHARACTERS}: write it in base64",
            field,
        )
    return unquote_to_bytes(data)


def read_base64(text: str, field: str) -> bytes:
    """Return what base64 stands for: of either alphabet, wrapped or not, padded or not.

    Raises:
        InvalidRequestError: names `field`; it is no base64.
    """
    try:
        return _decode(text.encode("ascii"))
    except (binascii.Error, UnicodeEncodeError) as error:
        raise InvalidRequestError(
            f"{field} has wrong base64: it must be a 'data:' URL, an address or an image file in "
            f"base64, got {shown(text)}{_file_hint(text, field)}",
            field,
        ) from error


def _file_hint(text: str, field: str) -> str:
    """What to do about the name of a file where the file itself is wanted."""
    # Inside of lists, files have names of their own.
    is_name = field.isalpha() and text.lower().endswith(FILE_ENDINGS)
    return f"; a form sends the file itself with curl -F {field}=@image.png" if is_name else ""


def _decode(digits: bytes) -> bytes:
    if b"%" in digits:
        for escape, meant in ESCAPES:
            digits = digits.replace(escape, meant).replace(escape.upper(), meant)
    digits = digits.translate(URL_SAFE, SPACE).rstrip(b"=")
    return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
