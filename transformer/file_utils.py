"""File names, atomic writing, downloads and uploads that every script shares."""

import argparse
import base64
import binascii
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import ssl
import stat
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import requests
from tqdm import tqdm

log = logging.getLogger(__name__)

WEIGHTS_NAME = "pytorch_model.bin"
SAFE_WEIGHTS_NAME = "model.safetensors"
ONNX_NAME = "model.onnx"
CONFIG_NAME = "config.json"
VOCAB_NAME = "vocab.txt"
CHECKSUMS_NAME = "SHA256SUMS"  # what a mirror may hold beside its files

Answer = TypeVar("Answer")


class UserError(Exception):
    """A mistake of the user; the message names the file, line or value and what was expected."""


class MissingError(UserError):
    """A server has no such file, or keeps it from us; `reason` is its own word for that, or ""."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class UnreachableError(UserError):
    """A server did not answer, or not well, however often it was asked."""


@contextmanager
def atomic_path(target: Path | str, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `target` that replaces it when the block succeeds.

    A block that raises leaves `target` as it was and removes the temporary file, so a reader
    never meets a half-written file under its final name; nor after a power failure, for which
    `durable` waits for the disk. A process that is killed leaves the temporary file. Missing
    parent folders are made.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            _sync(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have the disk hold the file's bytes: a later renaming must not get there before them."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


@contextmanager
def file_lock(target: Path | str) -> Iterator[None]:
    """Let one process at a time into the blocks for the same `target`; the others wait.

    The lock is an empty file `.NAME.lock` beside it. The system takes it from a process that
    ends, however it ends; one that is killed leaves the file, which locks nothing then. A file
    system without locks is a warning.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name}.lock")
    while True:
        with lock.open("ab") as stream:
            _lock(stream, target)
            try:
                if not os.path.samestat(os.fstat(stream.fileno()), lock.stat()):
                    continue
            except FileNotFoundError:  # the one before has removed what we waited for
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _lock(stream: IO[bytes], target: Path) -> None:
    try:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: another process is making it; waiting", target)
            fcntl.flock(stream, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log.warning("%s: the file system has no locks; let one process at a time make it", target)


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
MISSING_STATUSES = (401, 403, 404, 410)  # a store that does not list its files answers 403
LONGEST_WAIT_SECONDS = 60.0
LOG_SECONDS = 30.0  # between two lines of progress where no bar can be shown
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _TemporaryError(Exception):
    """The server or the line failed in a way that may pass; `wait` is in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Body(NamedTuple):
    """An open answer: its bytes from `start` on, and what is said of the whole file.

    `size` is in bytes, `tag` names the version, `digest` is such as "sha256:0123...".
    """

    chunks: Iterator[bytes]
    start: int
    size: int | None
    tag: str | None
    digest: str | None
    headers: Mapping[str, str]
    close: Callable[[], None]


def file_sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file as 64 lower-case hexadecimal digits."""
    return _file_digest(Path(path), hashlib.sha256())


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


def add_download_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a script that downloads; `download_settings` reads them."""
    add = parser.add_argument
    add("--attempts", type=int, default=5,
        help="number of attempts in a row that may bring nothing before a download fails")
    add("--retry_delay", type=float, default=1.0,
        help="seconds before the second attempt; each further wait is twice as long")
    add("--timeout", type=float, default=30.0, help="longest silence of a server, in seconds")


def download_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `download` that the flags of `add_download_arguments` give."""
    return {"attempts": args.attempts, "delay": args.retry_delay, "timeout": args.timeout}


def download(
    url: str,
    target: Path | str,
    sha256: str | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    attempts: int = 5,
    delay: float = 1.0,
    timeout: float = 30.0,
    progress: bool = True,
) -> Path:
    """Download `url` (http, https or s3) to the file `target` and return its path.

    A file already under that name is kept, after its SHA-256 was checked where one is given. Data
    gathers in `target.part`; a later call goes on from there if the server still offers the same
    version (entity tag and size in bytes). Of several processes one downloads, the others wait
    for it. Refused requests (429, 5xx), dropped connections and silence of more than `timeout`
    seconds are repeated until `attempts` of them in a row brought no new byte, after `delay`,
    2 x `delay`, 4 x `delay`, ... seconds, or what the server asks for, at most a minute.

    Before the file gets its name the announced length is checked, and its bytes against
    `sha256`, else against a sum that the server announces; wrong ones are fetched a second time.
    `headers` go along with requests over http(s). Raises `UserError` naming the URL:
    `MissingError` for a file that is not there, `UnreachableError` when attempts are used up.
    """
    target = Path(target)
    if target.exists():
        return _checked(target, sha256, url)
    with file_lock(target):
        if target.exists():  # another process was faster
            return _checked(target, sha256, url)
        part = target.with_name(target.name + ".part")
        log.info("downloading %s to %s", url, target)
        for last in (False, True):
            _insist(url, attempts, delay, part,
                    lambda: _fetch(url, part, sha256, headers or {}, timeout, progress))
            wrong = _wrong_bytes(part, sha256)
            if wrong is None:
                break
            _remove_part(part)
            if last:
                raise UserError(f"{url}: {wrong}")
            log.warning("%s: %s; once more from the start", url, wrong)
        _sync(part)
        part.replace(target)
        _remove_part(part)
    return target


def answer_headers(
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    attempts: int = 5,
    delay: float = 1.0,
    timeout: float = 30.0,
) -> Mapping[str, str]:
    """Return the headers that answer a request for `url`, those of redirections among them.

    The bytes stay where they are; errors and repeated attempts are those of `download`.
    """
    body = _insist(url, attempts, delay, None, lambda: _open(url, 0, None, headers or {}, timeout))
    body.close()
    return body.headers


def _checked(target: Path, sha256: str | None, url: str) -> Path:
    if sha256 is not None:
        _check_sha256(target, sha256, f"{target}, already there; delete it to download {url}")
    return target


def _insist(
    url: str, attempts: int, delay: float, part: Path | None, attempt: Callable[[], Answer]
) -> Answer:
    """Call `attempt` until it succeeds, or `attempts` calls in a row brought `part` no new byte."""
    failures, most_bytes = 0, _size(part)
    while True:
        try:
            return attempt()
        except _TemporaryError as error:
            failures = 0 if _size(part) > most_bytes else failures + 1
            most_bytes = max(most_bytes, _size(part))
            if failures >= attempts:
                kept = f"; {_size(part)} bytes are kept in {part} for another call"
                raise UnreachableError(
                    f"{url}: could not be downloaded: {error} ({attempts} attempts brought "
                    f"nothing new{kept if _size(part) else ''})"
                ) from error
            wait = delay * 2 ** max(failures - 1, 0) if error.wait is None else error.wait
            wait = min(wait, LONGEST_WAIT_SECONDS)
            log.warning("%s: %s; next attempt in %.1f s", url, error, wait)
            time.sleep(wait)
        except OSError as error:
            if part is None or error.errno not in FULL_DISK:
                raise
            raise UserError(
                f"{part}: no space left on the disk while loading {url} ({error.strerror}); "
                f"{_size(part)} bytes are kept for another call"
            ) from error


def _fetch(
    url: str,
    part: Path,
    sha256: str | None,
    headers: Mapping[str, str],
    timeout: float,
    progress: bool,
) -> None:
    """Bring `part` to its full length, going on where it ended if that is still possible."""
    start, version = _size(part), _read_version(part)
    if start and version.get("url") != url:
        start = 0
    body = _open(url, start, version.get("tag"), headers, timeout)
    try:
        unchanged = (body.size, body.tag) == (version.get("size"), version.get("tag"))
        # A server that names no version could have changed it: then only a sum would tell.
        provable = body.tag or sha256 or version.get("digest")
        if start and (body.start != start or not unchanged or not provable):
            log.info("%s: cannot go on at byte %d, starting again", url, start)
            start = 0
            if body.start != 0:  # else the server has sent the whole file anyway
                body.close()
                body = _open(url, 0, None, headers, timeout)
        if body.size is not None:
            freed = 0 if start else _size(part)
            _check_space(part.parent, body.size - start - freed, url)
        digest = body.digest or (version.get("digest") if start else None)
        version = {"url": url, "size": body.size, "tag": body.tag, "digest": digest}
        if not start:  # before the record of the new version: old bytes must not pass for its
            part.unlink(missing_ok=True)
        write_json(_version_file(part), version)
        _write_chunks(url, body, part, start, progress)
    finally:
        body.close()
    if body.size is not None and _size(part) != body.size:
        reached = _size(part)
        if reached > body.size:
            _remove_part(part)
        raise _TemporaryError(f"{reached} bytes came where {body.size} were announced")


def _write_chunks(url: str, body: _Body, part: Path, start: int, progress: bool) -> None:
    """Append an answer to `part`, or write it anew, and show how far it is."""
    name, told = PurePosixPath(urlsplit(url).path).name, time.monotonic()
    with (
        part.open("ab" if start else "wb") as stream,
        tqdm(
            total=body.size,
            initial=start,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            desc=name,
            disable=None if progress else True,  # None: no bar where stderr is a file
        ) as bar,
    ):
        for chunk in body.chunks:
            stream.write(chunk)
            bar.update(len(chunk))
            if progress and bar.disable and time.monotonic() - told > LOG_SECONDS:
                told, whole = time.monotonic(), (body.size or 0) / 1e6
                log.info("%s: %.0f of %.0f MB", name, stream.tell() / 1e6, whole)


def _open(
    url: str, start: int, tag: str | None, headers: Mapping[str, str], timeout: float
) -> _Body:
    """Open `url` at byte `start`, if `tag` still names its version, else at the beginning.

    The server may answer from the beginning in any case.
    """
    if url.lower().startswith("s3://"):
        return _open_s3(url, start, timeout)
    return _open_http(url, start, tag, headers, timeout)


def _open_http(
    url: str, start: int, tag: str | None, headers: Mapping[str, str], timeout: float
) -> _Body:
    # "identity": a compressed answer has another length and cannot be continued.
    headers = {**headers, "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    if start and tag and tag.startswith('"'):  # a date and a weak tag ("W/...") may not be used so
        headers["If-Range"] = tag
    try:
        response = requests.get(url, headers=headers, stream=True, timeout=timeout)
    except (requests.ConnectionError, requests.Timeout) as error:
        if isinstance(_root_cause(error), ssl.SSLCertVerificationError):
            raise UserError(f"{url}: cannot be opened: {_root_cause(error)}") from error
        raise _TemporaryError(f"no connection or no answer ({_root_cause(error)})") from error
    except requests.RequestException as error:
        raise UserError(f"{url}: cannot be opened: {error}") from error
    said = requests.structures.CaseInsensitiveDict()
    for answer in (*response.history, response):
        said.update(answer.headers)
    code, total = response.status_code, response.headers.get("Content-Range", "").rpartition("/")[2]
    tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
    if code in (200, 206):
        plain = response.headers.get("Content-Encoding", "identity") == "identity"
        length = response.headers.get("Content-Length", "") if plain else ""
        size = total if code == 206 else length
        first = response.headers.get("Content-Range", "")[len("bytes ") :].partition("-")[0]
        return _Body(
            _http_chunks(response),
            int(first) if code == 206 and first.isdigit() else 0,
            int(size) if size.isdigit() else None,
            tag,
            _http_digest(said) if plain else None,
            said,
            response.close,
        )
    response.close()
    if code == 416 and start:
        # Nothing lies behind `start`: the part is whole, or it belongs to another version.
        whole = total.isdigit() and int(total) == start
        return _Body(iter(()), start if whole else -1, start, tag, None, said, response.close)
    reason = f"the server answered {code} {response.reason}"
    raise _refusal(url, code, reason, said.get("Retry-After", ""), said.get("X-Error-Code", ""))


def _refusal(url: str, code: int, reason: str, retry_after: str, word: str) -> Exception:
    """Return the error for an answer that is no file."""
    if code in TEMPORARY_STATUSES:
        return _TemporaryError(reason, _seconds(retry_after))
    if code in MISSING_STATUSES:
        return MissingError(f"{url}: {reason}", word)
    return UserError(f"{url}: {reason}")


def _seconds(retry_after: str) -> float | None:
    """Read a Retry-After header, a number of seconds or a date; None if it is neither."""
    if retry_after.isdigit():
        return float(retry_after)
    try:
        return max(parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None


def _http_digest(headers: Mapping[str, str]) -> str | None:
    """Return the sum of the whole file that a server announces, such as "md5:0123..."."""
    tags = {
        name: headers.get(name, "").removeprefix("W/").strip('"').lower()
        for name in ("X-Linked-ETag", "ETag")
    }
    if "X-Repo-Commit" in headers:  # a model hub: SHA-256 of large files, git's SHA-1 of others
        for tag in tags.values():
            if re.fullmatch("[0-9a-f]{64}", tag):
                return f"sha256:{tag}"
        return f"git:{tags['ETag']}" if re.fullmatch("[0-9a-f]{40}", tags["ETag"]) else None
    for name in ("Repr-Digest", "Digest"):  # RFC 9530 and the one before, RFC 3230
        found = re.search(r"sha-256=:?([A-Za-z0-9+/]{43}=)", headers.get(name, ""), re.IGNORECASE)
        if found:
            return _base64_digest("sha256", found[1])
    encrypted = headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
    if "AmazonS3" in headers.get("Server", "") and not encrypted:
        return _s3_tag_digest(tags["ETag"])
    return None


def _s3_tag_digest(tag: str) -> str | None:
    """Return the MD5 that an object's tag is, unless it was sent in several parts."""
    return f"md5:{tag}" if re.fullmatch("[0-9a-f]{32}", tag) else None


def _base64_digest(algorithm: str, value: str) -> str | None:
    """Return "algorithm:digits"; None for the sum of an object's parts, which end in "-3"."""
    try:
        return f"{algorithm}:{base64.b64decode(value, validate=True).hex()}"
    except binascii.Error:
        return None


def _http_chunks(response: requests.Response) -> Iterator[bytes]:
    try:
        yield from response.iter_content(CHUNK_BYTES)
    except requests.RequestException as error:
        raise _TemporaryError(f"the connection broke ({_root_cause(error)})") from error


def s3_session(url: str) -> Any:
    """Return boto3's session; without boto3 a `UserError` says what `url` needs it for."""
    try:
        import boto3  # here, because it takes a second to load and few runs need it
    except ImportError as error:
        raise UserError(f"{url}: S3 needs the package boto3; install it") from error
    return boto3.session.Session()


def _open_s3(url: str, start: int, timeout: float) -> _Body:
    session = s3_session(url)
    import botocore.exceptions
    from botocore import UNSIGNED
    from botocore.config import Config

    bucket, _, key = url[len("s3://") :].partition("/")
    if not bucket or not key:
        raise UserError(f"{url}: expected s3://bucket/key")
    options = {"connect_timeout": timeout, "read_timeout": timeout}
    if session.get_credentials() is None:
        options["signature_version"] = UNSIGNED  # public buckets need no account
    try:
        client = session.client("s3", config=Config(retries={"total_max_attempts": 1}, **options))
        wanted = {"Range": f"bytes={start}-"} if start else {}
        answer = client.get_object(Bucket=bucket, Key=key, **wanted)
    except botocore.exceptions.ClientError as error:
        said = error.response["ResponseMetadata"]
        code = said["HTTPStatusCode"]
        if code == 416 and start:
            return _open_s3(url, 0, timeout)
        raise _refusal(url, code, str(error), said["HTTPHeaders"].get("retry-after", ""), ""
                       ) from error
    except (botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError) as error:
        raise _TemporaryError(f"no connection or no answer ({_root_cause(error)})") from error
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise UserError(f"{url}: {error}") from error
    total = answer.get("ContentRange", "").rpartition("/")[2]
    partial = total.isdigit()
    return _Body(
        _s3_chunks(answer["Body"]),
        start if partial else 0,
        int(total) if partial else answer["ContentLength"],
        answer.get("ETag"),
        _s3_digest(bucket, answer),
        answer["ResponseMetadata"]["HTTPHeaders"],
        answer["Body"].close,
    )


def _s3_digest(bucket: str, answer: dict[str, Any]) -> str | None:
    """Return the sum of the whole object that S3 knows; with a part of it comes the tag only."""
    for name, algorithm in (("ChecksumSHA256", "sha256"), ("ChecksumCRC32", "crc32")):
        if digest := _base64_digest(algorithm, answer.get(name) or "-"):
            return digest
    # Amazon's own encryption keeps the tag an MD5; with another's, or a key of one's own, it is
    # something else, and in a "directory bucket" always.
    server = answer["ResponseMetadata"]["HTTPHeaders"].get("server", "")
    encrypted = answer.get("ServerSideEncryption") not in (None, "AES256" if server == "AmazonS3"
                                                           else None)
    if encrypted or "SSECustomerAlgorithm" in answer or bucket.endswith("--x-s3"):
        return None
    return _s3_tag_digest(answer.get("ETag", "").strip('"'))


def _s3_chunks(body: Any) -> Iterator[bytes]:
    from botocore.exceptions import BotoCoreError, FlexibleChecksumError

    try:
        yield from body.iter_chunks(CHUNK_BYTES)
    except FlexibleChecksumError:
        return  # all bytes are here; that they are wrong is found when the whole file is checked
    except BotoCoreError as error:
        raise _TemporaryError(f"the connection broke ({_root_cause(error)})") from error


def _root_cause(error: BaseException) -> BaseException:
    """Return what happened first; the libraries wrap it in several lines of their own."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _check_sha256(path: Path, expected: str, what: str) -> None:
    found = file_sha256(path)
    if found != expected.lower():
        raise UserError(f"{what}: SHA-256 is {found}; expected {expected.lower()}")


def _wrong_bytes(part: Path, sha256: str | None) -> str | None:
    """Say what is wrong with the sum of a whole part; None if it is right, or not known."""
    if sha256 is not None:
        found = file_sha256(part)
        return None if found == sha256.lower() else f"SHA-256 is {found}; expected {sha256.lower()}"
    digest = _read_version(part).get("digest")
    if digest is None:
        return None
    algorithm, _, expected = digest.partition(":")
    if algorithm == "crc32":
        found = [_file_crc32(part)]
    elif algorithm == "git":  # some mirrors of a hub announce the plain SHA-1
        beginning = f"blob {_size(part)}\0".encode()
        found = [_file_digest(part, hashlib.sha1(beginning, usedforsecurity=False)),
                 _file_digest(part, hashlib.sha1(usedforsecurity=False))]
    else:
        found = [_file_digest(part, hashlib.new(algorithm, usedforsecurity=False))]
    if expected in found:
        return None
    return f"{algorithm} sum is {found[0]}; the server announced {expected}"


def _file_digest(path: Path, digest: Any) -> str:
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _file_crc32(path: Path) -> str:
    crc = 0
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def _check_space(folder: Path, needed: int, what: str) -> None:
    """Raise a `UserError` where the disk of an existing folder has not the bytes that it takes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: {free / 1e9:.3f} GB free on its disk; {what} needs "
                        f"{needed / 1e9:.3f} GB")


def _size(path: Path | None) -> int:
    return path.stat().st_size if path is not None and path.exists() else 0


def _version_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_version(part: Path) -> dict[str, Any]:
    """Return what is known of a part: url, size in bytes, tag and digest; {} if that is lost."""
    try:
        return read_json(_version_file(part))
    except UserError:
        return {}


def _remove_part(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)


def read_checksums(path: Path) -> dict[str, str]:
    """Read the format of sha256sum: 64 hexadecimal digits, white space, an optional `*`, a name."""
    sums = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        digest, _, name = line.partition(" ")
        name = name.strip().removeprefix("*").removeprefix("./")
        if not line.strip() or line.startswith("#"):
            continue
        if len(digest) != 64 or not set(digest.lower()) <= set("0123456789abcdef") or not name:
            raise UserError(
                f"{path}, line {number}: expected 64 hexadecimal digits, two spaces and a name"
            )
        sums[name] = digest.lower()
    return sums


def mirror_checksums(base_url: str, scratch: Path, **settings: Any) -> dict[str, str]:
    """Return the sums in the file SHA256SUMS of a mirror; none where it has no such file.

    It is fetched anew each time, into the folder `scratch`. `settings` are those of `download`.
    """
    target = scratch / CHECKSUMS_NAME
    target.unlink(missing_ok=True)
    try:
        return read_checksums(download(f"{base_url}/{CHECKSUMS_NAME}", target, **settings))
    except MissingError:
        log.info("%s has no %s; its files are checked for what it announces", base_url,
                 CHECKSUMS_NAME)
        return {}
    finally:
        target.unlink(missing_ok=True)


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
    folder: an absolute path, a drive, `..`, or a symbolic link that leads out; and before the
    first byte for a disk without room for all of it.
    """
    archive = Path(archive)
    try:
        with zipfile.ZipFile(archive) as source, atomic_folder(folder) as temporary:
            links = []
            unpacked = sum(member.file_size for member in source.infolist())
            _check_space(temporary, unpacked, f"the content of {archive}")
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
