"""File names, errors, atomic writing, downloads and copies to S3 that every script shares."""

import argparse
import bz2
import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import requests
from filelock import FileLock
from tqdm import tqdm

from transformer.text_encoding import SAMPLE_BYTES, describe_bytes, guess_encoding

log = logging.getLogger(__name__)

WEIGHTS_NAME = "pytorch_model.bin"
SAFE_WEIGHTS_NAME = "model.safetensors"
ONNX_NAME = "model.onnx"
CONFIG_NAME = "config.json"
VOCAB_NAME = "vocab.txt"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TOKENIZER_FILES = (VOCAB_NAME, "tokenizer.json", TOKENIZER_CONFIG_NAME, "special_tokens_map.json",
                   "added_tokens.json")
# Vocabularies of which Hugging Face's library makes a tokenizer.json.
OTHER_VOCABULARIES = ("vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
                      "spm.model")

CHUNK_BYTES = 1 << 16  # what a broken connection loses at most
RETRY_STATUSES = (408, 425, 429, 500, 502, 503, 504)
MISSING_STATUSES = (401, 403, 404, 410)  # a store that does not list its files answers 403
LONGEST_WAIT_SECONDS = 60
LOG_SECONDS = 30.0  # between two lines of progress where stderr is a file
PART_SUFFIXES = (".part", ".part.json")  # an unfinished download; its URL and version
# What opens a compressed file, by how it begins.
PACKERS = {b"\x1f\x8b\x08": gzip.open, b"BZh[1-9](1AY&SY|\x17rE8P\x90)": bz2.open}


class UserError(Exception):
    """A mistake of the user; the message names the file, line or value and what was expected."""


class MissingError(UserError):
    """A server has no such file, or keeps it from us."""


class UnreachableError(UserError):
    """A server did not answer, or not well, however often it was asked."""


def has_vocabulary(folder: Path) -> bool:
    """Say whether a folder holds a tokenizer that is read here."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES[:2])


def check_output_file(path: Path | str) -> None:
    """Raise a `UserError` for a folder, a device and a pipe."""
    path = Path(path)
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise UserError(f"{path}: is {kind}; expected a file to write")


@contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `target` that replaces it when the block succeeds.

    A block that raises leaves `target` as it was and removes the temporary file, so a reader
    never meets a half-written file under its final name, nor after a power failure. A process
    that is killed leaves the temporary file. Missing parent folders are made. Only a regular file
    is replaced.
    """
    target = Path(target)
    check_output_file(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Have the disk hold the file's bytes: a later renaming must not get there before them."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def file_lock(target: Path | str) -> FileLock:
    """Return a context that one process at a time can be in for the same `target`; others wait.

    The lock is the empty file `.NAME.lock` beside it, which stays; the system unlocks it when its
    process ends, however it ends.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(target.with_name(f".{target.name}.lock"))


def write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically.

    Half a surrogate pair, such as a byte of a path that the locale cannot spell, is escaped.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_text(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))


def _packer(file: BinaryIO) -> Callable[..., BinaryIO] | None:
    start = file.peek(10)  # leaves them there, also in a pipe
    return next((opener for magic, opener in PACKERS.items() if re.match(magic, start)), None)


def is_packed(path: Path | str) -> bool:
    """Say whether a file is compressed by gzip or bzip2, whatever its name."""
    with Path(path).open("rb") as file:
        return _packer(file) is not None


@contextmanager
def open_text(path: Path | str) -> Iterator[BinaryIO]:
    """Open a file to read its bytes, which are decompressed where they are gzip's or bzip2's.

    Damaged compressed bytes, met on the way, are a `UserError`; so is an empty .gz or .bz2.
    """
    path = Path(path)
    with path.open("rb") as file:
        opener = _packer(file)
        if opener is None and path.suffix in (".gz", ".bz2"):
            raise UserError(f"{path}: not a {path.suffix} file")
        try:
            yield opener(file) if opener else file
        except (OSError, EOFError, zlib.error) as error:
            if opener is None or getattr(error, "errno", None):
                raise
            raise UserError(f"{path}: not a whole {opener.__module__} file ({error})") from error


def text_lines(path: Path | str) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its "\\n") of a file.

    Bytes that are not UTF-8 are a `UserError` that says what they look like.
    """
    with open_text(path) as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(_not_utf8(path, number, raw, error.start, file)) from error
            if number == 1 and "\0" in line and guess_encoding(raw):  # UTF-16 without its mark
                raise UserError(_not_utf8(path, number, raw, raw.index(0), file))
            yield number, line


def _not_utf8(
    path: Path | str, number: int, line: bytes, position: int, file: BinaryIO
) -> str:
    """Describe a line of `file`, which was read up to its end."""
    rest, before = b"", b""
    if file.seekable():
        end = file.tell()
        rest = file.read(SAMPLE_BYTES)
        file.seek(0)
        before = file.read(min(SAMPLE_BYTES, end - len(line)))
    return describe_bytes(path, number, line, position, rest, before)


def parse_json(text: str | bytes, place: str, expected: str = "a JSON object") -> dict[str, Any]:
    """Return the JSON object in a text; anything else is a `UserError` that names the place."""
    try:
        value = json.loads(text)
    # ValueError: also bytes that are no text, and numbers of thousands of digits.
    except (ValueError, RecursionError) as error:
        encoding = guess_encoding(text) if isinstance(error, UnicodeDecodeError) else ""
        hint = f"; this looks like {encoding.upper()}, not UTF-8" if encoding else ""
        raise UserError(f"{place}: not valid JSON ({error}){hint}; expected {expected}") from error
    if not isinstance(value, dict):
        raise UserError(f"{place}: {type(value).__name__} as JSON; expected {expected}")
    return value


def read_json(path: Path | str) -> dict[str, Any]:
    """Read a JSON object from a file; what is missing or none is a `UserError` that names it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a JSON file")
    return parse_json(path.read_bytes(), str(path))


def file_sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file as 64 lower-case hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _check_sha256(path: Path, expected: str | None, what: str) -> None:
    """Raise a `UserError` about `what` unless the file has the expected sum, if there is one."""
    if expected is not None and (found := file_sha256(path)) != expected.lower():
        raise UserError(f"{what}: SHA-256 is {found}; expected {expected.lower()}")


# ------------------------------------------------------------------ downloads


def cache_root() -> Path:
    """Return the folder for what can be had again: `$TINYBERT_CACHE`, else `~/.cache/tinybert`."""
    return Path(os.environ.get("TINYBERT_CACHE") or Path.home() / ".cache" / "tinybert")


def add_download_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a script that downloads; `download_settings` reads them."""
    add = parser.add_argument
    add("--attempts", type=int, default=5,
        help="number of attempts in a row that may bring nothing before a download fails")
    add("--retry_delay", type=float, default=1.0,
        help="seconds between the first attempts; each further wait is twice as long")
    add("--timeout", type=float, default=30.0, help="longest silence of a server, in seconds")


def download_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `download` that the flags of `add_download_arguments` give."""
    return {"attempts": args.attempts, "delay": args.retry_delay, "timeout": args.timeout}


def download(
    url: str,
    target: Path | str,
    sha256: str | None = None,
    *,
    attempts: int = 5,
    delay: float = 1.0,
    timeout: float = 30.0,
) -> Path:
    """Download `url` (http, https or s3) to the file `target` and return its path.

    A file that exists is kept, after its SHA-256 was checked where one is given. An interrupted
    download leaves `target.part`, which is continued, also by a later call, if the server still
    has the same version (entity tag or date). Of several processes one downloads, the others
    wait. Length and SHA-256 are checked before the file gets its name.

    Args:
        attempts: number of refusals (429, 5xx), drops and timeouts in a row without a new byte.
        delay: seconds between the first attempts, doubled each time, at most a minute; a server's
            Retry-After comes first.
        timeout: longest silence of the server in seconds.

    Raises:
        UserError: naming the URL; `MissingError` for a file that is not there, `UnreachableError`
            when attempts are used up.
    """
    target = Path(target)
    if target.exists():
        _check_sha256(target, sha256, f"{target}, already there; delete it to download {url}")
        return target
    with file_lock(target):
        if target.exists():  # another process was faster
            return download(url, target, sha256)
        log.info("downloading %s to %s", url, target)
        part, record = (target.with_name(target.name + end) for end in PART_SUFFIXES)
        _receive(url, part, record, attempts, delay, timeout)
        try:
            _check_sha256(part, sha256, url)
            sync_file(part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
            record.unlink(missing_ok=True)
    return target


def _receive(
    url: str, part: Path, record: Path, attempts: int, delay: float, timeout: float
) -> None:
    """Bring `part` to its full length over as many connections as bring new bytes."""
    failures, longest = 0, _size(part)
    while True:
        try:
            return _receive_once(url, part, record, timeout)
        except requests.RequestException as error:
            message = f"{url}: no complete response ({_cause(error)})"
            failures = 0 if _size(part) > longest else failures + 1
            longest = max(longest, _size(part))
            if failures >= attempts:
                raise UnreachableError(message) from error
            retry_after = getattr(error.response, "headers", {}).get("Retry-After", "")
            wait = int(retry_after) if retry_after.isdigit() else delay * 2 ** (failures - 1)
            log.warning("%s; asking again", message)
            time.sleep(min(wait, LONGEST_WAIT_SECONDS))


def _receive_once(url: str, part: Path, record: Path, timeout: float) -> None:
    """Append what is missing, or begin anew where the server has not the version in `record`."""
    known = read_json(record) if record.exists() else {}
    version = known.get("version", "") if known.get("url") == url else ""
    start = _size(part) if version else 0
    with _request(url, start, version, timeout) as response:
        start = start if response.status_code == 206 else 0
        length = int(response.headers.get("Content-Length", 0))
        if length > (free := shutil.disk_usage(part.parent).free):
            raise UserError(f"{part.parent}: {free / 1e9:.3f} GB free on its disk; {url} needs "
                            f"{length / 1e9:.3f} GB")
        if not start:  # the bytes go first: they must not pass for those of the new version
            part.unlink(missing_ok=True)
            write_json(record, {"url": url, "version": _version(response)})
        # In a file of messages one line in a while, and none about what is quick.
        pause = 0.1 if sys.stderr.isatty() else LOG_SECONDS
        bar = tqdm(total=start + length or None, initial=start, unit="B", unit_scale=True,
                   desc=part.stem, mininterval=pause, delay=pause)
        with part.open("ab") as stream, bar:
            for chunk in response.iter_content(CHUNK_BYTES):
                stream.write(chunk)
                bar.update(len(chunk))


def _request(url: str, start: int, version: str, timeout: float) -> requests.Response:
    """Return the answer from byte `start` on (206) if it still has `version`, else all (200)."""
    # "identity": a compressed answer has another length and cannot be continued.
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    address = _signed(url) if url.startswith("s3://") else url
    response = requests.get(address, headers=headers, stream=True, timeout=timeout)
    code = response.status_code
    if code == 200 or (code == 206 and start and _version(response) == version):
        return response
    response.close()
    if start and code in (206, 416):  # another version, or nothing is missing
        return _request(url, 0, "", timeout)
    message = f"the server answered {code} {response.reason}"
    if code in RETRY_STATUSES:
        raise requests.HTTPError(message, response=response)
    kind = MissingError if code in MISSING_STATUSES else UserError
    raise kind(f"{url}: {message}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _version(response: requests.Response) -> str:
    """Return what names a file's version to a server, its strong entity tag or date, else ""."""
    headers = response.headers
    if "Content-Encoding" in headers:  # its bytes are counted otherwise than ours
        return ""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified", "")


def _cause(error: BaseException) -> BaseException:
    """Return what happened first; the libraries wrap it in several lines of their own."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


# ------------------------------------------------------------------ folders and archives


@contextmanager
def atomic_folder(target: Path | str) -> Iterator[Path]:
    """Yield a new empty folder that takes the place of `target` when the block succeeds.

    A block that raises leaves `target` as it was.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        yield new
        if target.exists():
            target.replace(Path(scratch) / "old")
        new.replace(target)


def extract_zip(archive: Path | str, folder: Path | str) -> Path:
    """Unpack a zip archive into the new or empty `folder` and return it.

    The folder appears only when everything is unpacked and every check sum agreed. Raises
    `UserError` for a damaged or encrypted archive, for a member that would land outside the
    folder, and for a folder with files in it.
    """
    archive, folder = Path(archive), Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: already exists; expected a new or empty folder")
    try:
        with zipfile.ZipFile(archive) as source, atomic_folder(folder) as temporary:
            for name in source.namelist():
                place = PureWindowsPath(name)  # takes both kinds of slash
                if place.drive or place.root or ".." in place.parts:
                    raise UserError(f"{archive}: member {name!r} would land outside the folder; "
                                    "refused")
            source.extractall(temporary)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise UserError(f"{archive}: not a sound zip archive ({error})") from error
    return folder


# ------------------------------------------------------------------ S3


def s3_address(url: str) -> tuple[str, str] | None:
    """Split s3://bucket/prefix into bucket and prefix; None for an empty address."""
    if not url:
        return None
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://") or not bucket:
        raise UserError(f"{url}: expected s3://bucket/prefix")
    return bucket, prefix.strip("/")


def _s3_client(public: bool = False) -> Any:
    """Return boto3's client for S3; a `public` bucket needs no account."""
    import boto3  # here, because it takes a second to load and few runs need it
    from botocore import UNSIGNED
    from botocore.config import Config

    session = boto3.session.Session()
    signature = UNSIGNED if public and session.get_credentials() is None else "s3v4"
    # Training waits for it.
    return session.client("s3", config=Config(signature_version=signature, connect_timeout=20))


def _signed(url: str) -> str:
    """Return an http address at which the object `url` can be read for an hour."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = s3_address(url)
    try:
        client = _s3_client(public=True)
        with suppress(ClientError):  # boto3 learns the bucket's region from the answer
            client.head_object(Bucket=bucket, Key=key)
        return client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": key})
    except BotoCoreError as error:
        raise UnreachableError(f"{url}: {error}") from error


def upload_folder(
    folder: Path | str, address: tuple[str, str], skip: Collection[str] = ()
) -> None:
    """Copy the files below `folder` that are new or changed to an S3 bucket.

    Args:
        address: bucket and prefix from `s3_address`.
        skip: names of files and subfolders that stay here; hidden ones (locks, temporary files)
            do, too.

    Raises:
        UserError: a file could not be uploaded; it says where the files still are.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    folder, (bucket, prefix) = Path(folder), address
    path = folder
    try:
        client = _s3_client()
        for path in sorted(folder.rglob("*")):
            inner = path.relative_to(folder)
            if path.is_dir() or any(name[0] == "." or name in skip for name in inner.parts):
                continue
            key = str(PurePosixPath(prefix) / inner.as_posix())
            version = f"{path.stat().st_size} {path.stat().st_mtime_ns}"
            with suppress(ClientError):  # it is not there, or we may write but not read
                if client.head_object(Bucket=bucket, Key=key)["Metadata"].get("version") == version:
                    continue
            client.upload_file(str(path), bucket, key, ExtraArgs={"Metadata": {"version": version}})
            log.info("uploaded %s to s3://%s/%s", path, bucket, key)
    except (Boto3Error, BotoCoreError, ClientError, OSError) as error:
        raise UserError(f"{path}: could not be uploaded to s3://{bucket}/{prefix} ({error}); the "
                        f"files are in {folder}") from error
