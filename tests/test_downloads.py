"""Downloads from servers that cut, stall and change their mind, on real sockets; and S3."""

import email.utils
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import moto
import pytest
from helpers import REPO, config_folder, make_model, make_pregenerated, run
from server import FileServer

import general_distill
from transformer.file_utils import (
    MissingError,
    UnreachableError,
    UserError,
    download,
    s3_address,
    upload_folder,
    write_text,
)
from transformer.hub import fetch_model

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes
OTHER = bytes(reversed(CONTENT))
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HALF = len(CONTENT) // 2
QUICK = {"attempts": 3, "delay": 0.01, "timeout": 0.5}
PATH = "/data.bin"


@pytest.fixture
def server(server: FileServer) -> FileServer:
    """The server of the tests, with one file."""
    server.files[PATH] = CONTENT
    return server


def fetch(server: FileServer, folder: Path, sha256: str | None = None, **changes) -> Path:
    return download(server.url + PATH, folder / "data.bin", sha256, **{**QUICK, **changes})


def files(folder: Path) -> list[str]:
    """The names of the files below `folder`, save those of locks."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")
                  if path.is_file() and path.suffix != ".lock")


# ------------------------------------------------------------------ connections and servers


@pytest.mark.parametrize("troubles", [
    [{"sent": HALF}], [{"sent": HALF, "stall": 1.5}], [{"sent": 100_000}] * 4])
def test_a_broken_or_silent_connection_goes_on_where_it_ended(server, tmp_path, troubles):
    server.troubles[PATH] = troubles
    assert fetch(server, tmp_path, attempts=1).read_bytes() == CONTENT
    assert server.ranges()[0] is None and re.fullmatch(r"bytes=[1-9]\d*-", server.ranges()[1])
    assert server.requests[1][1]["If-Range"] == f'"{SHA256}"'
    assert files(tmp_path) == ["data.bin"]


@pytest.mark.parametrize(("date", "trouble"), [
    (True, {}), (True, {"if_range": False}), (True, {"ranges": False}), (True, {"status": 416}),
    (False, {})])
def test_without_entity_tag_the_date_decides_and_without_both_it_starts_again(
    server, tmp_path, date, trouble
):
    server.etag = False
    if date:
        server.headers["Last-Modified"] = email.utils.formatdate(0, usegmt=True)
    server.troubles[PATH] = [{"sent": HALF}, trouble]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests[1][1].get("If-Range") == server.headers.get("Last-Modified")
    assert (server.ranges()[1] is not None) == date


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("name", ["data.bin", "other.bin"])
def test_a_part_of_another_version_is_thrown_away(server, tmp_path, if_range, name):
    server.always = {"if_range": if_range}
    server.troubles[PATH] = [{"sent": HALF}, *[{"sent": 0}] * 3]
    with pytest.raises(UnreachableError):
        fetch(server, tmp_path)
    server.files = {PATH: OTHER, "/other.bin": OTHER}
    target = download(f"{server.url}/{name}", tmp_path / "data.bin", **QUICK)
    assert target.read_bytes() == OTHER


def test_unavailable_twice_then_well_is_a_success(server, tmp_path):
    server.troubles[PATH] = [{"status": 503}, {"status": 429, "headers": {"Retry-After": "0"}}]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 3


@pytest.mark.parametrize(("trouble", "kind", "message", "requests"), [
    ({"status": 503}, UnreachableError, "no complete response .the server answered 503", 3),
    ({"status": 403}, MissingError, "the server answered 403", 1),
    ({"status": 404}, MissingError, "the server answered 404", 1),
    ({"headers": {"Content-Length": 600_000}, "ranges": False}, UnreachableError, "IncompleteRead",
     4),
    ({"headers": {"Content-Length": 10**18}}, UserError, "needs 1000000000.000 GB", 1),
    ({"content": OTHER}, UserError, f"SHA-256 is .*; expected {SHA256}", 1),
])
def test_an_answer_of_no_use_is_one_error_and_never_gets_the_name(
    server, tmp_path, trouble, kind, message, requests
):
    server.always = trouble
    with pytest.raises(kind, match=f"{server.url}{PATH}.*{message}"):
        fetch(server, tmp_path, SHA256)
    assert "data.bin" not in files(tmp_path) and len(server.requests) == requests
    server.always = {}
    assert fetch(server, tmp_path, SHA256).read_bytes() == CONTENT


# ------------------------------------------------------------------ processes

SCRIPT = "import sys; from transformer.file_utils import download; download(*sys.argv[1:])"


def start(server: FileServer, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, server.url + PATH, str(folder / "data.bin")]
    return subprocess.Popen(command, cwd=REPO)


def test_three_processes_that_want_the_same_file_fetch_it_once(server, tmp_path):
    server.always = {"slow": 0.02}
    processes = [start(server, tmp_path) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert len(server.requests) == 1 and files(tmp_path) == ["data.bin"]


def test_a_killed_process_leaves_a_part_that_the_next_goes_on_with(server, tmp_path):
    server.always = {"slow": 0.05}
    process = start(server, tmp_path)
    part = tmp_path / "data.bin.part"
    while not part.exists() or part.stat().st_size < 100_000:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = part.stat().st_size
    assert files(tmp_path) == ["data.bin.part", "data.bin.part.json"]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges()[-1] == f"bytes={kept}-" and files(tmp_path) == ["data.bin"]


# ------------------------------------------------------------------ files and models


def test_a_file_that_is_there_is_checked_and_kept(server, tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(OTHER)
    assert fetch(server, tmp_path) == path
    assert path.read_bytes() == OTHER
    with pytest.raises(UserError, match=f"data.bin, already there; .*expected {SHA256}"):
        fetch(server, tmp_path, SHA256)
    assert server.requests == []


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_a_model_is_a_folder_or_the_address_of_one_which_is_fetched_once(
    server, tmp_path, weights
):
    assert fetch_model(tmp_path) == fetch_model(str(tmp_path)) == tmp_path
    server.files = {f"/m/{name}": b"x" for name in ("config.json", "vocab.txt", weights)}
    folder = fetch_model(f"{server.url}/m/", tmp_path)
    assert files(folder) == sorted(["config.json", "vocab.txt", weights])
    with pytest.raises(MissingError, match="/absent/config.json: the server answered 404"):
        fetch_model(f"{server.url}/absent", tmp_path)
    server.server_close()
    assert fetch_model(f"{server.url}/m", tmp_path) == folder


# ------------------------------------------------------------------ S3


@pytest.fixture
def s3(monkeypatch):
    """A client of a stand-in of S3 in this process, with a bucket and no account of the user's."""
    for name, value in {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
                        "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    with moto.mock_aws():  # which sets keys of an account
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="bucket")
        yield client


def stored(client) -> dict[str, bytes]:
    return {item["Key"]: client.get_object(Bucket="bucket", Key=item["Key"])["Body"].read()
            for item in client.list_objects_v2(Bucket="bucket").get("Contents", [])}


def test_an_object_is_downloaded_and_a_missing_one_is_named(s3, tmp_path):
    s3.put_object(Bucket="bucket", Key="folder/data.bin", Body=CONTENT)
    url = "s3://bucket/folder/data.bin"
    assert download(url, tmp_path / "data.bin", SHA256, **QUICK).read_bytes() == CONTENT
    for url in ("s3://bucket/absent", "s3://absent/data.bin"):
        with pytest.raises(MissingError, match=f"{url}: the server answered 404"):
            download(url, tmp_path / "absent", **QUICK)


@pytest.mark.parametrize("anonymous", [False, True])
def test_a_cut_download_from_s3_goes_on_with_an_account_or_without(
    s3, server, tmp_path, monkeypatch, anonymous
):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    if anonymous:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "")
    server.files["/bucket/folder/data.bin"] = CONTENT
    server.troubles["/bucket/folder/data.bin"] = [{"status": 503}, {"sent": HALF}]
    target = download("s3://bucket/folder/data.bin", tmp_path / "data.bin", SHA256, **QUICK)
    assert target.read_bytes() == CONTENT
    assert re.fullmatch(r"bytes=[1-9]\d*-", server.ranges()[-1])


def test_an_s3_address_has_a_bucket_and_a_prefix():
    assert s3_address("s3://bucket/a/b/") == ("bucket", "a/b")
    assert s3_address("s3://bucket") == ("bucket", "") and s3_address("") is None
    for url in ("s3:///a", "http://bucket/a"):
        with pytest.raises(UserError, match=f"{url}: expected s3://bucket/prefix"):
            s3_address(url)


def test_an_upload_sends_what_is_new_or_changed(s3, tmp_path):
    write_text(tmp_path / "log.jsonl", "1\n")
    upload_folder(tmp_path, ("bucket", "a/b"))
    first = s3.head_object(Bucket="bucket", Key="a/b/log.jsonl")["LastModified"]
    time.sleep(1.1)  # the store counts in seconds
    large = os.urandom(9_000_000)  # more than one part
    (tmp_path / "step_10").mkdir()
    (tmp_path / "step_10" / "model.bin").write_bytes(large)
    write_text(tmp_path / "training_state" / "state.bin", "stays")
    write_text(tmp_path / ".log.jsonl.1.tmp", "unfinished")
    upload_folder(tmp_path, ("bucket", "a/b"), skip=("training_state",))
    assert stored(s3) == {"a/b/log.jsonl": b"1\n", "a/b/step_10/model.bin": large}
    assert s3.head_object(Bucket="bucket", Key="a/b/log.jsonl")["LastModified"] == first
    write_text(tmp_path / "log.jsonl", "2\n")
    upload_folder(tmp_path, ("bucket", ""))
    upload_folder(tmp_path, ("bucket", "a/b"), skip=("training_state",))
    assert stored(s3)["a/b/log.jsonl"] == stored(s3)["log.jsonl"] == b"2\n"


@pytest.mark.parametrize("trouble", ["no bucket", "no account", "no server"])
def test_a_refused_upload_is_an_error_that_says_where_the_files_are(
    s3, server, tmp_path, monkeypatch, trouble
):
    write_text(tmp_path / "file", "x")
    if trouble == "no account":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "")
    elif trouble == "no server":
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
        server.server_close()
    message = f"could not be uploaded to s3://absent/p .*the files are in {tmp_path}"
    with pytest.raises(UserError, match=message):
        upload_folder(tmp_path, ("absent", "p"))


def test_a_training_run_uploads_its_log_and_each_checkpoint_when_it_is_written(
    s3, server, tmp_path, monkeypatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    config_folder(tmp_path / "config", num_hidden_layers=2, hidden_size=8)
    make_model(tmp_path / "teacher")
    make_pregenerated(tmp_path / "data", rows=40)
    run(general_distill, "--student_model", tmp_path / "config", "--teacher_model",
        tmp_path / "teacher", "--pregenerated_data", tmp_path / "data", "--output_dir",
        tmp_path / "out", "--max_seq_length", 16, "--num_train_epochs", 1, "--train_batch_size", 4,
        "--eval_step", 2, "--save_steps", 2, "--no_cuda", "--data_url", "s3://bucket/run")
    sent = [path.removeprefix("/bucket/run/") for path in server.files]
    order = [sent.index(name) for name in ("args.json", "step_2_pytorch_model.bin",
                                           "step_10_pytorch_model.bin")]
    assert order == sorted(order), "all at the end would be in the order of their names"
    for name in ("log.jsonl", "pytorch_model.bin"):
        assert server.files[f"/bucket/run/{name}"] == (tmp_path / "out" / name).read_bytes()
    assert not any("training_state" in name for name in sent), "states stay here"
