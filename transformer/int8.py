"""Classifiers whose weights are 8-bit integers, computed by PyTorch's integer kernels on a CPU.

A checkpoint of such a model is an ordinary `pytorch_model.bin`: int8 tensors, and a scale for each
row of a weight under its name plus `_scale`. No module is pickled.

The largest value of a token's features is some ten times larger in one token than in the next,
and one scale for all tokens leaves most of them a few of the 255 steps. So every row of an input
is divided by its largest magnitude first, and the product multiplied by it again: the same result,
with all rows between -1 and 1. On MRPC that brings the error of the logits from 0.11 to 0.04.
"""

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from transformer.checkpoint import load_weights
from transformer.file_utils import UserError
from transformer.modeling import BertConfig, TinyBertForSequenceClassification

MOST = 127  # weights lie from -127 to 127, symmetric
LEVELS = 255  # inputs have 256 values
SMALLEST = 1e-9  # divisor of a row of zeros
SCALE, RANGE = "weight_scale", "input_range"  # what a checkpoint holds beside the int8 weights


class CpuClassifier(nn.Module):
    """A classifier that computes on the CPU in its own precision, wherever it is moved.

    It is called as `TinyBertForSequenceClassification` is, and answers without attention scores
    and hidden states.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):  # shapes without values
            model = TinyBertForSequenceClassification(config)
        self.parameter_total = sum(p.numel() for name, p in model.named_parameters()
                                   if not name.startswith(model.optional))
        self.eval()

    def logits(self, ids: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        """Return logits [batch, labels], float32, for inputs [batch, length] on the CPU."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,  # [batch, length]
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        score_layers: Iterable[int] | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return logits [batch, labels] on the CPU, and two empty lists."""
        self.config.check_length(input_ids.shape[1], "the model")
        segments = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.logits(input_ids.cpu(), segments.cpu(), mask.cpu()), [], []


def even_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each row by its largest magnitude; returns the rows, and those [..., 1]."""
    size = x.abs().amax(dim=-1, keepdim=True).clamp_(min=SMALLEST)
    return x / size, size


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of a weight to int8; returns [rows, columns] and the scales [rows]."""
    scale = weight.abs().amax(dim=1).clamp_(min=SMALLEST) / MOST
    return torch.round(weight / scale[:, None]).to(torch.int8), scale


def cpu_has_vnni() -> bool:
    """Say whether this CPU adds products of 8-bit integers without overflow (true unless x86)."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return True
    text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    return "vnni" in text or "amx_int8" in text or "sse" not in text


def can_compute_int8() -> bool:
    """Say whether this build of torch has oneDNN and its operations on int8 weights."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.onednn, name) for name in ("qlinear_prepack", "qlinear_pointwise"))


class Int8Embedding(nn.Module):
    """Word embeddings with a scale for each word piece."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(words, width, dtype=torch.int8))
        self.register_buffer(SCALE, torch.ones(words))

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].float() * self.weight_scale[ids][..., None]


class Int8Linear(nn.Module):
    """A linear layer of int8 weights, a scale for each output, and inputs rounded to 8 bits.

    Each row of an input has a scale of its own, its largest magnitude. `input_range` [2], where
    there is one, says which part of -1 to 1 the rows of a calibration then took.
    """

    def __init__(self, inputs: int, outputs: int, static: bool) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(outputs, inputs, dtype=torch.int8))
        self.register_buffer(SCALE, torch.ones(outputs))
        self.register_buffer("bias", torch.zeros(outputs))
        if static:
            self.register_buffer(RANGE, torch.tensor([-1.0, 1.0]))
        self.static = static

    def pack(self) -> None:
        """Bring the weights into the order of the kernels; to be called once they are loaded."""
        self.packed = torch.ops.onednn.qlinear_prepack(self.weight, None)
        self.zeros = torch.zeros(len(self.weight), dtype=torch.long)
        least, largest = self.input_range.tolist() if self.static else (-1.0, 1.0)
        # Without VNNI the kernels add pairs of products in 16 bits, which 8-bit inputs overflow.
        self.levels = LEVELS if cpu_has_vnni() else LEVELS // 2
        self.input_scale = (largest - least) / self.levels
        self.input_zero = round(-least / self.input_scale)

    def forward(self, x: Tensor) -> Tensor:
        rows, size = even_rows(x)
        rows = rows.div_(self.input_scale).add_(self.input_zero).round_()
        product = torch.ops.onednn.qlinear_pointwise(
            rows.clamp_(0, self.levels).to(torch.uint8), self.input_scale, self.input_zero,
            self.packed, self.weight_scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], "")
        return product * size + self.bias


def inner_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield name and layer of the Transformer layers' linear layers that have any units.

    They hold nearly all weights beside the word embeddings; pooler and classifier stay as they
    are, since their errors would reach the logits at full size.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layer." in name and module.weight.numel():
            yield name, module


@torch.inference_mode()
def input_ranges(model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Return the range [2] of the even rows that reach each inner linear layer.

    Args:
        model: a classifier in float32 on the CPU.
        batches: inputs of the model, each [batch, length].
    """
    ranges: dict[str, Tensor] = {}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows, _ = even_rows(inputs[0])
            least, largest = ranges.get(name, torch.zeros(2))
            ranges[name] = torch.stack([rows.min().minimum(least), rows.max().maximum(largest)])

        return layers[name].register_forward_pre_hook(note)

    layers = dict(inner_linears(model))
    handles = [watch(name) for name in layers]
    try:
        for inputs in batches:
            model(*inputs, score_layers=())
    finally:
        for handle in handles:
            handle.remove()
    return ranges


def int8_shell(model: nn.Module, names: Iterable[str], static: bool) -> None:
    """Replace the word embeddings and the named linear layers by empty int8 ones, in place."""
    embeddings = model.bert.embeddings
    embeddings.word_embeddings = Int8Embedding(*embeddings.word_embeddings.weight.shape)
    for name in list(names):
        outputs, inputs = model.get_submodule(name).weight.shape
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Int8Linear(inputs, outputs, static))


def to_int8(model: nn.Module, ranges: dict[str, Tensor] | None = None) -> nn.Module:
    """Return a copy of a classifier with int8 weights, to be saved and loaded again.

    `ranges` are those of `input_ranges`; without them every row is rounded within -1 to 1.
    """
    quantized = copy.deepcopy(model).requires_grad_(False)
    layers = {"bert.embeddings.word_embeddings": model.bert.embeddings.word_embeddings,
              **dict(inner_linears(model))}
    int8_shell(quantized, list(layers)[1:], ranges is not None)
    for name, layer in layers.items():
        target = quantized.get_submodule(name)
        weight, scale = quantize_rows(layer.weight.detach())
        target.weight.copy_(weight)
        target.weight_scale.copy_(scale)
        if isinstance(target, Int8Linear):
            target.bias.copy_(layer.bias.detach())
        if ranges is not None and name in ranges:
            target.input_range.copy_(ranges[name])
    return quantized


def is_int8(state: dict[str, Tensor]) -> bool:
    """Say whether a checkpoint, read by `load_state`, holds int8 weights."""
    return any(key.endswith(SCALE) for key in state)


class Int8Classifier(CpuClassifier):
    """A classifier read from a checkpoint that `to_int8` made."""

    def __init__(self, config: BertConfig, state: dict[str, Tensor], source: Path | str) -> None:
        if not can_compute_int8():
            raise UserError(f"{source}: this build of PyTorch computes no int8 linear layers;"
                            " use --format onnx")
        super().__init__(config)
        model = TinyBertForSequenceClassification(config)
        static = any(key.endswith(RANGE) for key in state)
        int8_shell(model, [name for name, _ in inner_linears(model)], static)
        load_weights(model, state, source, model.optional)
        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.pack()
        model.eval().requires_grad_(False)
        self.inner = (model,)  # in a tuple: neither `to` nor `float` may reach it

    def logits(self, ids: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        """Return logits [batch, labels]."""
        return self.inner[0](ids, segments, mask, score_layers=())[0]
