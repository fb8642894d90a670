"""Classifiers that Hugging Face's library reads and our BERT does not: teachers by their logits.

The package `transformers` is imported here only, inside functions: no other run needs it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from transformer import distributed
from transformer.checkpoint import key_list
from transformer.config import BertConfig
from transformer.evaluation import GPU_TOKENS, merge_rows
from transformer.features import ENCODING_CHUNK
from transformer.file_utils import (
    CONFIG_NAME,
    OTHER_VOCABULARIES,
    TOKENIZER_CONFIG_NAME,
    UserError,
    has_vocabulary,
    read_json,
)
from transformer.runtime import first_line
from transformer.tasks import Example

LABEL_FIELDS = ("id2label", "label2id", "num_labels", "problem_type")
# Nothing is downloaded, and no code that lies in a folder is run.
OPTIONS = {"local_files_only": True, "trust_remote_code": False}


def load_library(source: Path | str) -> ModuleType:
    """Import `transformers` for the teacher `source`, without its progress bars and warnings."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{source}: this teacher needs the package transformers: pip install"
                        f" transformers ({first_line(error)})") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def read_labels(path: Path) -> BertConfig:
    """Read what a `config.json` says of a classifier's labels, whatever its network is.

    Raises:
        UserError: it is no classifier, or the model comes with code of its own.
    """
    values = read_json(path)
    for file in (path, path.parent / TOKENIZER_CONFIG_NAME):
        if file.is_file() and read_json(file).get("auto_map"):
            raise UserError(f"{file}: auto_map names code that comes with the model, which is never"
                            " run; expected a model of the package transformers")
    heads = values.get("architectures") or ["ForSequenceClassification"]
    if not any(str(head).endswith("ForSequenceClassification") for head in heads):
        raise UserError(f"{path}: architectures is {heads}; expected a fine-tuned classifier"
                        " (...ForSequenceClassification)")
    try:
        return BertConfig.from_dict({name: values[name] for name in LABEL_FIELDS if name in values})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


@contextmanager
def _one_line(folder: Path, library: ModuleType) -> Iterator[None]:
    """Turn whatever the library raises about a folder into a `UserError`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of any class, by what is wrong with the folder
        raise UserError(f"{folder}: the package transformers {library.__version__} cannot read it"
                        f" ({first_line(error)}); expected a classifier that it knows") from error


def load_tokenizer(folder: Path, max_seq_length: int) -> Any:
    """Load the library's tokenizer of a model, which must take rows of `max_seq_length` tokens."""
    library = load_library(folder)
    # Without the package the library asks for another, which would not help.
    pieces = [name for name in OTHER_VOCABULARIES
              if name.endswith(".model") and (folder / name).is_file()]
    if pieces and not has_vocabulary(folder) and find_spec("sentencepiece") is None:
        raise UserError(f"{folder / pieces[0]}: the package transformers needs another one to read"
                        " it: pip install sentencepiece")
    with _one_line(folder, library):
        config = library.AutoConfig.from_pretrained(folder, **OPTIONS)
        tokenizer = library.AutoTokenizer.from_pretrained(folder, **OPTIONS)
        files = [*tokenizer.vocab_files_names.values()]
    # Without them it makes up a vocabulary.
    if not any((folder / name).is_file() for name in files):
        raise UserError(f"{folder}: no vocabulary; expected {' or '.join(files)}")
    positions = getattr(config, "max_position_embeddings", None) or max_seq_length
    limit = min(tokenizer.model_max_length, positions)
    if 0 < limit < max_seq_length:
        raise UserError(f"--max_seq_length {max_seq_length}; {folder} takes {limit} tokens")
    return tokenizer


def load_model(
    folder: Path, tokenizer: Any, num_labels: int, device: torch.device, dtype: torch.dtype | None
) -> nn.Module:
    """Load a frozen classifier strictly, to compute in `dtype` (None: float32) on a device.

    Raises:
        UserError: no trained classifier for so many labels, or it cannot compute a row of text.
    """
    library = load_library(folder)
    with _one_line(folder, library):
        model, found = library.AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **OPTIONS)
    if missing := found["missing_keys"]:
        raise UserError(f"{folder}: holds no trained classifier; missing are {key_list(missing)};"
                        " expected a model that the package transformers has fine-tuned")
    if model.config.num_labels != num_labels:
        raise UserError(f"{folder / CONFIG_NAME}: its classifier has {model.config.num_labels}"
                        f" labels; expected {num_labels}")
    model.eval().requires_grad_(False).to(device=device, dtype=dtype)
    predict_examples(model, tokenizer, [Example("", "a", None, None)], 1, 8, 1, device, folder)
    return model


def encode(
    tokenizer: Any, examples: Sequence[Example], max_seq_length: int
) -> list[dict[str, list[int]]]:
    """Encode rows by the library's tokenizer: of each the model's inputs, not padded."""
    rows: list[dict[str, list[int]]] = [{}] * len(examples)
    for fields in (("text_a",), ("text_a", "text_b")):
        places = [place for place, example in enumerate(examples)
                  if (example.text_b is None) == (len(fields) == 1)]
        if not places:
            continue
        texts = [[getattr(examples[place], field) for place in places] for field in fields]
        encoded = tokenizer(*texts, truncation=True, max_length=max_seq_length)
        for number, place in enumerate(places):
            rows[place] = {name: values[number] for name, values in encoded.items()}
    return rows


def predict_examples(
    model: nn.Module, tokenizer: Any, examples: Iterable[Example], count: int,
    max_seq_length: int, batch_size: int, device: torch.device, source: Path | str,
) -> Tensor:
    """Run a classifier of the library over `count` rows: logits [rows, labels], float32, in order.

    Only rows of equal length share a batch: padding would change what some networks compute, such
    as MobileBERT, whose tokens see the embedding of their neighbour. Under torchrun each process
    computes some of the batches.
    """
    rows: list[np.ndarray] = []
    logits: list[Tensor] = []
    examples, first = iter(examples), 0
    with tqdm(total=count, desc="teacher", unit="row", leave=False, disable=None) as progress:
        while chunk := list(islice(examples, ENCODING_CHUNK)):
            encoded = encode(tokenizer, chunk, max_seq_length)
            order = equal_batches([len(row["input_ids"]) for row in encoded], batch_size, device)
            for places in order[distributed.rank() :: distributed.world_size()]:
                inputs = {name: torch.tensor([encoded[place][name] for place in places]).to(device)
                          for name in encoded[places[0]]}  # each [batch, length]
                rows.append(first + places)
                logits.append(_forward(model, inputs, source))
            first += len(chunk)
            progress.update(len(chunk))
    return merge_rows(rows, logits, count)


def equal_batches(
    lengths: Sequence[int], batch_size: int, device: torch.device
) -> list[np.ndarray]:
    """Split rows into batches of equal length, the longest first; each row once."""
    order = []
    for length in sorted({*lengths}, reverse=True):
        places = np.flatnonzero(np.asarray(lengths) == length)
        # A few short rows would not keep a GPU busy.
        size = max(batch_size, GPU_TOKENS // length) if device.type == "cuda" else batch_size
        order += [places[begin : begin + size] for begin in range(0, len(places), size)]
    return order


@torch.inference_mode()
def _forward(model: nn.Module, inputs: dict[str, Tensor], source: Path | str) -> Tensor:
    """Return the logits of one batch [batch, labels], float32, on the CPU."""
    try:
        logits = model(**inputs).logits.float().cpu()
    except Exception as error:  # of any class, by the network
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise
        raise UserError(f"{source}: the package transformers cannot compute its logits"
                        f" ({first_line(error)}); expected the tokenizer that it was trained with,"
                        " or perhaps --precision fp32") from error
    if not logits.isfinite().all():
        raise UserError(f"{source}: logits that are not finite; expected numbers, as perhaps with"
                        " --precision fp32")
    return logits
