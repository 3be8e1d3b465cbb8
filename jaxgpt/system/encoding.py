"""Text from outside, which may contain bytes that are not UTF-8, lone surrogates and NULs."""

from jaxgpt.system.errors import BadInput


def check_text(text: str, what: str) -> str:
    """Returns `text` unchanged if it has no lone surrogates, which cannot be tokenized or printed.

    Python turns bytes that are not UTF-8 (in arguments, file names and standard input) into lone
    surrogates, and JSON can contain them.

    Raises:
      BadInput: otherwise; `what` names the text in the message.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        code = ord(text[e.start])
        fault = f"holds half a surrogate pair (U+{code:04X}) at character {e.start}"
        if 0xDC80 <= code <= 0xDCFF:
            fault = f"is not UTF-8 (byte 0x{code - 0xDC00:02x} at character {e.start})"
        raise BadInput(f"{what} {fault}") from e
    return text


def check_setting(text: str, what: str) -> str:
    """Returns a flag's or field's `text` unchanged; see `check_text`. NULs are refused as well."""
    if "\0" in text:
        raise BadInput(f"{what} holds a NUL at character {text.index(chr(0))}")
    return check_text(text, what)


def printable(name: str) -> str:
    """Returns a file's name as text, with bytes that are not UTF-8 as `\\xff`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
