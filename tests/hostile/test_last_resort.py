"""What nobody foresaw: one line, exit code 1, and a file that holds the traceback."""

import errno
import re
import tempfile
from pathlib import Path

import pytest

from jaxgpt.system import stores
from jaxgpt.system.encoding import check_text
from jaxgpt.system.errors import BadInput


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_an_unforeseen_exception_is_one_line_and_a_file(command):
    code, out, err = command(raising(KeyError("a\nb")), "--x=\udcff")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith(r"error: KeyError: 'a\nb' (a fault of jaxgpt; the traceback is in ")
    text = Path(re.search(r"is in (.*)\)", err)[1]).read_text()
    assert "Traceback" in text and "raise error" in text and "--x=" in text


def test_without_room_for_the_file_it_is_still_one_line(command, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    code, _, err = command(raising(RecursionError("deep")))
    assert code == 1 and len(err.splitlines()) == 1 and "traceback cannot be written" in err


@pytest.mark.parametrize(
    ("number", "code"),
    [
        *((n, 2) for n in (errno.ENOSPC, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP)),
        *((n, 2) for n in (errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EDQUOT)),
        *((n, 1) for n in (errno.EBADF, errno.EMFILE, errno.ENOENT, errno.EIO)),
    ],
)
def test_what_the_system_refuses_is_bad_input(command, tmp_path, number, code):
    error = OSError(number, "the reason", f"{tmp_path}/{'x' * 5000}")
    got, _, err = command(raising(error))
    assert got == code and len(err.splitlines()) == 1 and "the reason" in err
    assert ("make room" in err) == (number in (errno.ENOSPC, errno.EDQUOT))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caf\udce9", r"the prompt is not UTF-8 (byte 0xe9 at character 3)"),
        ("\ud800x", r"the prompt holds half a surrogate pair (U+D800) at character 0"),
    ],
)
def test_texts_that_are_none(text, message):
    with pytest.raises(BadInput, match=re.escape(message)):
        check_text(text, "the prompt")


def test_texts_that_are_some():
    for text in ("", "é", "e\u0301", "\U0001f600", "\0", "\ufffd"):
        assert check_text(text, "it") == text


def test_messages_are_printable_and_short():
    assert str(BadInput("a\x1b[2J\u2028b\ud800")) == r"a\x1b[2J b\ud800"
    assert len(str(BadInput("9" * 100_000))) < 2100


def caused(error: Exception, *causes: Exception) -> Exception:
    """`error`, raised from the first of `causes`, and that from the next."""
    for effect, cause in zip((error, *causes), causes):
        effect.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (caused(OSError("PUT"), ConnectionRefusedError("refused")), 1),
        (caused(BadInput("x cannot be written"), ConnectionResetError("reset")), 1),
        (caused(BadInput("x is missing"), FileNotFoundError("x"), ConnectionError("404")), 2),
        (caused(BadInput("x is closed"), PermissionError("x"), ConnectionError("403")), 2),
    ],
)
def test_a_store_that_answers_has_no_outage(command, monkeypatch, error, expected):
    """Object stores' clients raise "no such file" from what the server's answer was."""
    monkeypatch.setattr(stores, "_reached", ["s3://bucket/run"])
    code, _, err = command(raising(error))
    assert code == expected and len(err.splitlines()) == 1
    assert ("the object store of s3://bucket/run does not answer" in err) == (expected == 1), err
