import struct

import pytest

from stillhouse import data


def catalog(messages: dict[str, str]) -> bytes:
    """A .mo file: magic number, table of originals, table of translations, strings."""
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n"} | messages
    texts = [text.encode() for pair in zip(*sorted(messages.items()), strict=True) for text in pair]
    count = len(messages)
    start = 28 + 16 * count
    table, strings = b"", b""
    for text in texts:
        table += struct.pack("<II", len(text), start + len(strings))
        strings += text + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    return header + table + strings


@pytest.fixture
def locale(tmp_path):
    folder = tmp_path / "de" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    first = {"no such file": "keine solche Datei", "%d file\0%d files": "%d Datei\0%d Dateien"}
    (folder / "a.mo").write_bytes(catalog(first))
    (folder / "b.mo").write_bytes(catalog({"no such file": "eine andere", "done": "fertig"}))
    (folder / "iso_3166.mo").write_bytes(catalog({"Italy": "Italien"}))
    return tmp_path


def test_each_message_once_and_no_names(locale):
    assert data.catalog_pairs("de", locale=locale) == [
        ("%d file", "%d Datei"),
        ("done", "fertig"),
        ("no such file", "keine solche Datei"),
    ]


def test_a_range_of_words(locale):
    pairs = data.catalog_pairs("de", words=(2, 2), locale=locale)
    assert pairs == [("%d file", "%d Datei")]


def test_a_language_that_is_not_there(locale):
    with pytest.raises(data.DataUnavailable, match="apt install gettext"):
        data.catalog_pairs("xx", locale=locale)
