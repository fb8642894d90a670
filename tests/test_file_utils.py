"""Downloads against a real server on this machine, archives made by hand, atomic writing."""

import hashlib
import http.server
import os
import re
import stat
import threading
import time
import zipfile
from pathlib import Path

import pytest

from transformer import file_utils
from transformer.file_utils import (
    UserError,
    atomic_folder,
    atomic_path,
    cached_path,
    download,
    extract_zip,
    read_json,
    write_json,
    write_text,
)

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()
QUICK = {"attempts": 3, "delay": 0.01, "timeout": 5.0, "progress": False}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; `server.troubles` holds what to do wrong, one item a request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        trouble = server.troubles.pop(0) if server.troubles else None
        if isinstance(trouble, int):
            return self.answer(trouble, b"", {})
        content = server.files.get(self.path)
        if content is None:
            return self.answer(404, b"not here", {})
        start, code, headers = 0, 200, {}
        if server.etag:
            headers["ETag"] = server.etag
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and server.ranges:
            start, code = int(wanted[1]), 206
            if start >= len(content):
                headers["Content-Range"] = f"bytes */{len(content)}"
                return self.answer(416, b"", headers)
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.answer(code, content[start:], headers, cut=trouble == "cut")

    def answer(self, code, body, headers, cut=False):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cut:
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)


@pytest.fixture
def server():
    """A server on a free port of 127.0.0.1, in its own thread."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files = {"/data.bin": CONTENT}
        running.troubles, running.requests = [], []
        running.ranges, running.etag = True, '"one"'
        running.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def only_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_download_has_the_served_bytes_and_leaves_nothing_else(server, tmp_path):
    target = download(f"{server.url}/data.bin", tmp_path / "new" / "data.bin", SHA256, **QUICK)
    assert target.read_bytes() == CONTENT
    assert only_files(target.parent) == ["data.bin"]


def test_an_existing_file_is_not_downloaded_again(server, tmp_path):
    target = tmp_path / "data.bin"
    target.write_bytes(CONTENT)
    download(f"{server.url}/data.bin", target, SHA256, **QUICK)
    assert server.requests == []


def test_an_existing_file_with_another_checksum_is_an_error_and_stays(server, tmp_path):
    target = tmp_path / "data.bin"
    target.write_bytes(b"mine")
    with pytest.raises(UserError, match=f"data.bin.*expected {SHA256}"):
        download(f"{server.url}/data.bin", target, SHA256, **QUICK)
    assert target.read_bytes() == b"mine"


def test_a_cut_connection_goes_on_where_it_ended(server, tmp_path):
    server.troubles = ["cut"]
    target = download(f"{server.url}/data.bin", tmp_path / "data.bin", SHA256, **QUICK)
    assert target.read_bytes() == CONTENT
    ranges = [wanted for _, wanted in server.requests]
    assert ranges[0] is None and re.fullmatch(r"bytes=[1-9]\d*-", ranges[1])


def test_without_ranges_a_cut_connection_starts_again(server, tmp_path):
    server.ranges, server.troubles = False, ["cut"]
    target = download(f"{server.url}/data.bin", tmp_path / "data.bin", SHA256, **QUICK)
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_progress_resets_the_count_of_attempts(server, tmp_path):
    server.troubles = ["cut", "cut", "cut"]  # each brings about half of the rest
    settings = {**QUICK, "attempts": 1}
    target = download(f"{server.url}/data.bin", tmp_path / "data.bin", SHA256, **settings)
    assert target.read_bytes() == CONTENT


def test_a_later_call_resumes_the_part_file(server, tmp_path):
    server.troubles = ["cut", 503, 503, 503]
    target = tmp_path / "data.bin"
    with pytest.raises(UserError, match="503"):
        download(f"{server.url}/data.bin", target, **QUICK)
    assert not target.exists()
    kept = (tmp_path / "data.bin.part").stat().st_size
    assert 0 < kept < len(CONTENT)
    download(f"{server.url}/data.bin", target, SHA256, **QUICK)
    assert server.requests[-1][1] == f"bytes={kept}-"
    assert only_files(tmp_path) == ["data.bin"]


@pytest.mark.parametrize("change", ["etag", "size", "url"])
def test_a_part_of_another_version_is_thrown_away(server, tmp_path, change):
    server.troubles = ["cut", 503, 503, 503]
    with pytest.raises(UserError):
        download(f"{server.url}/data.bin", tmp_path / "data.bin", **QUICK)
    other = bytes(reversed(CONTENT)) + (b"more" if change == "size" else b"")
    server.files = {"/data.bin": other, "/other.bin": other}
    server.etag = '"two"' if change == "etag" else server.etag
    name = "other.bin" if change == "url" else "data.bin"
    target = download(f"{server.url}/{name}", tmp_path / "data.bin", **QUICK)
    assert target.read_bytes() == other


def test_a_complete_part_file_needs_no_byte_more(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENT)
    version = {"url": f"{server.url}/data.bin", "size": len(CONTENT), "tag": '"one"'}
    write_json(tmp_path / "data.bin.part.json", version)
    target = download(f"{server.url}/data.bin", tmp_path / "data.bin", SHA256, **QUICK)
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_a_part_file_without_its_record_is_not_trusted(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(b"x" * 1000)
    target = download(f"{server.url}/data.bin", tmp_path / "data.bin", **QUICK)
    assert target.read_bytes() == CONTENT


def test_unavailable_twice_then_well_is_a_success(server, tmp_path):
    server.troubles = [503, 429]
    target = download(f"{server.url}/data.bin", tmp_path / "data.bin", **QUICK)
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 3


def test_the_waits_double(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.troubles = [500, 502, 503, 504]
    with pytest.raises(UserError, match="504"):
        download(f"{server.url}/data.bin", tmp_path / "data.bin", attempts=4, delay=1.0)
    assert waits == [1.0, 2.0, 4.0]


def test_a_missing_page_is_an_error_at_once(server, tmp_path):
    with pytest.raises(UserError, match=r"/absent\.bin: the server answered 404"):
        download(f"{server.url}/absent.bin", tmp_path / "absent.bin", **QUICK)
    assert len(server.requests) == 1
    assert only_files(tmp_path) == []


def test_no_server_at_all_is_one_clear_error(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/data.bin"
    with pytest.raises(UserError, match=f"{url}: could not be downloaded: no connection"):
        download(url, tmp_path / "data.bin", **QUICK)
    assert only_files(tmp_path) == []


def test_wrong_bytes_never_get_the_final_name(server, tmp_path):
    server.files["/data.bin"] = b"?" + CONTENT[1:]
    with pytest.raises(UserError, match=f"/data.bin: SHA-256 is .*expected {SHA256}"):
        download(f"{server.url}/data.bin", tmp_path / "data.bin", SHA256, **QUICK)
    assert only_files(tmp_path) == []


def test_an_empty_file_is_a_file(server, tmp_path):
    server.files["/empty"] = b""
    assert download(f"{server.url}/empty", tmp_path / "empty", **QUICK).read_bytes() == b""


def test_cached_path_returns_a_local_path_and_refuses_a_missing_one(tmp_path):
    path = tmp_path / "here.txt"
    path.write_bytes(CONTENT)
    assert cached_path(path) == path
    assert cached_path(str(path), sha256=SHA256) == path
    with pytest.raises(UserError, match="SHA-256"):
        cached_path(path, sha256="0" * 64)
    with pytest.raises(UserError, match="absent.txt: no such file"):
        cached_path(tmp_path / "absent.txt")


def test_cached_path_downloads_an_address_once(server, tmp_path):
    first = cached_path(f"{server.url}/data.bin", tmp_path)
    assert cached_path(f"{server.url}/data.bin", tmp_path) == first
    assert first.read_bytes() == CONTENT
    assert first.name.endswith("-data.bin")
    assert len(server.requests) == 1


def test_cached_path_keeps_files_of_the_same_name_apart(server, tmp_path):
    server.files["/folder/data.bin"] = b"other"
    first = cached_path(f"{server.url}/data.bin", tmp_path)
    second = cached_path(f"{server.url}/folder/data.bin", tmp_path)
    assert first.read_bytes() == CONTENT and second.read_bytes() == b"other"


def test_cached_path_reads_the_cache_folder_from_the_environment(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYBERT_CACHE", str(tmp_path / "cache"))
    assert cached_path(f"{server.url}/data.bin").parent == tmp_path / "cache"


def test_cached_path_names_the_schemes_it_knows():
    with pytest.raises(UserError, match="'ftp'.*expected http, https or s3"):
        cached_path("ftp://example.org/data.bin")


@pytest.fixture
def s3(server, monkeypatch):
    """The same server as an S3 endpoint: path-style addresses, no account."""
    pytest.importorskip("boto3", reason="boto3 is not installed")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    server.files["/bucket/folder/data.bin"] = CONTENT
    return server


def test_an_s3_object_is_read_without_an_account(s3, tmp_path):
    path = cached_path("s3://bucket/folder/data.bin", tmp_path, SHA256)
    assert path.read_bytes() == CONTENT


def test_an_s3_download_survives_refusal_and_a_cut(s3, tmp_path):
    s3.troubles = [503, "cut"]
    target = download("s3://bucket/folder/data.bin", tmp_path / "data.bin", SHA256, **QUICK)
    assert target.read_bytes() == CONTENT
    assert re.fullmatch(r"bytes=[1-9]\d*-", s3.requests[-1][1])


def test_a_missing_s3_object_is_an_error_that_names_it(s3, tmp_path):
    with pytest.raises(UserError, match="s3://bucket/absent"):
        download("s3://bucket/absent", tmp_path / "absent", **QUICK)
    with pytest.raises(UserError, match="expected s3://bucket/key"):
        download("s3://bucket", tmp_path / "absent", **QUICK)


def make_zip(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, destination in (links or {}).items():
            member = zipfile.ZipInfo(name)
            member.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(member, destination)
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def test_an_archive_is_unpacked_with_its_folders_and_inner_links(tmp_path):
    members = {"a/one.txt": b"1", "two.txt": b"2"}
    archive = make_zip(tmp_path / "good.zip", members, {"a/link": "../two.txt"})
    folder = extract_zip(archive, tmp_path / "out")
    assert (folder / "a" / "one.txt").read_bytes() == b"1"
    assert (folder / "a" / "link").is_symlink()
    assert (folder / "a" / "link").read_bytes() == b"2"


HOSTILE = {
    "absolute": ({"/abs.txt": b"x"}, {}),
    "parent": ({"good.txt": b"x", "../escaped.txt": b"x"}, {}),
    "inner parent": ({"a/../../escaped.txt": b"x"}, {}),
    "drive": ({"C:/escaped.txt": b"x"}, {}),
    "backslash": ({"..\\escaped.txt": b"x"}, {}),
    "link out": ({"good.txt": b"x"}, {"link": "../secret.txt"}),
    "absolute link": ({"good.txt": b"x"}, {"link": "/etc/hostname"}),
    "link chain": ({"a/good.txt": b"x"}, {"a/up": "..", "b": "a/up/../x"}),
    "file below a link": ({"link/escaped.txt": b"x"}, {"link": ".."}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_writes_nothing(tmp_path, kind):
    inside = tmp_path / "inside"
    inside.mkdir()
    members, links = HOSTILE[kind]
    archive = make_zip(tmp_path / "hostile.zip", members, links)
    with pytest.raises(UserError, match="hostile.zip"):
        extract_zip(archive, inside / "out")
    assert only_files(inside) == []
    assert only_files(tmp_path) == ["hostile.zip", "inside"]


def test_links_cannot_make_folders_outside(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    links = {"up": "..", "up/made/link": "x"}
    archive = make_zip(tmp_path / "hostile.zip", {}, links)
    with pytest.raises(UserError, match="hostile.zip"):
        extract_zip(archive, inside / "out")
    assert only_files(inside) == []


@pytest.mark.parametrize("damage", ["cut", "flip", "not a zip"])
def test_a_damaged_archive_leaves_no_folder(tmp_path, damage):
    archive = make_zip(tmp_path / "bad.zip", {"a.txt": CONTENT[:5000] + os.urandom(5000)})
    content = bytearray(archive.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[2500] ^= 255
    else:
        content = bytearray(b"<html>an error page</html>")
    archive.write_bytes(content)
    with pytest.raises(UserError, match="bad.zip: not a sound zip archive"):
        extract_zip(archive, tmp_path / "out")
    assert only_files(tmp_path) == ["bad.zip"]


def test_an_archive_that_contradicts_itself_is_refused(tmp_path):
    archive = make_zip(tmp_path / "odd.zip", {"a": b"a file", "a/b": b"and a folder"})
    with pytest.raises(UserError, match="odd.zip"):
        extract_zip(archive, tmp_path / "out")
    assert only_files(tmp_path) == ["odd.zip"]


def test_a_full_folder_is_not_unpacked_into(tmp_path):
    archive = make_zip(tmp_path / "good.zip", {"a.txt": b"new"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_bytes(b"mine")
    with pytest.raises(UserError, match="out: already exists"):
        extract_zip(archive, tmp_path / "out")
    assert (tmp_path / "out" / "a.txt").read_bytes() == b"mine"


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


def test_atomic_path_keeps_the_old_file_when_the_block_fails(tmp_path):
    target = tmp_path / "file"
    write_text(target, "old")
    with pytest.raises(ValueError, match="half"), atomic_path(target) as temporary:
        temporary.write_text("new")
        raise ValueError("half way")
    assert target.read_text() == "old" and only_files(tmp_path) == ["file"]


def test_read_json_names_the_file_that_is_not_json(tmp_path):
    write_text(tmp_path / "bad.json", "{")
    with pytest.raises(UserError, match="bad.json: not valid JSON"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(UserError, match="absent.json: no such file"):
        read_json(tmp_path / "absent.json")


def test_no_network_library_is_needed_for_s3_at_import():
    assert not hasattr(file_utils, "boto3")
