"""File names, atomic writing and downloads that every script shares."""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests
from tqdm import tqdm

log = logging.getLogger(__name__)

WEIGHTS_NAME = "pytorch_model.bin"
SAFE_WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
VOCAB_NAME = "vocab.txt"


class UserError(Exception):
    """A mistake of the user; the message names the file, line or value and what was expected."""


@contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `target` that replaces it when the block succeeds.

    A block that raises leaves `target` as it was and removes the temporary file, so a reader
    never meets a half-written file under its final name. Missing parent folders are made.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


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


# ---------------------------------------------------------------------------------------------
# Downloads
# ---------------------------------------------------------------------------------------------

CHUNK_BYTES = 1 << 16  # what a broken connection loses at most
TEMPORARY_STATUSES = (408, 425, 429, 500, 502, 503, 504)
LONGEST_WAIT_SECONDS = 60.0


class _TemporaryError(Exception):
    """The server or the line failed in a way that may pass; `wait` is in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Body(NamedTuple):
    """An open answer: its bytes from `start` on, the whole file's size and the version's tag."""

    chunks: Iterator[bytes]
    start: int
    size: int | None
    tag: str | None
    close: Callable[[], None]


def file_sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file as 64 lower-case hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


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
    case. Raises `UserError` for a missing file, an unknown scheme and a failed download.
    """
    text = str(url_or_path)
    scheme = text.split("://", 1)[0].lower() if "://" in text else ""
    if not scheme:
        path = Path(text).expanduser()
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; expected a local path or an URL")
        if sha256 is not None:
            _check_sha256(path, sha256, str(path))
        return path
    if scheme not in ("http", "https", "s3"):
        raise UserError(f"{text}: unknown scheme {scheme!r}; expected http, https or s3")
    if cache_dir is None:
        cache_dir = cache_root()
    # The digest keeps apart files of the same name, the name lets a reader see what is cached.
    prefix = hashlib.sha256(text.encode()).hexdigest()[:16]
    name = PurePosixPath(urlsplit(text).path).name or "index"
    return download(text, Path(cache_dir) / f"{prefix}-{name}", sha256)


def download(
    url: str,
    target: Path | str,
    sha256: str | None = None,
    *,
    attempts: int = 5,
    delay: float = 1.0,
    timeout: float = 30.0,
    progress: bool = True,
) -> Path:
    """Download `url` (http, https or s3) to the file `target` and return its path.

    A file already under that name is kept, after its SHA-256 was checked where one is given. Data
    gathers in `target.part`; a later call goes on from there if the server still offers the same
    version (entity tag and size in bytes). Refused requests (429, 5xx) and dropped connections
    are repeated until `attempts` of them in a row brought no new byte, after `delay`, 2 x
    `delay`, 4 x `delay`, ... seconds; `timeout` is the longest silence in seconds. The length and
    `sha256` are checked before the file gets its name. Raises `UserError` naming the URL.
    """
    target = Path(target)
    if target.exists():
        if sha256 is not None:
            _check_sha256(target, sha256, f"{target}, already there; delete it to download {url}")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    log.info("downloading %s to %s", url, target)
    _fetch_all(url, part, attempts, delay, timeout, progress)
    if sha256 is not None:
        try:
            _check_sha256(part, sha256, url)
        except UserError:
            _remove_part(part)
            raise
    part.replace(target)
    _remove_part(part)
    return target


def _fetch_all(
    url: str, part: Path, attempts: int, delay: float, timeout: float, progress: bool
) -> None:
    """Call `_fetch` until `part` is whole or `attempts` calls in a row brought no new byte."""
    failures, most_bytes = 0, _size(part)
    while True:
        try:
            _fetch(url, part, timeout, progress)
            return
        except _TemporaryError as error:
            failures = 0 if _size(part) > most_bytes else failures + 1
            most_bytes = max(most_bytes, _size(part))
            if failures >= attempts:
                kept = f"; {_size(part)} bytes are kept in {part} for another call"
                raise UserError(
                    f"{url}: could not be downloaded: {error} ({attempts} attempts brought "
                    f"nothing new{kept if _size(part) else ''})"
                ) from error
            wait = delay * 2 ** max(failures - 1, 0) if error.wait is None else error.wait
            wait = min(wait, LONGEST_WAIT_SECONDS)
            log.warning("%s: %s; next attempt in %.1f s", url, error, wait)
            time.sleep(wait)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f"{part}: no space left on the disk while loading {url}") from error


def _fetch(url: str, part: Path, timeout: float, progress: bool) -> None:
    """Bring `part` to its full length, going on where it ended if that is still possible."""
    start, version = _size(part), _read_version(part)
    if start and version.get("url") != url:
        start = 0
    body = _open(url, start, timeout)
    unchanged = (body.size, body.tag) == (version.get("size"), version.get("tag"))
    if start and (body.start != start or not unchanged):
        log.info("%s: cannot go on at byte %d, starting again", url, start)
        start = 0
        if body.start != 0:  # else the server has sent the whole file anyway
            body.close()
            body = _open(url, start, timeout)
    write_json(_version_file(part), {"url": url, "size": body.size, "tag": body.tag})
    with (
        part.open("ab" if start else "wb") as stream,
        tqdm(
            total=body.size,
            initial=start,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            desc=PurePosixPath(urlsplit(url).path).name,
            disable=None if progress else True,
        ) as bar,
    ):
        for chunk in body.chunks:
            stream.write(chunk)
            bar.update(len(chunk))
    if body.size is not None and _size(part) != body.size:
        reached = _size(part)
        if reached > body.size:
            _remove_part(part)
        raise _TemporaryError(f"{reached} bytes came where {body.size} were announced")


def _open(url: str, start: int, timeout: float) -> _Body:
    """Open `url` at byte `start`; the server may answer from byte 0 instead."""
    return (_open_s3 if url.lower().startswith("s3://") else _open_http)(url, start, timeout)


def _open_http(url: str, start: int, timeout: float) -> _Body:
    # "identity": a compressed answer has another length and cannot be continued.
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = requests.get(url, headers=headers, stream=True, timeout=timeout)
    except (requests.exceptions.SSLError, requests.exceptions.InvalidURL) as error:
        raise UserError(f"{url}: cannot be opened: {error}") from error
    except (requests.ConnectionError, requests.Timeout) as error:
        raise _TemporaryError(f"no connection ({_root_cause(error)})") from error
    except requests.RequestException as error:
        raise UserError(f"{url}: cannot be opened: {error}") from error
    code = response.status_code
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    if code in (200, 206):
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        plain = response.headers.get("Content-Encoding", "identity") == "identity"
        length = response.headers.get("Content-Length", "") if plain else ""
        size = total if code == 206 else length
        first = response.headers.get("Content-Range", "")[len("bytes ") :].partition("-")[0]
        return _Body(
            _http_chunks(response),
            int(first) if code == 206 and first.isdigit() else 0,
            int(size) if size.isdigit() else None,
            tag,
            response.close,
        )
    response.close()
    if code == 416 and start:
        # Nothing lies behind `start`: the part is whole, or it belongs to another version.
        whole = total.isdigit() and int(total) == start
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        return _Body(iter(()), start if whole else -1, start, tag, response.close)
    reason = f"the server answered {code} {response.reason}"
    if code in TEMPORARY_STATUSES:
        wait = response.headers.get("Retry-After", "")
        raise _TemporaryError(reason, float(wait) if wait.isdigit() else None)
    raise UserError(f"{url}: {reason}")


def _http_chunks(response: requests.Response) -> Iterator[bytes]:
    try:
        yield from response.iter_content(CHUNK_BYTES)
    except requests.RequestException as error:
        raise _TemporaryError(f"the connection broke ({_root_cause(error)})") from error
    finally:
        response.close()


def _open_s3(url: str, start: int, timeout: float) -> _Body:
    try:
        import boto3  # here, because it takes a second to load and few runs need it
        import botocore.exceptions
        from botocore import UNSIGNED
        from botocore.config import Config
    except ImportError as error:
        raise UserError(f"{url}: reading from S3 needs the package boto3; install it") from error
    bucket, _, key = url[len("s3://") :].partition("/")
    if not bucket or not key:
        raise UserError(f"{url}: expected s3://bucket/key")
    session = boto3.session.Session()
    options = {"connect_timeout": timeout, "read_timeout": timeout}
    if session.get_credentials() is None:
        options["signature_version"] = UNSIGNED  # public buckets need no account
    client = session.client("s3", config=Config(retries={"total_max_attempts": 1}, **options))
    wanted = {"Range": f"bytes={start}-"} if start else {}
    try:
        answer = client.get_object(Bucket=bucket, Key=key, **wanted)
    except botocore.exceptions.ClientError as error:
        code = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if code == 416 and start:
            return _open_s3(url, 0, timeout)
        if code in TEMPORARY_STATUSES:
            raise _TemporaryError(str(error)) from error
        raise UserError(f"{url}: {error}") from error
    except (botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError) as error:
        raise _TemporaryError(f"no connection ({_root_cause(error)})") from error
    except botocore.exceptions.BotoCoreError as error:
        raise UserError(f"{url}: {error}") from error
    total = answer.get("ContentRange", "").rpartition("/")[2]
    partial = total.isdigit()
    size = int(total) if partial else answer["ContentLength"]
    chunks = _s3_chunks(answer["Body"], botocore.exceptions.BotoCoreError)
    return _Body(chunks, start if partial else 0, size, answer.get("ETag"), answer["Body"].close)


def _s3_chunks(body: Any, broken: type[Exception]) -> Iterator[bytes]:
    try:
        yield from body.iter_chunks(CHUNK_BYTES)
    except broken as error:
        raise _TemporaryError(f"the connection broke ({_root_cause(error)})") from error
    finally:
        body.close()


def _root_cause(error: BaseException) -> BaseException:
    """Return what happened first; the libraries wrap it in several lines of their own."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _check_sha256(path: Path, expected: str, what: str) -> None:
    found = file_sha256(path)
    if found != expected.lower():
        raise UserError(f"{what}: SHA-256 is {found}; expected {expected.lower()}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _version_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_version(part: Path) -> dict[str, Any]:
    """Return what is known of a part: url, size in bytes and tag; {} if that is lost."""
    try:
        return read_json(_version_file(part))
    except UserError:
        return {}


def _remove_part(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)


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


# A file standing where a folder should be is an archive that contradicts itself.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    RuntimeError,
    NotADirectoryError,
    FileExistsError,
    IsADirectoryError,
)


def extract_zip(archive: Path | str, folder: Path | str) -> Path:
    """Unpack a zip archive into the new or empty `folder` and return it.

    The folder appears only when everything is unpacked and every check sum agreed. Raises
    `UserError` for a damaged or encrypted archive and for a member that would land outside the
    folder: an absolute path, a drive, `..`, or a symbolic link that leads out.
    """
    archive = Path(archive)
    try:
        with zipfile.ZipFile(archive) as source, atomic_folder(folder) as temporary:
            links = []
            for member in source.infolist():
                _check_member(archive, member.filename)
                if stat.S_ISLNK(member.external_attr >> 16):
                    links.append(member)
                else:
                    source.extract(member, temporary)
            # Last, so that no file is ever written through a link.
            for member in links:
                destination = source.read(member).decode(errors="replace")
                _make_link(archive, destination, temporary, member.filename)
            for member in links:
                _check_link(archive, temporary, member.filename)
    except _ZIP_ERRORS as error:
        raise UserError(f"{archive}: not a sound zip archive ({error})") from error
    return Path(folder)


def _check_member(archive: Path, name: str) -> None:
    windows = PureWindowsPath(name)  # takes both kinds of slash
    if windows.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise UserError(f"{archive}: member {name!r} would land outside the folder; refused")


def _make_link(archive: Path, destination: str, folder: Path, name: str) -> None:
    if PureWindowsPath(destination).drive or PureWindowsPath(destination).root:
        raise UserError(f"{archive}: link {name!r} points to {destination!r}, outside; refused")
    place = folder / name
    # Before the folders are made: an earlier link may stand on the way to this one.
    _check_link(archive, folder, str(PurePosixPath(name).parent))
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_symlink() or place.exists():
        raise UserError(f"{archive}: {name!r} occurs twice; refused")
    place.symlink_to(destination)


def _check_link(archive: Path, folder: Path, name: str) -> None:
    if not Path(os.path.realpath(folder / name)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{archive}: link {name!r} leads outside the folder; refused")


# ------------------------------------------------------------------ uploads


def s3_address(url: str) -> tuple[str, str] | None:
    """Split s3://bucket/prefix into bucket and prefix; None for an empty address."""
    if not url:
        return None
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://") or not bucket:
        raise UserError(f"--data_url {url}: expected s3://bucket/prefix")
    return bucket, prefix.strip("/")


def upload_folder(folder: Path | str, bucket: str, prefix: str) -> None:
    """Copy every file below `folder` to an S3 bucket, with the credentials that boto3 finds.

    A refused upload is a `UserError` that says where the files still are.
    """
    import boto3  # here, because it takes a second to load and few runs need it
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    try:
        client = boto3.client("s3")
        for path in tqdm(files, unit="file", desc="upload", disable=None):
            key = f"{prefix}/{path.relative_to(folder).as_posix()}".lstrip("/")
            client.upload_file(str(path), bucket, key)
    except (Boto3Error, BotoCoreError, ClientError) as error:
        raise UserError(
            f"--data_url s3://{bucket}/{prefix}: {error}; the files are in {folder}"
        ) from error
