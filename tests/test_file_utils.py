"""Atomic files and folders, JSON, encodings, and archives made by hand."""

import bz2
import gzip
import os
import random
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from transformer.file_utils import (
    UserError,
    atomic_folder,
    atomic_path,
    extract_zip,
    read_json,
    text_lines,
    write_json,
    write_text,
)
from transformer.tokenizer_files import load_vocab


def only_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_or_folder_is_replaced_only_when_the_block_succeeds(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(ValueError, match="half"), atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("new")
        raise ValueError("half way")
    assert (tmp_path / "file").read_text() == "old"
    with atomic_folder(tmp_path / "folder") as temporary:
        write_text(temporary / "a", "old")
    with pytest.raises(ValueError, match="half"), atomic_folder(tmp_path / "folder") as temporary:
        write_text(temporary / "a", "new")
        raise ValueError("half way")
    assert (tmp_path / "folder" / "a").read_text() == "old"
    with atomic_folder(tmp_path / "folder") as temporary:
        write_text(temporary / "b", "new")
    assert only_files(tmp_path / "folder") == ["b"] and only_files(tmp_path) == ["file", "folder"]


def test_a_device_a_pipe_and_a_folder_are_never_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(UserError, match="expected a file to write"):
            write_text(target, "text")
    assert (tmp_path / "pipe").is_fifo() and Path("/dev/null").is_char_device()


@pytest.mark.parametrize(("content", "complaint"), [
    (b"{", "not valid JSON"), (b"\xff{}", "not valid JSON.*byte"), (b"[" * 100_000, "recursion"),
    (b"9" * 5000, "5000 digits"), (b"[1]", "list as JSON; expected a JSON object"),
])
def test_read_json_names_the_file_that_is_not_json(tmp_path, content, complaint):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(UserError, match=f"bad.json: .*{complaint}"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(UserError, match="absent.json: no such file"):
        read_json(tmp_path / "absent.json")


def test_json_holds_a_path_that_the_locale_could_not_spell(tmp_path):
    write_json(tmp_path / "a.json", {"path": "\udce6 日本"})
    assert read_json(tmp_path / "a.json") == {"path": "\udce6 日本"}


# ------------------------------------------------------------------ text in other encodings

CHINESE = "1\t这家店的味道不错，送餐很快。\n0\t难吃，再也不来了……\n" * 40
FRENCH = "Le café était fermé, hélas.\nCréée en été, naïve.\n" * 40


def encoding_error(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(text_lines(path))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("text", "encoding", "name", "place"), [
    (CHINESE, "gb18030", "looks like GB18030 .*这家店的味道", "line 1: byte 0xd5 at position 2"),
    ("label,review\n" + CHINESE, "gb2312", "looks like GB18030", "line 2"),
    (CHINESE, "utf-16", "is UTF-16", "line 1: byte 0xff at position 0"),
    (CHINESE, "utf-32", "is UTF-32", "line 1"),
    ("label\ttext\n1\tfine\n", "utf-16-le", "is UTF-16LE", "line 1: byte 0x00 at position 1"),
    ("label\ttext\n1\tfine\n", "utf-16-be", "is UTF-16BE", "line 1: byte 0x00 at position 0"),
    (FRENCH, "latin-1", "looks like WINDOWS-1252 .*café", "line 1: byte 0xe9 at position 6"),
    ("It’s “good” – 5 €\n", "cp1252", "looks like WINDOWS-1252", "line 1"),
])
def test_text_in_another_encoding_is_named_with_the_command_that_converts_it(
    tmp_path, text, encoding, name, place
):
    path = tmp_path / "my reviews.tsv"
    message = encoding_error(path, text.encode(encoding))
    pattern = f"^{path}, {place}.*; this {name}.*: (iconv -f [^ ]* -t utf-8 '{path}' > )NEW$"
    match = re.match(pattern, message)
    assert match, message
    subprocess.run(f"{match[1]}{tmp_path}/new", shell=True, check=True)
    assert (tmp_path / "new").read_text(encoding="utf-8") == text


def test_a_line_in_another_encoding_than_the_others_is_shown_with_its_own_command(tmp_path):
    line = "送餐很快，不错\n"
    for before, after in [("好的\n" * 3, ""), ("", "好的\n"), ("好的\n", "好的\n")]:
        path = tmp_path / "mix.txt"
        content = before.encode() + line.encode("gb18030") + after.encode()
        message = encoding_error(path, content)
        assert "a mix of encodings: this line looks like GB18030 ('送餐很快，不错'): sed" in message
        command = message.partition("): ")[2]
        assert subprocess.check_output(command, shell=True, text=True) == line


@pytest.mark.parametrize("content", [
    "這家餐廳的味道不錯。\n".encode("big5") * 9, "この店は美味しいです。\n".encode("shift_jis") * 9,
    "この店は美味しいです。\n".encode("euc-jp") * 9, "영화는 정말 좋아요.\n".encode("euc-kr") * 9,
    "Очень хороший фильм.\n".encode("cp1251") * 9, "好的\n".encode() + b"\xe5\xa5\n",
    bytes(range(256)), random.Random(0).randbytes(1000),
], ids=["big5", "shift_jis", "euc_jp", "euc_kr", "cp1251", "damaged", "binary", "random"])
def test_no_encoding_is_guessed_where_it_is_not_clear(tmp_path, content):
    message = encoding_error(tmp_path / "file", content)
    assert re.fullmatch(f"{tmp_path}/file, line \\d+: byte 0x.. at position \\d+; "
                        "expected text in UTF-8", message)


def test_text_with_a_mark_or_with_nul_characters_is_read_as_it_is(tmp_path):
    (tmp_path / "file").write_bytes("\ufeff好\0\nb\n".encode())
    assert list(text_lines(tmp_path / "file")) == [(1, "\ufeff好\0\n"), (2, "b\n")]


@pytest.mark.parametrize("module", [gzip, bz2])
def test_compressed_text_is_read_whatever_its_name_and_a_damaged_file_is_named(tmp_path, module):
    path, lines = tmp_path / "file", [(1, "好\n"), (2, "b")]
    content = module.compress("好\nb".encode())
    path.write_bytes(content)
    assert list(text_lines(path)) == lines
    packed = tmp_path / f"file.{module.__name__.removesuffix('ip')}"
    for damaged in (content[:-9], content[:20] + bytes(20), b"no such file", b""):
        packed.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{packed}: not a "):
            list(text_lines(packed))
    packed.write_bytes(module.compress(CHINESE.encode("gb18030")))
    with pytest.raises(UserError, match=r"GB18030 .*: \w+ -dc .* \| iconv .* > NEW"):
        list(text_lines(packed))


def test_a_vocabulary_in_another_encoding_is_named(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("[PAD]\n[UNK]\n的\n我们\n".encode("gb18030"))
    with pytest.raises(UserError, match="vocab.txt, line 3: .*looks like GB18030"):
        load_vocab(tmp_path / "vocab.txt")


def test_json_in_another_encoding_is_named(tmp_path):
    (tmp_path / "task.json").write_bytes('{"labels": ["差评", "好评"]}'.encode("gb18030"))
    with pytest.raises(UserError, match="task.json: not valid JSON .*looks like GB18030"):
        read_json(tmp_path / "task.json")


# ------------------------------------------------------------------ archives


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def test_an_archive_is_unpacked_into_a_new_folder_only(tmp_path):
    archive = make_zip(tmp_path / "good.zip", {"a/one.txt": b"1", "two.txt": b"2"})
    folder = extract_zip(archive, tmp_path / "out")
    assert [(folder / name).read_bytes() for name in ("a/one.txt", "two.txt")] == [b"1", b"2"]
    with pytest.raises(UserError, match="out: already exists"):
        extract_zip(archive, folder)


@pytest.mark.parametrize(
    "name", ["/abs", "../escaped", "a/../../escaped", "C:/escaped", "..\\escaped"]
)
def test_an_archive_that_would_write_elsewhere_writes_nothing(tmp_path, name):
    archive = make_zip(tmp_path / "hostile.zip", {"good": b"x", name: b"x"})
    with pytest.raises(UserError, match="hostile.zip: member .* refused"):
        extract_zip(archive, tmp_path / "out")
    assert only_files(tmp_path) == ["hostile.zip"]


@pytest.mark.parametrize("damage", ["cut", "flip", "not a zip"])
def test_a_damaged_archive_leaves_no_folder(tmp_path, damage):
    content = bytearray(make_zip(tmp_path / "bad.zip", {"a": os.urandom(5000)}).read_bytes())
    content[2500] ^= 255
    content = {"cut": content[:2500], "flip": content, "not a zip": b"<html>an error"}[damage]
    (tmp_path / "bad.zip").write_bytes(content)
    with pytest.raises(UserError, match="bad.zip: not a sound zip archive"):
        extract_zip(tmp_path / "bad.zip", tmp_path / "out")
    assert only_files(tmp_path) == ["bad.zip"]
