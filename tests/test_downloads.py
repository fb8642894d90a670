"""What goes wrong with downloads and uploads, on real sockets: servers that cut, stall, lie and
change their mind, processes that are killed, disks that fill, and an S3 server on this machine."""

import base64
import contextlib
import email.utils
import hashlib
import http.server
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import boto3
import pytest
from helpers import config_folder, make_model, make_pregenerated
from moto.server import ThreadedMotoServer

import download_glue
from transformer import file_utils
from transformer.file_utils import (
    MissingError,
    UnreachableError,
    UserError,
    atomic_path,
    cached_path,
    download,
    extract_zip,
    file_lock,
    write_text,
)
from transformer.uploads import Uploader, upload_folder

REPO = Path(__file__).resolve().parent.parent
CONTENT = bytes(range(256)) * 2000  # 512,000 bytes
OTHER = bytes(reversed(CONTENT))
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HALF = len(CONTENT) // 2
QUICK = {"attempts": 3, "delay": 0.01, "timeout": 0.5}


# ------------------------------------------------------------------ a server that misbehaves


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; `server.troubles` holds what to do wrong, one dictionary a request.

    Keys: status, headers (more of them), length (announced), sent (bytes after which the line is
    cut), stall (seconds after them), slow (seconds between pieces), content (in place of the
    file's), ranges, if_range (False: not heeded).
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, dict(self.headers)))
        trouble = {**server.always, **(server.troubles.pop(0) if server.troubles else {})}
        content = trouble.get("content", server.files.get(self.path))
        headers = {**({"ETag": server.etag} if server.etag else {}), **trouble.get("headers", {})}
        code = trouble.get("status", 200 if content is not None else 404)
        body = content if code == 200 else b""
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = (not trouble.get("if_range", True)
                or self.headers.get("If-Range", server.etag) == server.etag)
        if wanted and code == 200 and same and trouble.get("ranges", True):
            start = int(wanted[1])
            code, body = (206, content[start:]) if start < len(content) else (416, b"")
            span = f"{start}-{len(content) - 1}" if body else "*"
            headers["Content-Range"] = f"bytes {span}/{len(content)}"
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(trouble.get("length", len(body))))
        self.end_headers()
        sent = body[: trouble.get("sent", len(body))]
        pieces = [sent[i : i + 8192] for i in range(0, len(sent), 8192)]
        try:
            for piece in pieces:
                self.wfile.write(piece)
                time.sleep(trouble.get("slow", 0))
            time.sleep(trouble.get("stall", 0))
        except OSError:  # the other end was killed
            pass
        self.close_connection = len(sent) < len(body) or "length" in trouble


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files, running.etag = {"/data.bin": CONTENT}, '"one"'
        running.troubles, running.requests, running.always = [], [], {}
        running.url = f"http://127.0.0.1:{running.server_port}"
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def fetch(server, folder: Path, sha256: str | None = None, **changes) -> Path:
    return download(f"{server.url}/data.bin", folder / "data.bin", sha256, **{**QUICK, **changes})


def ranges(server) -> list[str | None]:
    return [headers.get("Range") for _, headers in server.requests]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


# ------------------------------------------------------------------ lines and servers


def test_a_truncated_download_goes_on_if_the_version_is_the_same(server, tmp_path):
    server.troubles = [{"sent": HALF}]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert ranges(server)[0] is None and re.fullmatch(r"bytes=[1-9]\d*-", ranges(server)[1])
    assert server.requests[1][1]["If-Range"] == '"one"'


@pytest.mark.parametrize("sent", [0, HALF])
def test_a_stall_ends_after_the_timeout_and_the_download_goes_on(server, tmp_path, sent):
    server.troubles = [{"sent": sent, "stall": 3}]
    start = time.monotonic()
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert 0.5 <= time.monotonic() - start < 2.5
    assert (ranges(server)[1] is not None) == (sent > 0)


def test_503_twice_is_asked_a_third_time(server, tmp_path):
    server.troubles = [{"status": 503}, {"status": 503}]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 3


def test_503_for_ever_is_an_error_of_its_own_kind(server, tmp_path):
    server.always = {"status": 503}
    with pytest.raises(UnreachableError, match="503"):
        fetch(server, tmp_path)
    assert len(server.requests) == 3 and files(tmp_path) == []


def test_retry_after_is_obeyed(server, tmp_path):
    server.troubles = [{"status": 429, "headers": {"Retry-After": "1"}}]
    start = time.monotonic()
    fetch(server, tmp_path)
    assert 1 <= time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [("7", 7, 7), ("date", 25, 30), ("past", 0, 0), ("86400", 60, 60), ("soon", 0.01, 0.01)],
)
def test_retry_after_is_seconds_or_a_date_and_has_a_limit(
    server, tmp_path, monkeypatch, value, least, most
):
    waits = []
    monkeypatch.setattr(time, "sleep", lambda seconds: waits.append(seconds) if seconds else None)
    dates = {"date": 30, "past": -30}
    if value in dates:
        value = email.utils.formatdate(time.time() + dates[value], usegmt=True)
    server.troubles = [{"status": 503, "headers": {"Retry-After": value}}]
    fetch(server, tmp_path)
    assert least <= sum(waits) <= most


def test_a_length_that_is_announced_too_long_never_gives_a_file(server, tmp_path):
    server.always = {"length": len(CONTENT) + 1000, "ranges": False}
    with pytest.raises(UnreachableError, match="could not be downloaded"):
        fetch(server, tmp_path)
    assert "data.bin" not in files(tmp_path)


def test_a_length_that_is_announced_too_long_once_does_no_harm(server, tmp_path):
    server.troubles = [{"length": len(CONTENT) + 1000}]
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_a_length_that_is_announced_too_short_is_found_by_a_sum_or_the_archive(server, tmp_path):
    server.always = {"length": HALF}
    with pytest.raises(UserError, match=f"SHA-256 is .*expected {SHA256}"):
        fetch(server, tmp_path, SHA256)
    assert files(tmp_path) == []
    archive = tmp_path / "made.zip"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("data.bin", CONTENT)
    server.files["/data.bin"] = archive.read_bytes()
    with pytest.raises(UserError, match="not a sound zip archive"):
        extract_zip(fetch(server, tmp_path), tmp_path / "out")
    assert files(tmp_path) == ["data.bin", "made.zip"]


def test_a_server_that_ignores_ranges_starts_again_without_mixing(server, tmp_path):
    server.troubles = [{"sent": HALF}]
    server.always = {"ranges": False}
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 2


@pytest.mark.parametrize("heeded", [True, False])
def test_a_file_that_changes_between_the_tries_is_fetched_anew(server, tmp_path, heeded):
    server.always = {"if_range": heeded}
    server.troubles = [{"sent": HALF}, *[{"status": 503}] * 3]
    with pytest.raises(UnreachableError):
        fetch(server, tmp_path)
    server.files["/data.bin"], server.etag = OTHER, '"two"'
    assert fetch(server, tmp_path).read_bytes() == OTHER


def test_a_server_that_names_no_version_is_not_trusted_to_have_the_same(server, tmp_path):
    server.etag = None
    server.troubles = [{"sent": HALF}, {"status": 503}]
    changed = threading.Timer(0.3, lambda: server.files.update({"/data.bin": OTHER}))
    changed.start()
    assert fetch(server, tmp_path, delay=0.6).read_bytes() == OTHER
    assert ranges(server)[-1] is None


def test_without_a_version_a_known_sum_allows_to_go_on(server, tmp_path):
    server.etag = None
    server.troubles = [{"sent": HALF}]
    assert fetch(server, tmp_path, SHA256).read_bytes() == CONTENT
    assert len(server.requests) == 2 and ranges(server)[1] is not None


# ------------------------------------------------------------------ sums that servers announce


def sums(content: bytes) -> dict[str, dict[str, str]]:
    """Headers by which servers announce the sum of `content`."""
    digest = hashlib.sha256(content)
    encoded = base64.b64encode(digest.digest()).decode()
    git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    commit = {"X-Repo-Commit": "0" * 40}
    return {
        "RFC 9530": {"Repr-Digest": f"sha-256=:{encoded}:"},
        "RFC 3230": {"Digest": f"SHA-256={encoded}"},
        "S3": {"Server": "AmazonS3", "ETag": f'"{hashlib.md5(content).hexdigest()}"'},
        "hub, large file": {**commit, "X-Linked-ETag": f'"{digest.hexdigest()}"', "ETag": '"x"'},
        "hub, small file": {**commit, "ETag": f'W/"{git}"'},
    }


@pytest.mark.parametrize("kind", sums(b""))
def test_an_announced_sum_is_held_to(server, tmp_path, kind):
    server.etag = None
    server.always = {"headers": sums(CONTENT)[kind]}
    assert fetch(server, tmp_path / "good").read_bytes() == CONTENT
    server.files["/data.bin"] = b"?" + CONTENT[1:]
    with pytest.raises(UserError, match=r"sum is [0-9a-f]+; the server announced [0-9a-f]+"):
        fetch(server, tmp_path / "bad")
    assert files(tmp_path / "bad") == []
    assert len(server.requests) == 3  # the wrong bytes twice


def test_the_tag_of_an_object_in_parts_or_encrypted_is_no_sum(server, tmp_path):
    tag = hashlib.md5(b"").hexdigest()
    for number, headers in enumerate([
        {"ETag": f'"{tag}-2"'}, {"ETag": f'"{tag}"', "x-amz-server-side-encryption": "aws:kms"},
    ]):  # fmt: skip
        server.always = {"headers": {"Server": "AmazonS3", **headers}}
        assert fetch(server, tmp_path / str(number)).read_bytes() == CONTENT


def test_wrong_bytes_once_are_fetched_a_second_time(server, tmp_path, caplog):
    server.troubles = [{"content": b"?" + CONTENT[1:]}]
    assert fetch(server, tmp_path, SHA256).read_bytes() == CONTENT
    assert "once more from the start" in caplog.text and files(tmp_path) == ["data.bin"]


def test_a_damaged_part_is_found_and_replaced(server, tmp_path):
    server.troubles = [{"sent": HALF}, *[{"status": 503}] * 3]
    with pytest.raises(UnreachableError):
        fetch(server, tmp_path)
    part = tmp_path / "data.bin.part"
    part.write_bytes(bytes(part.stat().st_size))  # as after a power failure
    assert fetch(server, tmp_path, SHA256).read_bytes() == CONTENT


# ------------------------------------------------------------------ disks


def test_a_file_too_large_for_the_disk_is_refused_before_its_first_byte(server, tmp_path):
    server.always = {"length": 10**18}
    with pytest.raises(UserError, match=r"GB free on its disk; .*/data.bin needs 1000000000.0"):
        fetch(server, tmp_path)
    assert files(tmp_path) == []


def test_an_archive_too_large_for_the_disk_is_refused_before_its_first_byte(tmp_path):
    archive = tmp_path / "large.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for number in range(16_000):
            made.writestr(str(number), b"")
    # Every member of 0 bytes says of itself that it has 4 GB.
    data, sign = bytearray(archive.read_bytes()), b"PK\1\2"
    place = data.find(sign)
    while place >= 0:
        data[place + 24 : place + 28] = b"\xfe\xff\xff\xff"
        place = data.find(sign, place + 46)
    archive.write_bytes(data)
    free = shutil.disk_usage(tmp_path).free
    if free > 16_000 * 2**32:
        pytest.skip("this disk has more than 64 TB free")
    with pytest.raises(UserError, match="the content of .*large.zip needs"):
        extract_zip(archive, tmp_path / "out")
    assert files(tmp_path) == ["large.zip"]


SCRIPT = """
import sys
from transformer.file_utils import UserError, download
try:
    download(sys.argv[1], sys.argv[2], delay=0.01, timeout=5)
except UserError as error:
    sys.exit(f"error: {error}")
"""


def start(*arguments: str, before: str = "", code: str = SCRIPT) -> subprocess.Popen:
    command = [sys.executable, "-c", before + code, *arguments]
    return subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True)


QUOTA = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"


def test_a_full_disk_is_one_line_and_keeps_what_came(server, tmp_path):
    target = tmp_path / "data.bin"
    process = start(f"{server.url}/data.bin", str(target), before=QUOTA)
    message = process.communicate(timeout=30)[1].strip()
    assert process.returncode == 1 and len(message.splitlines()) == 1
    assert "no space left on the disk while loading" in message and "are kept" in message
    kept = (tmp_path / "data.bin.part").stat().st_size
    assert 0 < kept <= 200_000 and not target.exists()
    assert fetch(server, tmp_path, SHA256).read_bytes() == CONTENT
    assert ranges(server)[-1] == f"bytes={kept}-"


def test_a_small_filesystem_that_fills_up_keeps_what_came(server, tmp_path):
    """The server does not say how long its file is, so that only the disk can tell."""
    script = f"""
mount -t tmpfs -o size=300k none {tmp_path} || exit 77
{sys.executable} -c '{SCRIPT}' {server.url}/data.bin {tmp_path}/data.bin
echo status $?; ls {tmp_path}; stat -c %s {tmp_path}/data.bin.part
"""
    server.always = {"length": ""}
    result = subprocess.run(["unshare", "-Urm", "sh", "-c", script], cwd=REPO, text=True,
                            capture_output=True, check=False, timeout=30)  # fmt: skip
    if result.returncode == 77 or "unshare" in result.stderr:
        pytest.skip(f"no small filesystem can be mounted here: {result.stderr.strip()}")
    assert "no space left on the disk while loading" in result.stderr
    lines = result.stdout.split()
    assert lines[:2] == ["status", "1"] and "data.bin" not in lines
    assert 100_000 < int(lines[-1]) <= 75 * 4096


# ------------------------------------------------------------------ processes


def test_two_processes_that_want_the_same_file_fetch_it_once(server, tmp_path):
    server.always = {"slow": 0.02}
    target = str(tmp_path / "data.bin")
    processes = [start(f"{server.url}/data.bin", target) for _ in range(3)]
    assert [process.wait(30) for process in processes] == [0, 0, 0]
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert len(server.requests) == 1 and files(tmp_path) == ["data.bin"]


def test_a_killed_process_gives_its_lock_back_and_its_part_on(server, tmp_path):
    server.always = {"slow": 0.02}
    process = start(f"{server.url}/data.bin", str(tmp_path / "data.bin"))
    wait_for(lambda: size(tmp_path / "data.bin.part") > 100_000)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert files(tmp_path) == [".data.bin.lock", "data.bin.part", "data.bin.part.json"]
    assert fetch(server, tmp_path, SHA256).read_bytes() == CONTENT
    assert int(ranges(server)[-1].strip("bytes=-")) > 100_000
    assert files(tmp_path) == ["data.bin"]


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing has happened"
        time.sleep(0.01)


def test_old_bytes_are_gone_before_the_record_of_a_new_version_is_there(server, tmp_path):
    """A process killed right after it wrote the record must not leave both."""
    write_text(tmp_path / "data.bin.part", "old bytes")
    code = SCRIPT.replace("try:", "import os\nfrom transformer import file_utils\n"
                          "file_utils._write_chunks = lambda *_: os.kill(os.getpid(), 9)\ntry:")
    process = start(f"{server.url}/data.bin", str(tmp_path / "data.bin"), code=code)
    assert process.wait(20) == -signal.SIGKILL
    assert files(tmp_path) == [".data.bin.lock", "data.bin.part.json"]
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_a_lock_lets_one_in_at_a_time(tmp_path):
    inside, most, done = [], [], []

    def work() -> None:
        for _ in range(20):
            with file_lock(tmp_path / "thing"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()
        done.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(done) == 4 and files(tmp_path) == []


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "file", "old")
    code = ("import os, sys\nfrom transformer.file_utils import atomic_path\n"
            "with atomic_path(sys.argv[1]) as temporary:\n"
            "    temporary.write_text('new'); os.kill(os.getpid(), 9)\n")  # fmt: skip
    process = start(str(tmp_path / "file"), code=code)
    assert process.wait(20) == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == "old"
    assert files(tmp_path) == [f".file.{process.pid}.tmp", "file"]


def test_progress_is_logged_where_there_is_no_terminal(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(file_utils, "LOG_SECONDS", 0.02)
    server.always = {"slow": 0.002}
    with caplog.at_level(logging.INFO):
        fetch(server, tmp_path)
    assert re.search(r"data.bin: \d of 1 MB", caplog.text)


# ------------------------------------------------------------------ the whole script


def make_mirror(folder: Path) -> dict[str, bytes]:
    """Write archives of two tasks and their sums; return them by name."""
    folder.mkdir(parents=True)
    rows = "".join(f"{i}\tone {os.urandom(40).hex()}\ttwo\tentailment\n" for i in range(2000))
    for task, header in (("RTE", "index\tsentence1\tsentence2\tlabel\n"),
                         ("WNLI", "index\tsentence1\tsentence2\tlabel\n")):  # fmt: skip
        with zipfile.ZipFile(folder / f"{task}.zip", "w") as archive:
            for name in ("train.tsv", "dev.tsv", "test.tsv"):
                archive.writestr(f"{task}/{name}", header + rows)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
             for path in sorted(folder.iterdir())]  # fmt: skip
    (folder / "SHA256SUMS").write_text("".join(lines))
    return contents(folder)


def start_download_glue(base_url: str, data_dir: Path) -> subprocess.Popen:
    command = [sys.executable, "download_glue.py", "--data_dir", str(data_dir), "--tasks",
               "RTE,WNLI", "--base_url", base_url, "--retry_delay", "0.05"]  # fmt: skip
    return subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True)


def test_a_killed_download_glue_goes_on_and_ends_with_the_same_bytes(server, tmp_path):
    mirror = make_mirror(tmp_path / "mirror")
    server.files = {f"/glue/{name}": content for name, content in mirror.items()}
    server.always = {"slow": 0.02}
    folder = tmp_path / "glue"
    part = folder / ".downloads" / "RTE" / "RTE.zip.part"
    process = start_download_glue(f"{server.url}/glue", folder)
    wait_for(lambda: size(part) > 100_000)
    process.kill()
    process.wait(10)
    kept = size(part)
    assert 0 < kept < len(mirror["RTE.zip"]) and not (folder / "RTE").exists()

    # Again, with every kind of trouble on the way.
    server.always, server.requests = {}, []
    server.troubles = [
        {"status": 503}, {"status": 429, "headers": {"Retry-After": "0"}},  # SHA256SUMS
        {}, {"sent": 100_000}, {"status": 503}, {},  # RTE.zip
        {"content": b"?" * len(mirror["WNLI.zip"])}, {"sent": 200_000},  # WNLI.zip
    ]  # fmt: skip
    process = start_download_glue(f"{server.url}/glue", folder)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors
    asked = [(path.rpartition("/")[2], headers.get("Range")) for path, headers in server.requests]
    assert asked[:4] == [("SHA256SUMS", None)] * 3 + [("RTE.zip", f"bytes={kept}-")]
    for task in ("RTE", "WNLI"):
        with zipfile.ZipFile(tmp_path / "mirror" / f"{task}.zip") as archive:
            for name in archive.namelist():
                assert (folder / name).read_bytes() == archive.read(name)
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)
    assert files(folder) == sorted(
        ["SHA256SUMS", *(f"{t}/{n}.tsv" for t in ("RTE", "WNLI") for n in ("train", "dev", "test"))]
    )


# ------------------------------------------------------------------ S3


class CuttingProxy:
    """Passes connections on to a port of this machine, and cuts them as `limits` say.

    Each item is the number of bytes that a connection may bring back; None: all of them.
    """

    def __init__(self, port: int) -> None:
        self.port, self.limits, self.asked = port, [], []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                near = self.listener.accept()[0]
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.port))
            limit = self.limits.pop(0) if self.limits else None
            threading.Thread(target=self.upward, args=(near, far), daemon=True).start()
            threading.Thread(target=self.downward, args=(near, far, limit), daemon=True).start()

    def upward(self, near: socket.socket, far: socket.socket) -> None:
        try:
            while data := near.recv(1 << 16):
                self.asked += re.findall(rb"[Rr]ange: (bytes=\d+-)", data)
                far.sendall(data)
        except OSError:
            pass

    def downward(self, near: socket.socket, far: socket.socket, limit: int | None) -> None:
        passed = 0
        try:
            while (limit is None or passed < limit) and (data := far.recv(1 << 14)):
                near.sendall(data)
                passed += len(data)
        except OSError:
            pass
        for end in (near, far):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture(scope="module")
def moto():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    yield running.get_host_and_port()[1]
    running.stop()


@pytest.fixture
def s3(moto, monkeypatch):
    """A client of an S3 server with a bucket of this test; scripts find the server, too."""
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{moto}", "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{moto}")
    client.create_bucket(Bucket="bucket")
    yield client
    for item in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=item["Key"])
    client.delete_bucket(Bucket="bucket")


def stored(client) -> dict[str, bytes]:
    return {item["Key"]: client.get_object(Bucket="bucket", Key=item["Key"])["Body"].read()
            for item in client.list_objects_v2(Bucket="bucket").get("Contents", [])}  # fmt: skip


def test_an_object_is_cached_and_a_cut_download_of_it_goes_on(s3, moto, tmp_path, monkeypatch):
    s3.put_object(Bucket="bucket", Key="folder/data.bin", Body=CONTENT)
    proxy = CuttingProxy(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    proxy.limits = [200_000, 0, None]
    url = "s3://bucket/folder/data.bin"
    target = download(url, tmp_path / "data.bin", **QUICK)
    assert target.read_bytes() == CONTENT
    assert int(proxy.asked[-1].strip(b"bytes=-")) > 100_000
    assert cached_path(url, tmp_path / "cache", SHA256).read_bytes() == CONTENT
    proxy.listener.close()
    assert cached_path(url, tmp_path / "cache", SHA256).read_bytes() == CONTENT


def test_an_object_that_changed_meanwhile_is_fetched_anew(s3, moto, tmp_path, monkeypatch):
    s3.put_object(Bucket="bucket", Key="data.bin", Body=CONTENT)
    proxy = CuttingProxy(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    proxy.limits = [200_000, 0, 0, 0]
    with pytest.raises(UnreachableError):
        download("s3://bucket/data.bin", tmp_path / "data.bin", **QUICK)
    s3.put_object(Bucket="bucket", Key="data.bin", Body=OTHER)
    target = download("s3://bucket/data.bin", tmp_path / "data.bin", **QUICK)
    assert target.read_bytes() == OTHER
    proxy.listener.close()


@pytest.mark.parametrize("kind", ["crc32", "sha256", "md5"])
def test_the_sums_that_s3_keeps_are_held_to(s3, tmp_path, kind):
    algorithm = {} if kind == "md5" else {"ChecksumAlgorithm": kind.upper()}
    client = s3
    if kind == "md5":  # a client that sends no sum: what remains is the object's tag
        config = boto3.session.Config(request_checksum_calculation="when_required")
        client = boto3.client("s3", endpoint_url=s3.meta.endpoint_url, config=config)
    client.put_object(Bucket="bucket", Key="data.bin", Body=CONTENT, **algorithm)
    body = file_utils._open_s3("s3://bucket/data.bin", 0, 5.0)
    body.close()
    assert body.digest.startswith(f"{kind}:")
    part = tmp_path / "data.bin.part"
    part.write_bytes(b"?" + CONTENT[1:-1000])  # the begun part is damaged
    version = {"url": "s3://bucket/data.bin", "size": body.size, "tag": body.tag}
    file_utils.write_json(tmp_path / "data.bin.part.json", {**version, "digest": body.digest})
    target = download("s3://bucket/data.bin", tmp_path / "data.bin", **QUICK)
    assert target.read_bytes() == CONTENT


def test_an_s3_server_that_says_nothing_is_left_after_the_timeout(s3, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(UnreachableError, match="no connection or no answer"):
            download("s3://bucket/data.bin", tmp_path / "data.bin", **{**QUICK, "attempts": 1})


def test_a_missing_object_or_bucket_is_named(s3, tmp_path):
    for url in ("s3://bucket/absent", "s3://absent/data.bin"):
        with pytest.raises(MissingError, match=url):
            download(url, tmp_path / "absent", **QUICK)
    assert files(tmp_path) == []


def test_download_glue_works_from_a_bucket(s3, tmp_path):
    for name, content in make_mirror(tmp_path / "mirror").items():
        s3.put_object(Bucket="bucket", Key=f"mirrors/glue/{name}", Body=content)
    argv = ["--base_url", "s3://bucket/mirrors/glue/", "--tasks", "RTE", "--data_dir",
            str(tmp_path / "glue")]  # fmt: skip
    download_glue.main(download_glue.get_args_parser().parse_args(argv))
    with zipfile.ZipFile(tmp_path / "mirror" / "RTE.zip") as archive:
        assert (tmp_path / "glue" / "RTE" / "dev.tsv").read_bytes() == archive.read("RTE/dev.tsv")


# ------------------------------------------------------------------ uploads


def test_an_upload_during_the_run_sends_what_changed(s3, tmp_path, caplog):
    run = tmp_path / "run"
    write_text(run / "log.jsonl", "1\n")
    with Uploader(("bucket", "a/b"), [run], skip=("training_state",)) as uploader:
        uploader.update()
        wait_for(lambda: stored(s3) == {"a/b/log.jsonl": b"1\n"})
        large = os.urandom(9_000_000)  # more than one part
        (run / "step_10").mkdir()
        (run / "step_10" / "model.bin").write_bytes(large)
        write_text(run / "training_state" / "state.bin", "stays")
        write_text(run / ".log.jsonl.1.tmp", "unfinished")
        with caplog.at_level(logging.INFO):
            uploader.update()
            wait_for(lambda: len(stored(s3)) == 2)
        assert "log.jsonl" not in caplog.text
        write_text(run / "log.jsonl", "1\n2\n")
    assert stored(s3) == {"a/b/log.jsonl": b"1\n2\n", "a/b/step_10/model.bin": large}


def test_update_does_not_wait(tmp_path, s3, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        write_text(tmp_path / "file", "x")
        uploader = Uploader(("bucket", ""), [tmp_path])
        uploader.client = boto3.client(
            "s3", endpoint_url=f"http://127.0.0.1:{silent.getsockname()[1]}",
            config=boto3.session.Config(read_timeout=0.2, retries={"total_max_attempts": 1}),
        )  # fmt: skip
        start = time.monotonic()
        uploader.update()
        uploader.update()
        assert time.monotonic() - start < 0.5
        with pytest.raises(UserError, match="1 of the files could not be uploaded, first .*/file"):
            uploader.close()


def test_several_folders_are_kept_apart(s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [Path("out/a"), tmp_path / "out" / "b"]
    for folder in folders:
        write_text(folder / "file", folder.name)
    Uploader(("bucket", ""), folders).close()
    assert stored(s3) == {"out/a/file": b"a", f"{str(tmp_path)[1:]}/out/b/file": b"b"}


def test_a_failed_upload_is_a_warning_and_goes_with_the_next(s3, tmp_path, caplog):
    write_text(tmp_path / "file", "x")
    uploader = Uploader(("bucket", "p"), [tmp_path])
    s3.delete_bucket(Bucket="bucket")
    uploader.update()
    wait_for(lambda: "tried again with the next" in caplog.text)
    s3.create_bucket(Bucket="bucket")
    uploader.close()
    assert stored(s3) == {"p/file": b"x"}


def test_an_upload_that_fails_at_the_end_is_an_error_that_names_the_folder(s3, tmp_path):
    write_text(tmp_path / "file", "x")
    uploader = Uploader(("bucket", "p"), [tmp_path])
    s3.delete_bucket(Bucket="bucket")
    try:
        with pytest.raises(UserError, match=f"s3://bucket/p: 1 of the files .*are in {tmp_path}"):
            uploader.close()
    finally:
        s3.create_bucket(Bucket="bucket")


def test_the_error_of_a_run_is_not_hidden_by_its_uploads(s3, tmp_path):
    write_text(tmp_path / "file", "x")
    with pytest.raises(ValueError, match="mine"), Uploader(("bucket", ""), [tmp_path]):
        raise ValueError("mine")
    assert stored(s3) == {"file": b"x"}


def test_a_dropped_upload_is_repeated(s3, moto, tmp_path, monkeypatch):
    content = os.urandom(9_000_000)
    (tmp_path / "model.bin").write_bytes(content)
    proxy = CuttingProxy(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    proxy.limits = [None, 0, None, 0]  # an answer about the bucket, then the parts
    upload_folder(tmp_path, "bucket", "p")
    assert proxy.limits == [] and stored(s3) == {"p/model.bin": content}
    proxy.listener.close()


def test_a_file_replaced_during_its_upload_is_sent_in_one_version(s3, tmp_path):
    old, new = b"o" * 9_000_000, b"n" * 9_000_000
    (tmp_path / "model.bin").write_bytes(old)
    uploader = Uploader(("bucket", ""), [tmp_path])
    versions = []

    def replace(**_) -> None:
        if not versions:
            with atomic_path(tmp_path / "model.bin") as temporary:
                temporary.write_bytes(new)
        versions.append(1)

    uploader.client.meta.events.register("before-call.s3.UploadPart", replace)
    uploader.update()
    wait_for(lambda: uploader.sent)
    assert stored(s3) == {"model.bin": old}
    uploader.close()
    assert stored(s3) == {"model.bin": new}


def test_a_bucket_that_is_not_there_and_lost_credentials_are_errors_before_the_run(
    s3, tmp_path, monkeypatch
):
    with pytest.raises(UserError, match="s3://absent/p: no such bucket"):
        Uploader(("absent", "p"), [tmp_path])
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="no credentials"):
        Uploader(("bucket", "p"), [tmp_path])


def test_without_an_address_nothing_is_uploaded(tmp_path):
    with Uploader(None, [tmp_path]) as uploader:
        uploader.update()
    assert uploader.thread is None


def test_a_training_run_uploads_each_checkpoint_and_its_log_while_it_goes_on(s3, tmp_path):
    config_folder(tmp_path / "config", num_hidden_layers=2, hidden_size=8)
    make_model(tmp_path / "teacher")
    make_pregenerated(tmp_path / "data", rows=40)
    output = tmp_path / "out"
    command = [
        sys.executable, str(REPO / "general_distill.py"), "--no_cuda", "--student_model",
        str(tmp_path / "config"), "--teacher_model", str(tmp_path / "teacher"),
        "--pregenerated_data", str(tmp_path / "data"), "--output_dir", str(output),
        "--max_seq_length", "16", "--num_train_epochs", "4000", "--eval_step", "50",
        "--save_steps", "50", "--data_url", "s3://bucket/run"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: "run/step_50_pytorch_model.bin" in stored(s3) and process.poll() is None,
                 60)
        process.send_signal(signal.SIGTERM)
        message = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 143, message
    found = stored(s3)
    assert found["run/step_50_pytorch_model.bin"] == (
        output / "step_50_pytorch_model.bin").read_bytes()
    assert found["run/log.jsonl"] and "run/args.json" in found
    assert not any("training_state" in key for key in found), "states stay on the machine"
    assert "run/eval_results.json" not in found, "the run had not ended"
