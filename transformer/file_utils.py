"""File names, errors, atomic writing, downloads and copies to S3 that every script shares."""

import argparse
import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import time
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

import requests
from filelock import FileLock
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

log = logging.getLogger(__name__)

WEIGHTS_NAME = "pytorch_model.bin"
SAFE_WEIGHTS_NAME = "model.safetensors"
ONNX_NAME = "model.onnx"
CONFIG_NAME = "config.json"
VOCAB_NAME = "vocab.txt"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

CHUNK_BYTES = 1 << 16  # what a broken connection loses at most
RETRY_STATUSES = (408, 425, 429, 500, 502, 503, 504)
MISSING_STATUSES = (401, 403, 404, 410)  # a store that does not list its files answers 403
LONGEST_WAIT_SECONDS = 60
LOG_SECONDS = 30.0  # between two lines of progress where no bar can be shown
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """A mistake of the user; the message names the file, line or value and what was expected."""


class MissingError(UserError):
    """A server has no such file, or keeps it from us."""


class UnreachableError(UserError):
    """A server did not answer, or not well, however often it was asked."""


@contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `target` that replaces it when the block succeeds.

    A block that raises leaves `target` as it was and removes the temporary file, so a reader
    never meets a half-written file under its final name, nor after a power failure. A process
    that is killed leaves the temporary file. Missing parent folders are made.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
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
    """Write `value` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file; a file that is missing or not JSON is a `UserError` that names it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a JSON file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


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


def _check_space(folder: Path, needed: int, what: str) -> None:
    """Raise a `UserError` where the disk of an existing folder has not the bytes that it takes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: {free / 1e9:.3f} GB free on its disk; {what} needs "
                        f"{needed / 1e9:.3f} GB")


# ---------------------------------------------------------------------------------------------
# Downloads
# ---------------------------------------------------------------------------------------------


def cache_root() -> Path:
    """Return the folder for what can be had again: `$TINYBERT_CACHE`, else `~/.cache/tinybert`."""
    return Path(os.environ.get("TINYBERT_CACHE") or Path.home() / ".cache" / "tinybert")


def cached_path(
    url_or_path: Path | str, cache_dir: Path | str | None = None, sha256: str | None = None
) -> Path:
    """Return a local path for a file that is local, on the web or in S3.

    A path without a scheme is returned as it is when it exists. `http://`, `https://` and `s3://`
    are downloaded once into `cache_dir` (default: `$TINYBERT_CACHE`, else `~/.cache/tinybert`);
    delete the cached file to fetch it again. `sha256`, 64 hexadecimal digits, is checked in every
    case. Raises `UserError` for a missing file and a failed download.
    """
    text = str(url_or_path)
    if "://" not in text:
        path = Path(text).expanduser()
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; expected a local path or an URL")
        _check_sha256(path, sha256, str(path))
        return path
    # The digest keeps apart files of the same name, the name lets a reader see what is cached.
    prefix = hashlib.sha256(text.encode()).hexdigest()[:16]
    name = PurePosixPath(urlsplit(text).path).name or "index"
    return download(text, Path(cache_dir or cache_root()) / f"{prefix}-{name}", sha256)


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
    has the same version (entity tag or date), or if `sha256` is given. Of several processes one
    downloads, the others wait. Length and SHA-256 are checked before the file gets its name.

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
    if not target.exists():
        with file_lock(target):
            if not target.exists():  # another process may have been faster
                part = target.with_name(target.name + ".part")
                log.info("downloading %s to %s", url, target)
                _Download(url, part, sha256, attempts, delay, timeout).finish(target)
                return target
    _check_sha256(target, sha256, f"{target}, already there; delete it to download {url}")
    return target


@dataclass
class _Download:
    """A download of `url` into `part`; beside it `record` keeps the URL and version of it."""

    url: str
    part: Path
    sha256: str | None
    attempts: int
    delay: float  # seconds
    timeout: float  # seconds

    def __post_init__(self) -> None:
        self.record = self.part.with_name(self.part.name + ".json")
        self.session = requests.Session()
        retry = Retry(
            self.attempts - 1, backoff_factor=self.delay, backoff_max=LONGEST_WAIT_SECONDS,
            retry_after_max=LONGEST_WAIT_SECONDS, status_forcelist=RETRY_STATUSES,
            raise_on_status=False,
        )  # fmt: skip
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=retry))

    @property
    def size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def finish(self, target: Path) -> None:
        """Bring the part to its full length, check it, and give it its name."""
        try:
            self.receive()
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            raise UserError(
                f"{self.part}: no space left on the disk while loading {self.url} "
                f"({error.strerror}); {self.size} bytes are kept for another call"
            ) from error
        try:
            _check_sha256(self.part, self.sha256, self.url)
            _sync(self.part)
            self.part.replace(target)
        finally:
            self.part.unlink(missing_ok=True)
            self.record.unlink(missing_ok=True)

    def receive(self) -> None:
        """Receive what is missing, over as many connections as bring new bytes."""
        failures, longest = 0, self.size
        while True:
            try:
                return self.receive_once()
            except requests.RequestException as error:
                message = f"{self.url}: the connection broke ({_cause(error)})"
                failures = 0 if self.size > longest else failures + 1
                longest = max(longest, self.size)
                if failures >= self.attempts:
                    raise UnreachableError(message) from error
                log.warning("%s, going on", message)
                time.sleep(min(self.delay * 2**failures, LONGEST_WAIT_SECONDS))

    def receive_once(self) -> None:
        """Append what is missing, or begin anew where the server has another version."""
        known = read_json(self.record) if self.record.exists() else {}
        version = known.get("version", "")
        may_continue = known.get("url") == self.url and (version or self.sha256)
        start = self.size if may_continue else 0
        with self.open(start, version) as response:
            start = start if response.status_code == 206 else 0
            length = response.headers.get("Content-Length", "")
            length = int(length) if length.isdigit() else None
            _check_space(self.part.parent, length or 0, self.url)
            if not start:  # the bytes go first: they must not pass for those of the new version
                self.part.unlink(missing_ok=True)
                write_json(self.record, {"url": self.url, "version": _version(response)})
            self.append(response, start, length)

    def append(self, response: requests.Response, start: int, length: int | None) -> None:
        """Append what comes, and show how far it is; `length` in bytes if it is known."""
        name, told = PurePosixPath(urlsplit(self.url).path).name, time.monotonic()
        size = None if length is None else start + length
        # disable=None: no bar where stderr is a file.
        bar = tqdm(total=size, initial=start, unit="B", unit_scale=True, desc=name, disable=None)
        with self.part.open("ab") as stream, bar:
            for chunk in response.iter_content(CHUNK_BYTES):
                stream.write(chunk)
                bar.update(len(chunk))
                if bar.disable and time.monotonic() - told > LOG_SECONDS:
                    told = time.monotonic()
                    log.info("%s: %.0f of %.0f MB", name, stream.tell() / 1e6, (size or 0) / 1e6)

    def open(self, start: int, version: str) -> requests.Response:
        """Return the answer from byte `start` on (206) if it still has `version`, else all."""
        # "identity": a compressed answer has another length and cannot be continued.
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        if start and version:
            headers["If-Range"] = version
        url = _signed(self.url) if self.url.lower().startswith("s3://") else self.url
        try:
            response = self.session.get(url, headers=headers, stream=True, timeout=self.timeout)
        except requests.RequestException as error:
            raise UnreachableError(
                f"{self.url}: no connection or no answer ({_cause(error)})") from error
        code = response.status_code
        span = response.headers.get("Content-Range", "")
        goes_on = span.startswith(f"bytes {start}-") and version in ("", _version(response))
        if code == 200 or (code == 206 and start and goes_on):
            return response
        response.close()
        if start and code in (206, 416):
            log.info("%s: cannot go on at byte %d, starting again", self.url, start)
            return self.open(0, "")
        kind = UnreachableError if code in RETRY_STATUSES else UserError
        kind = MissingError if code in MISSING_STATUSES else kind
        raise kind(f"{self.url}: the server answered {code} {response.reason}")


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


# ---------------------------------------------------------------------------------------------
# Folders and archives
# ---------------------------------------------------------------------------------------------


@contextmanager
def atomic_folder(target: Path | str, replace: bool = False) -> Iterator[Path]:
    """Yield a new empty folder beside `target` that takes its name when the block succeeds.

    `target` may be absent or an empty folder; `replace` allows a full one, which is removed only
    after the new one stands. A block that raises leaves `target` as it was.
    """
    target = Path(target)
    if not replace and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: already exists; expected a new or empty folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            target.replace(old)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def extract_zip(archive: Path | str, folder: Path | str) -> Path:
    """Unpack a zip archive into the new or empty `folder` and return it.

    The folder appears only when everything is unpacked and every check sum agreed. Raises
    `UserError` for a damaged or encrypted archive, for a member that would land outside the
    folder or is a link, and for a disk without room for all of it.
    """
    archive = Path(archive)
    try:
        with zipfile.ZipFile(archive) as source, atomic_folder(folder) as temporary:
            members = source.infolist()
            unpacked = sum(member.file_size for member in members)
            _check_space(temporary, unpacked, f"the content of {archive}")
            for member in members:
                place = PureWindowsPath(member.filename)  # takes both kinds of slash
                is_link = stat.S_ISLNK(member.external_attr >> 16)
                if is_link or place.drive or place.root or ".." in place.parts:
                    raise UserError(f"{archive}: member {member.filename!r} is a link, or would "
                                    "land outside the folder; refused")
            source.extractall(temporary)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, FileExistsError,
            NotADirectoryError, IsADirectoryError) as error:  # fmt: skip
        raise UserError(f"{archive}: not a sound zip archive ({error})") from error
    return Path(folder)


# ---------------------------------------------------------------------------------------------
# S3
# ---------------------------------------------------------------------------------------------


def s3_address(url: str) -> tuple[str, str] | None:
    """Split s3://bucket/prefix into bucket and prefix; None for an empty address."""
    if not url:
        return None
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://") or not bucket:
        raise UserError(f"{url}: expected s3://bucket/prefix")
    return bucket, prefix.strip("/")


def _s3_client(**options: Any) -> Any:
    """Return boto3's client for S3; `options` are those of its `Config`."""
    import boto3  # here, because it takes a second to load and few runs need it
    from botocore.config import Config

    return boto3.session.Session().client("s3", config=Config(**options))


def _signed(url: str, **options: Any) -> str:
    """Return an http address at which the object `url` can be read for an hour."""
    from botocore import UNSIGNED
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    bucket, key = s3_address(url)
    try:
        client = _s3_client(**{"signature_version": "s3v4", **options})
        with suppress(ClientError):  # boto3 learns the bucket's region from the answer
            client.head_object(Bucket=bucket, Key=key)
        return client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": key})
    except NoCredentialsError:  # public buckets need no account
        return _signed(url, signature_version=UNSIGNED)
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
        client = _s3_client(connect_timeout=20)  # training waits for it
        for path in sorted(folder.rglob("*")):
            inner = path.relative_to(folder)
            stays = any(name.startswith(".") or name in skip for name in inner.parts)
            if path.is_file() and not stays:
                key = str(PurePosixPath(prefix) / inner.as_posix())
                _upload_changed(client, path, bucket, key)
    except (Boto3Error, BotoCoreError, ClientError, OSError) as error:
        raise UserError(f"{path}: could not be uploaded to s3://{bucket}/{prefix} ({error}); the "
                        f"files are in {folder}") from error


def _upload_changed(client: Any, path: Path, bucket: str, key: str) -> None:
    """Upload a file unless the bucket has it with the same size and time of change."""
    from botocore.exceptions import ClientError

    version = f"{path.stat().st_size} {path.stat().st_mtime_ns}"
    try:
        if client.head_object(Bucket=bucket, Key=key)["Metadata"].get("version") == version:
            return
    except ClientError:  # it is not there, or we may write but not read
        pass
    client.upload_file(str(path), bucket, key, ExtraArgs={"Metadata": {"version": version}})
    log.info("uploaded %s to s3://%s/%s", path, bucket, key)
