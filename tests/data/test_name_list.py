"""Lists of file names as they are found."""

import codecs
import io
import os

import pytest

from early_exit.data.name_list import read_names


def names(content: bytes, null: bool = False) -> list[str]:
    return list(read_names(io.BufferedReader(io.BytesIO(content)), null))


@pytest.mark.parametrize(
    "content",
    [
        b"a b.png\nc.png\n",
        b"a b.png\nc.png",
        b"a b.png\r\n\r\nc.png\r\n",
        codecs.BOM_UTF8 + b"a b.png\r\nc.png\r\n",
        "\ufeffa b.png\r\nc.png\r\n".encode("utf-16-le"),
        "\ufeffa b.png\nc.png".encode("utf-16-be"),
    ],
)
def test_the_same_list_as_several_systems_write_it(content):
    assert names(content) == ["a b.png", "c.png"]


def test_an_empty_list():
    assert names(b"") == names(codecs.BOM_UTF8) == names(b"", null=True) == []


def test_a_name_is_any_bytes():
    lines = [b" a ", b"caf\xe9", b"\t", "\u4e2d\U0001f600\u2028".encode(), b"-x", b"\xff\xfe"]
    assert names(b"\n".join([b"first", *lines]))[1:] == [os.fsdecode(line) for line in lines]


def test_a_carriage_return_that_belongs_to_a_name_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd\r").touch()
    assert names(b"odd\r\neven\r\n") == ["odd\r", "even"]


def test_names_that_end_with_nul_may_have_line_breaks():
    assert names(b"a\nb\0 c\r\0\0d", null=True) == ["a\nb", " c\r", "d"]


def test_letters_that_are_not_ascii_in_a_list_in_utf_16():
    assert names("\ufeff\u00e9.png\n".encode("utf-16-le")) == [os.fsdecode("\u00e9.png".encode())]


@pytest.mark.parametrize("null", [False, True])
def test_a_name_is_there_as_soon_as_it_is_complete(null):
    """The program that writes the list may wait for an answer before it writes the next name."""
    reading, writing = os.pipe()
    end = b"\0" if null else b"\n"
    with os.fdopen(reading, "rb") as stream, os.fdopen(writing, "wb", 0) as writer:
        writer.write(b"first" + end)
        found = read_names(stream, null)
        assert next(found) == "first"
        writer.write(b"second" + end)
        assert next(found) == "second"
