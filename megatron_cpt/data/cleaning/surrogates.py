"""Lone surrogates, which are halves of characters and no text: U+FFFD takes their place.

Programs leave them as an escape in JSON (`\\ud83d` without its second half) or as three bytes that are no UTF-8. Two halves that
follow each other are one character, and are joined.
"""

import re

_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
_BYTES = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")


def mended_surrogates(line: bytes, is_json: bool = True) -> bytes:
    """Return a line of JSON or text with lone surrogates replaced; the same line where it has none, or is no UTF-8 otherwise."""
    if _BYTES.search(line):
        try:
            halves = line.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return line
        line = halves.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
    if not is_json:
        return line
    return _ESCAPE.sub(lambda match: b"\\ufffd" if match["lone"] else match[0], line)
