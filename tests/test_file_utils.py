"""Atomic files and folders, JSON, and archives made by hand."""

import os
import zipfile
from pathlib import Path

import pytest

from transformer.file_utils import (
    UserError,
    atomic_folder,
    atomic_path,
    extract_zip,
    read_json,
    write_json,
    write_text,
)


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
