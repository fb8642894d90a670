"""Copying output folders to S3 while a run goes on, and at its end."""

import logging
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

import boto3

from transformer.file_utils import UserError

logger = logging.getLogger(__name__)

GRACE_SECONDS = 20.0  # how long a run that ends in an error waits for its uploads


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
    Uploader((bucket, prefix), [folder]).close()


class Uploader:
    """Copies the files of output folders to S3 while a run goes on, each time that they changed.

    `update()` asks for a round and returns at once; a thread does it. A file that cannot be
    uploaded is a warning and is tried again in the next round; `close()` does the last round,
    and then it is a `UserError`. As a context manager it closes; after an error it gives the
    last round 20 seconds and says no more than warnings.

    Args:
        address: bucket and prefix from `s3_address`; None: nothing is uploaded.
        folders: several are kept apart below the prefix by their own paths.
        skip: names of subfolders that stay here. Files named `.*.tmp` do, too.

    Raises:
        UserError: no credentials, or no such bucket.
    """

    def __init__(
        self,
        address: tuple[str, str] | None,
        folders: Sequence[Path | str],
        skip: Collection[str] = (),
    ) -> None:
        self.folders = [Path(folder) for folder in folders]
        self.skip = frozenset(skip)
        self.address = address
        self.sent: dict[Path, tuple[int, int]] = {}  # size in bytes and time of change in ns
        self.failed: dict[Path, str] = {}  # what went wrong in the last round
        self.wanted, self.closing = threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None
        if address is not None:
            self.name = f"--data_url s3://{'/'.join(part for part in address if part)}"
            self.client = self._connect()

    def update(self) -> None:
        """Have the files uploaded that are new or changed; returns at once."""
        if self.address is None:
            return
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name="uploads", daemon=True)
            self.thread.start()
        self.wanted.set()

    def close(self) -> None:
        """Upload what is left, wait for it, and raise a `UserError` for what could not be."""
        self._end(None)
        if self.failed:
            path, reason = next(iter(self.failed.items()))
            folders = ", ".join(map(str, self.folders))
            raise UserError(
                f"{self.name}: {len(self.failed)} of the files could not be uploaded, first "
                f"{path}: {reason}; the files are in {folders}"
            )

    def __enter__(self) -> "Uploader":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._end(GRACE_SECONDS)

    def _end(self, seconds: float | None) -> None:
        self.closing.set()
        self.update()
        if self.thread is not None:
            self.thread.join(seconds)

    def _connect(self) -> Any:
        """Return a client for the bucket, which repeats failed requests after growing waits."""
        session = boto3.session.Session()
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            ConnectionError,
            HTTPClientError,
        )

        where = f"the files are in {', '.join(map(str, self.folders))}"
        try:
            if session.get_credentials() is None:
                raise UserError(f"{self.name}: boto3 finds no credentials; {where}")
            client = session.client("s3")  # the number of attempts: AWS_MAX_ATTEMPTS, or 5
            client.head_bucket(Bucket=self.address[0])
        except ClientError as error:
            # To write into a bucket one need not be allowed to look at it.
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                raise UserError(f"{self.name}: no such bucket; {where}") from error
        except (HTTPClientError, ConnectionError) as error:
            logger.warning("%s: %s", self.name, error)
        except (BotoCoreError, ValueError) as error:
            raise UserError(f"{self.name}: {error}; {where}") from error
        return client

    def _work(self) -> None:
        while True:
            self.wanted.wait()
            self.wanted.clear()
            last = self.closing.is_set()  # before the round: nothing is written after this
            self.failed = {self.folders[0]: "the upload has not ended well"}  # until it has
            try:
                self.failed = self._upload_changed()
            except OSError as error:  # a folder cannot be read
                logger.warning("%s: %s", self.name, error)
            if last:
                return

    def _upload_changed(self) -> dict[Path, str]:
        """Upload what is new or changed; return what could not be, and why."""
        from botocore.exceptions import ConnectionError, HTTPClientError

        failed, unreachable = {}, None
        for path, key in self._files():
            try:
                with path.open("rb") as stream:
                    state = os.fstat(stream.fileno())
                    version = (state.st_size, state.st_mtime_ns)
                    if self.sent.get(path) == version:
                        continue
                    if unreachable:  # this file would wait as long again
                        failed[path] = unreachable
                        continue
                    self._upload(stream, key)
            except FileNotFoundError:  # the run has removed or replaced it
                continue
            except Exception as error:  # half an answer makes boto3 raise whatever it stumbles on
                failed[path] = f"{type(error).__name__}: {error}"
                if isinstance(error, (HTTPClientError, ConnectionError)):
                    unreachable = failed[path]
                logger.warning(
                    "%s: %s: %s; tried again with the next", self.name, path, failed[path])
            else:
                self.sent[path] = version
                logger.info("uploaded %s to s3://%s/%s", path, self.address[0], key)
        return failed

    def _files(self) -> Iterator[tuple[Path, str]]:
        """Yield each file and its key."""
        for folder in self.folders:
            below = PurePosixPath(self.address[1])
            if len(self.folders) > 1:
                below /= folder.as_posix().lstrip("/")
            for path in sorted(folder.rglob("*")):
                inner = path.relative_to(folder)
                unfinished = path.name.startswith(".") and path.suffix == ".tmp"
                if path.is_file() and not unfinished and not self.skip.intersection(inner.parts):
                    yield path, str(below / inner.as_posix()).lstrip("/")

    def _upload(self, stream: IO[bytes], key: str) -> None:
        """Upload an open file, so that all bytes are of one version even if it is replaced."""
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(use_threads=False)  # this is a thread already
        self.client.upload_fileobj(stream, self.address[0], key, Config=config)
