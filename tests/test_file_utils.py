"""Atomic files and folders, JSON, and archives made by hand."""

import os
import signal
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from transformer.file_utils import (
    UserError,
    atomic_folder,
    atomic_path,
    extract_zip,
    read_json,
    write_text,
)

REPO = Path(__file__).resolve().parent.parent


def only_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------ atomic writing


def test_atomic_path_keeps_the_old_file_when_the_block_fails(tmp_path):
    target = tmp_path / "file"
    write_text(target, "old")
    with pytest.raises(ValueError, match="half"), atomic_path(target) as temporary:
        temporary.write_text("new")
        raise ValueError("half way")
    assert target.read_text() == "old" and only_files(tmp_path) == ["file"]


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "file", "old")
    code = ("import os, sys\nfrom transformer.file_utils import atomic_path\n"
            "with atomic_path(sys.argv[1]) as temporary:\n"
            "    temporary.write_text('new'); os.kill(os.getpid(), 9)\n")  # fmt: skip
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    assert subprocess.run(command, cwd=REPO, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == "old"


def test_atomic_folder_replaces_only_when_the_block_succeeds(tmp_path):
    target = tmp_path / "folder"
    with atomic_folder(target) as temporary:
        write_text(temporary / "a", "old")
    with pytest.raises(ValueError, match="half"), atomic_folder(target, replace=True) as temporary:
        write_text(temporary / "a", "new")
        raise ValueError("half way")
    assert (target / "a").read_text() == "old"
    with atomic_folder(target, replace=True) as temporary:
        write_text(temporary / "b", "new")
    assert only_files(target) == ["b"] and only_files(tmp_path) == ["folder"]


def test_read_json_names_the_file_that_is_not_json(tmp_path):
    write_text(tmp_path / "bad.json", "{")
    with pytest.raises(UserError, match="bad.json: not valid JSON"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(UserError, match="absent.json: no such file"):
        read_json(tmp_path / "absent.json")


# ------------------------------------------------------------------ archives


def make_zip(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, destination in (links or {}).items():
            member = zipfile.ZipInfo(name)
            member.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(member, destination)
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def test_an_archive_is_unpacked_with_its_folders(tmp_path):
    archive = make_zip(tmp_path / "good.zip", {"a/one.txt": b"1", "two.txt": b"2"})
    folder = extract_zip(archive, tmp_path / "out")
    assert (folder / "a" / "one.txt").read_bytes() == b"1"
    assert (folder / "two.txt").read_bytes() == b"2"


HOSTILE = {
    "absolute": ({"/abs.txt": b"x"}, {}),
    "parent": ({"good.txt": b"x", "../escaped.txt": b"x"}, {}),
    "inner parent": ({"a/../../escaped.txt": b"x"}, {}),
    "drive": ({"C:/escaped.txt": b"x"}, {}),
    "backslash": ({"..\\escaped.txt": b"x"}, {}),
    "link": ({"good.txt": b"x"}, {"link": "../secret.txt"}),
    "file below a link": ({"link/escaped.txt": b"x"}, {"link": ".."}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_writes_nothing(tmp_path, kind):
    inside = tmp_path / "inside"
    inside.mkdir()
    archive = make_zip(tmp_path / "hostile.zip", *HOSTILE[kind])
    with pytest.raises(UserError, match="hostile.zip: member .* refused"):
        extract_zip(archive, inside / "out")
    assert only_files(inside) == [] and only_files(tmp_path) == ["hostile.zip", "inside"]


@pytest.mark.parametrize("damage", ["cut", "flip", "not a zip", "a file and a folder"])
def test_a_damaged_archive_leaves_no_folder(tmp_path, damage):
    members = {"a.txt": os.urandom(5000)}
    if damage == "a file and a folder":
        members["a.txt/b"] = b"x"
    content = bytearray(make_zip(tmp_path / "bad.zip", members).read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[2500] ^= 255
    elif damage == "not a zip":
        content = bytearray(b"<html>an error page</html>")
    (tmp_path / "bad.zip").write_bytes(content)
    with pytest.raises(UserError, match="bad.zip: not a sound zip archive"):
        extract_zip(tmp_path / "bad.zip", tmp_path / "out")
    assert only_files(tmp_path) == ["bad.zip"]


def test_an_archive_too_large_for_the_disk_is_refused_before_its_first_byte(tmp_path):
    archive = make_zip(tmp_path / "large.zip", {str(number): b"" for number in range(16_000)})
    # Every member of 0 bytes says of itself that it has 4 GB.
    data, sign = bytearray(archive.read_bytes()), b"PK\1\2"
    place = data.find(sign)
    while place >= 0:
        data[place + 24 : place + 28] = b"\xfe\xff\xff\xff"
        place = data.find(sign, place + 46)
    archive.write_bytes(data)
    with pytest.raises(UserError, match="the content of .*large.zip needs"):
        extract_zip(archive, tmp_path / "out")
    assert only_files(tmp_path) == ["large.zip"]


def test_a_full_folder_is_not_unpacked_into(tmp_path):
    archive = make_zip(tmp_path / "good.zip", {"a.txt": b"new"})
    write_text(tmp_path / "out" / "a.txt", "mine")
    with pytest.raises(UserError, match="out: already exists"):
        extract_zip(archive, tmp_path / "out")
    assert (tmp_path / "out" / "a.txt").read_text() == "mine"
