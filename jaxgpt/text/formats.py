"""Files to documents: plain text, jsonl, parquet, web archives, tokens, and the built-in corpus.

A damaged file, or one of another format, raises `BadInput`, which names file and row.
"""

import codecs
import hashlib
import importlib
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxgpt.system.encoding import check_text
from jaxgpt.system.errors import BadInput, as_bad_input
from jaxgpt.system.extras import require
from jaxgpt.text.files import BLOCK, LONGEST, open_file, read_lines
from jaxgpt.text.pieces import Piece, split_into_pieces

LLMC_HEADERS = {20240520: "<u2", 20240801: "<u4"}  # llm.c's magic numbers and their token types
LLMC_HEADER_BYTES = 1024
TOKENS_AT_ONCE = 1 << 20
DECODER = json.JSONDecoder()
WHITE = re.compile(r"[ \t\n\r]*")  # of JSON
LONGEST_LITERAL = 16  # characters: -Infinity, or an escape of a surrogate pair
# Parts of the standard library that are not readable source: tests (17 MB, a language of their
# own), code-point tables, and bundled or generated files.
NOT_TEXT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
NOT_TEXT |= {"encodings", "ensurepip", "pydoc_data", "lib2to3", "config"}


def read_text(file: str) -> Iterator[Piece]:
    """Yields a UTF-8 file as one document; nothing if it is empty."""
    yield from split_into_pieces(_decode_blocks(file), file)


def _decode_blocks(file: str) -> Iterator[str]:
    decoder, offset, block = codecs.getincrementaldecoder("utf-8")(), 0, b" "
    with open_file(file) as stream:
        while block:
            block = stream.read(BLOCK)
            pending = len(decoder.getstate()[0])  # bytes of a character that began in the last one
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                raise _not_utf8(file, e, offset - pending) from e
            offset += len(block)
            yield text


def _not_utf8(where: str, e: UnicodeDecodeError, offset: int = 0) -> BadInput:
    return BadInput(
        f"{where} is not UTF-8 (byte {offset + e.start}: 0x{e.object[e.start]:02x}); convert it"
        " first, for example with iconv -f latin1 -t utf-8"
    )


def json_rows(files: list[str]) -> Iterator[tuple[str, int, object]]:
    """Yields (where, number, value) of every row: of a file of JSON each line that is not blank or,
    if it begins with `[`, each element of that one array; of a parquet file each row. `where` is
    for messages: "a.jsonl, line 3" or "a.json, row 3".

    Raises `BadInput` if a row is no JSON or longer than `LONGEST`; one is in memory at a time.
    """
    for file in files:
        if file.endswith(".parquet"):
            rows = enumerate(_parquet_rows(file), start=1)
            yield from ((f"{file}, row {number}", number, row) for number, row in rows)
        else:
            yield from _array_rows(file) if _begins_array(file) else _line_rows(file)


def _line_rows(file: str) -> Iterator[tuple[str, int, object]]:
    for number, line in read_lines(file):
        where = f"{file}, line {number}"
        try:
            yield where, number, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as e:
            raise _not_utf8(where, e) from e
        except (ValueError, RecursionError) as e:  # also integers of thousands of digits
            hint = ""
            if number == 1 and line.strip() == b"{":
                hint = "; a file holds one object a line, or one array of objects"
            raise BadInput(f"{where} is not valid JSON: {e}{hint}") from e


def _begins_array(file: str) -> bool:
    with open_file(file) as stream:
        while block := stream.read(BLOCK):
            if block := block.lstrip():
                return block.startswith(b"[")
    return False


def _array_rows(file: str) -> Iterator[tuple[str, int, object]]:
    array, number = _JsonText(_decode_blocks(file)), 0
    array.take("[")
    is_done = array.take("]")
    while not is_done:
        number += 1
        where = f"{file}, row {number}"
        yield where, number, array.value(where)
        is_done = array.take("]")
        if not is_done and not array.take(","):
            raise BadInput(f"{where} is followed by neither a comma nor the end of the array")
    if array.peek():
        raise BadInput(f"{file} goes on after the end of its array of {number} rows")


class _JsonText:
    """JSON text that comes in blocks, of which only what is not taken yet is kept."""

    def __init__(self, blocks: Iterator[str]):
        self.blocks, self.text, self.at, self.is_whole = blocks, "", 0, False

    def peek(self) -> str:
        """Returns the next character that is not white space, '' at the end."""
        while not self.is_whole or self.at < len(self.text):
            self.at = WHITE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            self._read(1)
        return ""

    def take(self, mark: str) -> bool:
        """Takes the next character that is not white space if it is `mark`; says whether it is."""
        if is_next := self.peek() == mark:
            self.at += 1
        return is_next

    def value(self, where: str):
        """Takes and returns the next value."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) or self.is_whole:  # a number could go on
                    self.at = end
                    return value
            except (ValueError, RecursionError) as e:
                if self.is_whole or not self._is_cut(e):
                    raise BadInput(f"{where} is not valid JSON: {e}") from e
            if len(self.text) - self.at > LONGEST:
                raise BadInput(f"{where} is longer than {LONGEST:,} characters")
            self._read(len(self.text) - self.at)  # twice as much: the time stays linear

    def _is_cut(self, e: Exception) -> bool:
        """Says whether the error may be due to the text's end: it lies there, or at the start of a
        string that has no end."""
        if not isinstance(e, json.JSONDecodeError):
            return False
        return "Unterminated" in e.msg or e.pos > len(self.text) - LONGEST_LITERAL

    def _read(self, count: int) -> None:
        """Drops what is taken and reads at least so many characters more, if there are any."""
        parts = [self.text[self.at :]]
        while count > 0 and not self.is_whole:
            block = next(self.blocks, None)  # it may be empty: the first bytes of a character
            self.is_whole = block is None
            parts.append(block or "")
            count -= len(parts[-1])
        self.text, self.at = "".join(parts), 0


def read_jsonl(file: str, field: str) -> Iterator[Piece]:
    """Yields the text `field` of each row of JSON (see `json_rows`); empty texts are skipped."""
    for where, number, row in json_rows([file]):
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            has = f"its fields are {', '.join(row)}" if isinstance(row, dict) else "not an object"
            raise BadInput(f"{where} has no text field {field!r} ({has}); set data.field")
        if check_text(text, where):
            yield Piece(text, file, number)


def read_any(file: str, field: str) -> Iterator[Piece]:
    """Yields the documents of a parquet, JSON or text file, told by its ending; see the others."""
    if file.endswith(".parquet"):
        return read_parquet(file, field)
    plain = file.removesuffix(".gz").removesuffix(".zst")
    return read_text(file) if plain.endswith(".txt") else read_jsonl(file, field)


def read_parquet(file: str, column: str) -> Iterator[Piece]:
    """Yields the text `column` of each row; nulls and empty texts are skipped."""
    for number, row in enumerate(_parquet_rows(file, column), start=1):
        if row[column]:
            yield Piece(row[column], file, number)


def _parquet_rows(file: str, column: str = "") -> Iterator[dict]:
    """Yields each row, of which only the text `column` is read if one is given."""
    parquet = require("pyarrow.parquet", "data", "reading parquet")
    done = 0
    with (
        open_file(file, decompress=False) as stream,
        as_bad_input(lambda e: f"{file} cannot be read as parquet after row {done}: {e}"),
    ):
        table = parquet.ParquetFile(stream)
        if column:
            _check_column(file, table.schema_arrow, column)
        for batch in table.iter_batches(columns=[column] if column else None, batch_size=1024):
            for row in batch.to_pylist():
                done += 1
                yield row


def _check_column(file: str, schema, column: str) -> None:
    if schema.names.count(column) != 1:
        many = "more than one" if column in schema.names else "no"
        raise BadInput(
            f"{file} has {many} column {column!r}: it has {', '.join(schema.names)}; set data.field"
        )
    kind = schema.field(column).type
    if str(kind) not in ("string", "large_string"):
        raise BadInput(f"column {column!r} of {file} holds {kind}, not text")


def read_warc(file: str) -> Iterator[Piece]:
    """Yields the text of each page of a WARC or WET archive: HTML and plain text answers, and
    WET's conversions. HTML stays HTML; `data.clean=html` turns it to text."""
    archive = require("warcio.archiveiterator", "data", "reading web archives")
    number = 0
    with (
        open_file(file) as stream,  # the library would accept a compressed file that is cut
        as_bad_input(lambda e: f"{file} is damaged after record {number}: {e!r}"),
    ):
        for number, record in enumerate(archive.ArchiveIterator(stream), start=1):
            length = record.rec_headers.get_header("Content-Length")
            if length is not None and not re.fullmatch(r"\s*\d{1,18}\s*", length):
                raise BadInput(f"{file}, record {number} has length {length!r:.80}")
            if not (kind := _page_type(record)):
                continue
            raw = record.content_stream().read(LONGEST + 1)
            if len(raw) > LONGEST:
                raise BadInput(f"{file}, record {number} is over {LONGEST:,} bytes")
            while record.raw_stream.read(LONGEST):  # bytes that decoding did not need
                pass
            if record.raw_stream.limit > 0:
                raise BadInput(f"{file} is cut short in record {number}")
            if (text := _web_text(raw, kind)).strip():
                yield Piece(text, file, number)
        if not number:
            raise BadInput(f"{file} is not a web archive: it holds no record")


def _page_type(record) -> str:
    """Returns the content type of a record that is a page, else ''."""
    headers = record.http_headers
    if record.rec_type == "response" and headers and headers.get_statuscode() == "200":
        kind = headers.get_header("Content-Type") or "text/html"
        return kind if re.match(r"\s*(text/(html|plain)|application/xhtml)", kind, re.I) else ""
    return "text/plain; charset=utf-8" if record.rec_type == "conversion" else ""


def _web_text(raw: bytes, content_type: str) -> str:
    """Decodes a page by its header's charset, else its own <meta>, else as UTF-8."""
    start = raw[:2048].decode("ascii", errors="replace")
    match = re.search(r"charset=[\"']?([\w-]+)", content_type, re.I)
    match = match or re.search(r"<meta[^>]+charset=[\"']?([\w-]+)", start, re.I)
    try:
        text = raw.decode(match[1] if match else "utf-8", errors="replace")
    except (LookupError, ValueError):  # an unknown charset, or a codec that ignores `errors`
        text = raw.decode("utf-8", errors="replace")
    if text.isascii():
        return text
    # UTF-7 and the escapes of Python's own codecs can spell half a surrogate pair
    return text.encode("utf-16", "surrogatepass").decode("utf-16", errors="replace")


def read_tokens(file: str, end_of_text: int, vocab_size: int) -> Iterator[Piece]:
    """Yields the documents of a token file: raw uint16 as nanoGPT writes, or with llm.c's header.

    End-of-text tokens separate documents, whether they come first (llm.c) or last (nanoGPT).
    """
    tokens, row, continues = open_tokens(file), 0, False
    for start in range(0, len(tokens), TOKENS_AT_ONCE):
        ids = np.asarray(tokens[start : start + TOKENS_AT_ONCE])
        if ids.max() >= vocab_size:
            raise BadInput(
                f"{file} holds token {ids.max()}, beyond the tokenizer's {vocab_size}; set"
                " data.tokenizer to the one that made it"
            )
        ends = np.flatnonzero(ids == end_of_text)
        for begin, end in zip([0, *ends + 1], [*ends, len(ids)], strict=True):
            if end > begin:
                row += not continues
                yield Piece("", file, row, continues, ids[begin:end].astype(np.int32))
                continues = True
            if end < len(ids):  # ids[end] is an end-of-text
                continues = False


def open_tokens(file: str) -> np.ndarray:
    """Returns a `.bin` file's tokens, memory-mapped."""
    try:
        header = np.fromfile(file, "<i4", 3)
        size = np.memmap(file, np.uint8, "r").size
    except (OSError, ValueError) as e:
        raise BadInput(f"{file} cannot be read: {e}") from e
    if len(header) == 3 and int(header[0]) in LLMC_HEADERS:
        dtype, count = np.dtype(LLMC_HEADERS[int(header[0])]), int(header[2])
        if count < 1 or size != LLMC_HEADER_BYTES + count * dtype.itemsize:
            raise BadInput(
                f"{file} is damaged: its header says {count} tokens, its length does not"
            )
        return np.memmap(file, dtype, "r", LLMC_HEADER_BYTES)
    if size % 2:
        raise BadInput(f"{file} is not a file of uint16 tokens: it has {size} bytes")
    return np.memmap(file, "<u2", "r")


def read_builtin() -> Iterator[Piece]:
    """Yields the Python standard library's source files and its reference topics.

    They come in the order of their names' hashes, so that the held-out tail is like the rest.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = dict(importlib.import_module("pydoc_data.topics").topics)
    for path in root.rglob("*.py"):
        inner = path.relative_to(root)
        if not any(part in NOT_TEXT or part.startswith("config-") for part in inner.parts):
            texts[f"lib/{inner.as_posix()}"] = path
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = texts[name]
        if isinstance(text, Path):
            text = text.read_bytes().decode("utf-8", errors="ignore")
        if text.strip():
            yield Piece(text, name)
