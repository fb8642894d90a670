"""One way to load a classifier, whatever it was made into: PyTorch, int8 or ONNX."""

from pathlib import Path

import torch

from transformer.checkpoint import load_state, weights_path
from transformer.file_utils import ONNX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME, UserError
from transformer.int8 import CpuClassifier, Int8Classifier, is_int8
from transformer.modeling import BertConfig, TinyBertForSequenceClassification, find_config


def load_classifier(
    model_dir: Path | str, num_labels: int | None = None, device: torch.device | None = None
) -> TinyBertForSequenceClassification | CpuClassifier:
    """Load a trained classifier from a model directory.

    Its weights are `pytorch_model.bin` or `model.safetensors`, with int8 weights or without, else
    `model.onnx`. What comes back is called as `TinyBertForSequenceClassification` is.

    Args:
        model_dir: a directory that training or `quantize.py` wrote.
        num_labels: how many outputs the task needs; None: as many as there are.
        device: where an ONNX model should run; None: on the CPU. A PyTorch model is moved by `to`,
            an int8 one stays on the CPU.

    Raises:
        UserError: missing or damaged files, no trained classifier, one of another size, or an
            ONNX file that does not fit `config.json`.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model directory")
    if not any((folder / name).is_file() for name in (WEIGHTS_NAME, SAFE_WEIGHTS_NAME)):
        if not (folder / ONNX_NAME).is_file():
            raise UserError(f"{folder}: no weights; expected {WEIGHTS_NAME}, {SAFE_WEIGHTS_NAME}"
                            f" or {ONNX_NAME}")
        from transformer.onnx_model import OnnxClassifier  # here: a second to load

        return OnnxClassifier(folder, num_labels, device)
    config = BertConfig.from_json_file(find_config(folder))
    state = load_state(folder)
    if "classifier.weight" not in state:
        raise UserError(f"{weights_path(folder)}: holds no trained classifier; expected a model"
                        " that was fine-tuned or distilled on a task")
    if not is_int8(state):
        return TinyBertForSequenceClassification.from_pretrained(folder, num_labels=num_labels)
    found = len(state["classifier.weight"])
    if found != (wanted := num_labels or config.num_labels):
        raise UserError(f"{folder}: its classifier has {found} labels; expected {wanted}")
    return Int8Classifier(config, state, folder)
