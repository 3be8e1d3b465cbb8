"""Protocol buffers' wire format, as far as TensorFlow's and SentencePiece's files need it."""

from collections.abc import Iterator


def message(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields the (field number, value) pairs of a message; a fixed-width value is its integer.

    Raises:
      ValueError: if `raw` is none.
    """
    at = 0
    while at < len(raw):
        tag, at = varint(raw, at)
        kind = tag & 7
        if kind == 0:
            value, at = varint(raw, at)
        elif kind in (1, 5):
            width = 8 if kind == 1 else 4
            value, at = int.from_bytes(raw[at : at + width], "little"), at + width
        elif kind == 2:
            length, at = varint(raw, at)
            value, at = raw[at : at + length], at + length
        else:
            raise ValueError(f"a field of wire type {kind}")
        if at > len(raw):
            raise ValueError("a field is cut short")
        yield tag >> 3, value


def varint(raw: bytes, at: int) -> tuple[int, int]:
    """Returns the number that begins at `at` and where it ends.

    Raises:
      ValueError: if it is cut short or has more than 64 bits.
    """
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(raw):
            break
        byte = raw[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError("a number is cut short or too long")
