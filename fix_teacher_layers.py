"""Repair model folders whose weights were saved under names that BERT does not use.

Example:
    python fix_teacher_layers.py
    python fix_teacher_layers.py --models models/minilm --allow_missing_head

Gives the encoder's weights their `bert.` prefix, turns TensorFlow's `gamma`/`beta` into
`weight`/`bias`, drops what is no weight (`embeddings.position_ids`), and says per folder what it
did. A sound folder is left untouched. A head (masked-LM head of a base model, classifier of a
teacher) that was lost when the folder was saved cannot be repaired and is not invented: the
folder is named and the script fails, for a random head would pass for a trained one.
"""

import argparse
import logging
from pathlib import Path

import torch
from safetensors.torch import save_file

from transformer.checkpoint import (
    BUFFERS,
    canonical_key,
    load_state,
    load_weights,
    read_weights,
    weights_paths,
    write_tensors,
)
from transformer.config import BertConfig, find_config
from transformer.file_utils import UserError, atomic_path
from transformer.modeling import (
    BertForMaskedLM,
    BertModel,
    TinyBertForSequenceClassification,
)
from transformer.run_folder import lock_folder
from transformer.runtime import run_script

logger = logging.getLogger(__name__)

BASE = "models/bert-base-uncased"
DEFAULT_MODELS = [BASE, *(f"{BASE}-{task}" for task in ("rte", "sst2", "cola", "mrpc"))]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Repair the names of weights in model folders.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--models", type=str, nargs="+", default=DEFAULT_MODELS,
        help="model folders, which are repaired in place")
    add("--allow_missing_head", action="store_true",
        help="only warn of folders without masked-LM head or classifier")
    return parser


def find_head(state: dict[str, torch.Tensor]) -> str | None:
    """Say which head the weights hold; None for a bare encoder."""
    if "cls.predictions.transform.dense.weight" in state:
        return "masked-LM head"
    if "classifier.weight" in state:
        return f"classifier with {state['classifier.weight'].shape[0]} labels"
    return None


def check_complete(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Raise a `UserError` unless the weights fill the model that config.json describes."""
    config = BertConfig.from_json_file(find_config(folder))
    head = find_head(state)
    model_class = BertModel if head is None else (
        BertForMaskedLM if head.startswith("masked") else TinyBertForSequenceClassification)
    with torch.device("meta"):  # the shapes are all that is needed
        model = model_class(config, **model_class.stored_sizes(state))
    load_weights(model, state, folder, model_class.optional)


def repair(folder: Path) -> str | None:
    """Repair one folder in place; return what head it has, None if it has none.

    A relative of BERT has names and heads of its own, and is only checked.
    """
    check_complete(load_state(folder), folder)
    if (family := BertConfig.from_json_file(find_config(folder)).family) != "bert":
        logger.info("%s: %s, sound; its names are its own", folder, family)
        return family
    lock_folder(folder)
    for path in weights_paths(folder):
        head = repair_file(path)
    return head


def repair_file(path: Path) -> str | None:
    """Repair one file of sound weights, or say that the shards of an index need it."""
    state, renamed, dropped = load_state(path), [], []
    for key in read_weights(path):
        name = canonical_key(key)
        if name.endswith(BUFFERS):
            dropped.append(key)
        elif name != key:
            renamed.append(key)
    changes = [f"{what} {len(keys)} (such as {keys[0]})"
               for what, keys in (("renamed", renamed), ("dropped", dropped)) if keys]
    if changes and path.suffix == ".json":
        raise UserError(f"{path}: {', '.join(changes)} of its shards would have to be; expected one"
                        " file, as get_bert_models.py makes of it")
    if changes:
        with atomic_path(path) as temporary:
            if path.suffix == ".safetensors":
                save_file(state, temporary, metadata={"format": "pt"})
            else:
                write_tensors(state, temporary)
    head = find_head(state)
    logger.info("%s: %s; %s", path, ", ".join(changes) or "sound, nothing to do",
                head or "NO HEAD")
    return head


def main(args: argparse.Namespace) -> None:
    without_head = [folder for folder in args.models if repair(Path(folder)) is None]
    if not without_head:
        return
    message = (f"{', '.join(without_head)}: no masked-LM head and no classifier, and none can be"
               " made from what is there; fetch the model again with get_bert_models.py"
               " --overwrite_output_dir")
    if not args.allow_missing_head:
        raise UserError(f"{message}, or give --allow_missing_head if it never had one")
    logger.warning("%s", message)


if __name__ == "__main__":
    run_script(main, get_args_parser())
