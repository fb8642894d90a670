"""Reading and writing model directories: strict loading, atomic saving.

A model directory is a standard Hugging Face checkpoint of BERT or of a relative: `config.json`,
`pytorch_model.bin` (or `model.safetensors`, or shards of either, when reading) and `vocab.txt`.
In memory the weights have BERT's names, whatever they are called in the files (`families.py`).
"""

import hashlib
import io
import logging
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from transformer import distributed, families
from transformer.config import OWN_TYPES, BertConfig
from transformer.file_utils import (
    CONFIG_NAME,
    ONNX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
    UserError,
    atomic_path,
    file_sha256,
    read_json,
    write_json,
)
from transformer.run_folder import STATE_FOLDER
from transformer.runtime import first_line

if TYPE_CHECKING:
    from transformer.tokenization import AnyTokenizer

logger = logging.getLogger(__name__)

# Parts of a checkpoint that stand beside the encoder; a model without them may leave them unread.
HEADS = ("cls.", "classifier.", "fit_dense.", "fit_denses.", "qa_outputs.", "dropout.")
# The forms in which a model directory may hold its weights: a file, or an index of its shards.
INDEX_SUFFIX = ".index.json"
WEIGHT_FORMS = [name + suffix for name in (WEIGHTS_NAME, SAFE_WEIGHTS_NAME)
                for suffix in ("", INDEX_SUFFIX)]
DECODER = "cls.predictions.decoder.weight"  # the word embeddings once more
WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Buffers that some versions of the Hugging Face library store; they carry no weights.
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def current_key(key: str) -> str:
    """Return a parameter's name without `module.` (DataParallel) and TensorFlow's gamma/beta."""
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key.removeprefix("module.")))


def canonical_key(key: str) -> str:
    """Return the Hugging Face name of a BERT's parameter, whatever dialect `key` is written in.

    It is the current one, and the encoder's parameters get the `bert.` prefix.
    """
    key = current_key(key)
    return f"bert.{key}" if key.startswith(("embeddings.", "encoder.", "pooler.")) else key


def has_weights(folder: Path | str) -> bool:
    """Say whether a folder holds weights of PyTorch's, in any form."""
    return any(Path(folder, name).is_file() for name in WEIGHT_FORMS)


def weights_paths(model_dir: Path | str) -> list[Path]:
    """Return the weights of a model directory in every form it has (or `model_dir`, if a file)."""
    path = Path(model_dir)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such model directory")
    if found := [path / name for name in WEIGHT_FORMS if (path / name).is_file()]:
        return found
    if (path / ONNX_NAME).is_file():
        raise UserError(f"{path}: an ONNX model, made by quantize.py; expected the PyTorch model"
                        " that it was made from")
    raise UserError(f"{path}: no weights; expected {WEIGHTS_NAME} or {SAFE_WEIGHTS_NAME}")


def weights_path(model_dir: Path | str) -> Path:
    """Return the weights file of a model directory, or the index of its shards."""
    return weights_paths(model_dir)[0]


def shard_names(index: Path) -> dict[str, str]:
    """Return which file of its folder an index names for each tensor."""
    names = read_json(index).get("weight_map")
    if not (isinstance(names, dict) and names and all(
            isinstance(name, str) and Path(name).name == name
            and Path(name).suffix in (".bin", ".safetensors") for name in names.values())):
        raise UserError(f"{index}: expected a weight_map that gives each tensor a file of this"
                        " folder")
    return names


def weights_record(model_dir: Path | str) -> dict[str, Any]:
    """Return the size and the SHA-256 of a model's weights (of shards, that of their sums)."""
    path = weights_path(model_dir)
    files = [path] if path.suffix != ".json" else [
        path.parent / name for name in sorted({*shard_names(path).values()})]
    sums = [file_sha256(file) for file in files]
    return {"source_sha256": sums[0] if len(sums) == 1 else
            hashlib.sha256("".join(sums).encode()).hexdigest(),
            "bytes_before": sum(file.stat().st_size for file in files)}


def read_tensors(path: Path) -> Any:
    """Read what `torch.save` wrote, onto the CPU; a damaged file raises, whatever is wrong."""
    if zipfile.is_zipfile(path):  # PyTorch's older format is none, and has no check sums
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load leaves the check sums alone
                raise ValueError(f"the check sum of its part {damaged} does not agree")
    return torch.load(path, map_location="cpu", weights_only=True)


def write_tensors(value: Any, path: Path) -> None:
    """Write tensors in standard containers to `path`: the same bytes always."""
    # By an open file: a path's name would stand in the file.
    with path.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # about the archive's end, after the error of the disk
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def key_list(keys: Iterable[str]) -> str:
    """Return the first names of many, for a message."""
    keys = sorted(keys)
    return ", ".join(keys[:6]) + (f", ... ({len(keys)} in all)" if len(keys) > 6 else "")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of weights, or all shards of an index, under the names that they have there."""
    if path.suffix == ".json":
        return _read_shards(path)
    try:
        state = load_file(path) if path.suffix == ".safetensors" else read_tensors(path)
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{path}: damaged, or not a file of weights ({first_line(error)})"
                        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise UserError(f"{path}: expected a dictionary of tensors")
    return state


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    names, state = shard_names(index), {}
    for name in sorted({*names.values()}):
        if not (path := index.parent / name).is_file():
            raise UserError(f"{index}: {name} is not there; expected a file of this folder")
        shard = read_weights(path)
        if strange := shard.keys() ^ {key for key, file in names.items() if file == name}:
            raise UserError(f"{path}: holds other tensors than {index.name} says"
                            f" ({key_list(strange)})")
        state |= shard
    return state


def check_weights(state: Mapping[str, torch.Tensor], source: Path | str) -> None:
    """Raise a `UserError` for a tensor of whole numbers, or one with a NaN or an infinity."""
    for key, tensor in state.items():
        if tensor.dtype not in FLOATS:
            raise UserError(f"{source}: {key} is {dtype_name(tensor)}; expected floating-point"
                            " weights")
        # The sum, which takes a fifth of the time, may overflow.
        if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.float().isfinite().all():
            raise UserError(f"{source}: {key} holds values that are not finite; expected numbers")


def dtype_name(tensor: torch.Tensor) -> str:
    """Return a tensor's type as `config.json` has it, such as `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def _read_form(path: Path, family: str) -> dict[str, torch.Tensor]:
    """Read one form of a model's weights under their canonical names, checked.

    Those of a relative of BERT stay under the names of its family.
    """
    named: dict[str, torch.Tensor] = {}
    for key, tensor in read_weights(path).items():
        name = canonical_key(key) if family == "bert" else current_key(key)
        if name == "cls.predictions.decoder.bias":  # newer Hugging Face models store it twice
            name = "cls.predictions.bias"
        if name.endswith(BUFFERS):
            continue
        if name in named and not torch.equal(named[name], tensor):
            raise UserError(f"{path}: holds {name} twice, under two names and with two values")
        named[name] = tensor
    check_weights(named, path)
    return named


def _family(weights: Path) -> str:
    """Return the family of the model whose weights are in a file, by the config.json beside it."""
    path = weights.parent / CONFIG_NAME
    model_type = read_json(path).get("model_type") if path.is_file() else None
    return model_type if model_type in families.FAMILIES else "bert"


def load_state(model_dir: Path | str) -> dict[str, torch.Tensor]:
    """Read the weights of a model directory onto the CPU, under their canonical names.

    A relative of BERT's are renamed, and its heads of pre-training left out.

    Raises:
        UserError: no weights, damaged ones, ones that are not finite, or a file that holds
            something else; several forms of weights that are not the same.
    """
    path, *others = weights_paths(model_dir)
    family = _family(path)
    heads = () if family == "bert" else families.FAMILIES[family].heads
    state = _read_form(path, family)
    for other in others:
        second = _read_form(other, family)
        for key in sorted(state.keys() | second.keys()):
            if key.startswith(heads):  # which are not read
                continue
            # One of the files may leave the decoder out, which is the word embedding.
            first, again = (form.get(key, form.get(WORD_EMBEDDINGS) if key == DECODER else None)
                            for form in (state, second))
            if first is None or again is None or not torch.equal(first, again):
                raise UserError(f"{path} and {other.name} hold different weights (such as {key});"
                                " remove the one that is not meant")
    if family == "bert":
        return state
    config = BertConfig.from_json_file(path.parent / CONFIG_NAME)
    try:
        ours = families.our_state(family, state, config.pad_token_id)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if unread := [key for key in state if key.startswith(heads)]:
        logger.info("%s: not needed and not read: %s", path, key_list(unread))
    return ours


def load_weights(
    model: nn.Module, state: dict[str, torch.Tensor], source: Path | str,
    allow_missing: tuple[str, ...] = (),
) -> list[str]:
    """Fill every parameter of `model` from `state`, or raise.

    Args:
        model: the model to fill in place.
        state: tensors by canonical name, as `load_state` returns them.
        source: what to call the checkpoint in messages.
        allow_missing: name prefixes (such as `"fit_dense."`) that may keep their initial values.

    Returns:
        The names that were allowed to be missing and are.

    Raises:
        UserError: a parameter without a value, an encoder tensor without a parameter, or a
            shape that differs. The message holds both lists of names.
    """
    own = {canonical_key(key): tensor for key, tensor in model.state_dict().items()}
    state = dict(state)
    if DECODER in own:
        # The decoder is the word embedding: files that store tied tensors once leave it out, and
        # a new head (`allow_missing`) has it from the encoder.
        embeddings = state.get(WORD_EMBEDDINGS, torch.empty(0))
        if model.config.is_tied or "cls.predictions.bias" not in state:
            state.setdefault(DECODER, embeddings)
        if not torch.equal(state.get(DECODER, embeddings), embeddings):
            raise UserError(f"{source}: cls.predictions.decoder.weight differs from the word"
                            " embeddings; expected the same tensor")
    missing = [key for key in own if key not in state]
    # A part may be missing as a whole only: half a classifier is a damaged one.
    excused = tuple(part for part in allow_missing if not any(k.startswith(part) for k in state))
    fatal = [key for key in missing if not key.startswith(excused)]
    unread = [key for key in state if key not in own]
    strange = [key for key in unread if not key.startswith((*HEADS, "bert.pooler."))]
    if fatal or strange:
        # A model that was trained on no task yet, rather than a damaged one.
        hint = (" It has no trained classifier; finetune_teacher.py --new_classifier trains one."
                if {*fatal} == {"classifier.weight", "classifier.bias"} else "")
        raise UserError(f"{source}: the checkpoint does not fit {type(model).__name__}."
                        f" Missing from it: [{key_list(fatal)}]."
                        f" In it but not in the model: [{key_list(strange or unread)}].{hint}")
    for key, tensor in own.items():
        if key in state and state[key].shape != tensor.shape:
            raise UserError(f"{source}: {key} is {list(state[key].shape)} in the checkpoint,"
                            f" {list(tensor.shape)} in the model")
    with torch.no_grad():
        for key, tensor in own.items():
            if key in state:
                tensor.copy_(state[key])
    if unread:
        logger.info("%s: not needed and not read: %s", source, key_list(unread))
    return missing


def stored_state(
    state: dict[str, torch.Tensor], config: BertConfig
) -> dict[str, torch.Tensor]:
    """Return a model's weights as its files hold them: a relative of BERT's under its names."""
    if config.model_type not in families.FAMILIES:
        return state
    state = {canonical_key(key): tensor for key, tensor in state.items()}
    return families.their_state(config.model_type, state, config.pad_token_id)


def save_weights(model: nn.Module, path: Path | str, leave_out: tuple[str, ...] = ()) -> None:
    """Write the state of `model` to `path` as CPU tensors, atomically, in a run's first process.

    Parameters whose names begin with one of `leave_out` are not written.
    """
    if not distributed.is_main():
        return
    state = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()
             if not key.startswith(leave_out)}
    state = stored_state(state, model.config)
    with atomic_path(path) as temporary:
        write_tensors(state, temporary)


def save_config(
    model: nn.Module, output_dir: Path | str, tokenizer: "AnyTokenizer | None" = None,
    has_weights: bool = True,
) -> None:
    """Write what stands beside the weights: `config.json` and, if given, the vocabulary.

    An ONNX graph that stands in place of weights computes the same for every reader, so that its
    `model_type` is never one of our own.
    """
    if not distributed.is_main():
        return
    model_type = model.config.model_type
    config = {"architectures": [families.architecture(model_type, model.hugging_face_class)],
              **model.config.to_dict()}
    if has_weights:
        config["dtype"] = dtype_name(next(model.parameters()))
    elif model_type in OWN_TYPES:
        config["model_type"] = "bert"
    write_json(Path(output_dir) / CONFIG_NAME, config)
    if tokenizer is not None:
        tokenizer.save_vocabulary(output_dir, model.config.max_position_embeddings,
                                  model.config.type_vocab_size > 1)


def save_pretrained(
    model: nn.Module, output_dir: Path | str, tokenizer: "AnyTokenizer | None" = None,
    finished: bool = True,
) -> None:
    """Write `model` as a standard Hugging Face checkpoint, of BERT or of its family.

    Writes `config.json`, the vocabulary when a tokenizer is given, and last
    `pytorch_model.bin`; each file replaces its predecessor atomically. A `finished` classifier is
    written without `fit_dense`, which only the intermediate stage of distillation uses.
    """
    save_config(model, output_dir, tokenizer)
    save_weights(model, Path(output_dir) / WEIGHTS_NAME,
                 model.only_distillation if finished else ())


# ------------------------------------------------------------------ states of a run

KEPT_STATES = 2


def _states(output_dir: Path | str) -> list[Path]:
    """Return the states of a run, the newest first."""
    return sorted(Path(output_dir, STATE_FOLDER).glob("step_*.pt"), reverse=True)


def save_training_state(output_dir: Path | str, step: int, state: dict[str, Any]) -> Path:
    """Write what a run needs to go on after `step`, atomically; the newest two states are kept.

    Args:
        output_dir: the run's output folder; states lie in its subfolder `training_state`.
        step: optimizer steps so far.
        state: tensors, numbers, strings and None in dictionaries, lists and tuples.
    """
    path = Path(output_dir, STATE_FOLDER, f"step_{step:010}.pt")
    with atomic_path(path) as temporary:
        write_tensors(state, temporary)
        with temporary.open("r+b") as file:  # its own check sum, at its end
            file.write(hashlib.file_digest(file, "sha256").digest())
    for old in _states(output_dir)[KEPT_STATES:]:
        old.unlink()
    return path


def read_state(path: Path) -> dict[str, Any]:
    """Read a state; one of which any byte has changed raises."""
    content = path.read_bytes()
    length = hashlib.sha256().digest_size
    if hashlib.sha256(content[:-length]).digest() != content[-length:]:
        raise ValueError("its check sum does not agree")
    return torch.load(io.BytesIO(content[:-length]), map_location="cpu", weights_only=True)


def load_training_state(output_dir: Path | str) -> dict[str, Any] | None:
    """Read the newest sound state of a run; None if there is none. Damaged ones are warned of."""
    for path in _states(output_dir):
        try:
            state = read_state(path)
        except Exception as error:  # a damaged file raises almost anything
            logger.warning("%s: damaged (%s); taking the one before it", path, first_line(error))
            path.unlink()  # so that it does not count as newest
            continue
        logger.info("going on from %s", path)
        return state
    return None
