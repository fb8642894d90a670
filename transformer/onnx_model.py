"""Classifiers as ONNX files: the graph, its fusion and quantization, and the model that runs it.

The graph is written node by node from the weights, in the pattern that ONNX Runtime's optimizer
knows as BERT. No exporter stands between: PyTorch's older one is deprecated, the newer one needs
more packages, and each of its versions traces another graph, which the optimizer then fuses or
not. So every version of torch gives the same file, and layers of any pruned shape need no care.

The 8-bit models scale every token by its own largest magnitude (per-token absmax scaling): the
features of one token are some ten times as large as those of the next, and one scale for all of
them would leave most tokens a few of the 255 steps. With all rows between -1 and 1 the error of
the logits on MRPC falls from 0.11 to 0.04. Attention is fused in floating point only: ONNX
Runtime's quantized attention has one scale for all tokens.
"""

import copy
import json
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from transformer.checkpoint import first_line
from transformer.config import BertConfig, find_config
from transformer.file_utils import ONNX_NAME, UserError
from transformer.modeling import (
    MASKED_SCORE,
    BertLayer,
    SequenceClassifier,
    TaskOutput,
)
from transformer.recurrent import (
    RecurrentClassifier,
    RecurrentConfig,
    classifier_class,
    read_config,
)

OPSET = 17  # the first with LayerNormalization
IR_VERSION = 8  # what came with it
INPUTS = ("input_ids", "token_type_ids", "attention_mask")
OUTPUT = "logits"
WORDS = "words"
INNER = "layer_"  # what the names of the Transformer layers' nodes begin with
SMALLEST = 1e-9  # added to a row's largest magnitude, for rows of zeros


# ------------------------------------------------------------------ the graph, parts before whole


class Graph:
    """An ONNX graph that grows node by node; every value is known by its name.

    Args:
        scale_rows: for quantization, divide each row of the word embeddings and of the inner
            linear layers' inputs by its largest magnitude, and multiply what is looked up or
            computed by it.
    """

    def __init__(self, scale_rows: bool) -> None:
        self.scale_rows = scale_rows
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}
        self.scaled: set[str] = set()

    def weight(self, name: str, values: Tensor | np.ndarray) -> str:
        """Add a constant."""
        if isinstance(values, Tensor):
            values = values.detach().float().cpu().numpy()
        self.weights[name] = numpy_helper.from_array(np.asarray(values, order="C"), name)
        return name

    def scalar(self, value: float) -> str:
        """Add a constant, once: a whole number is an index, int64, others are float32."""
        dtype = np.int64 if isinstance(value, int) else np.float32
        return self.weight(f"scalar_{value!r}", np.array(value, dtype))

    def vector(self, *values: int) -> str:
        """Add a constant vector of sizes or indices, once."""
        return self.weight("_".join(map(str, ("vector", *values))), np.array(values, np.int64))

    def add(self, op: str, name: str, *inputs: str, more: tuple[str, ...] = (),
            **attributes: Any) -> str:
        """Add a node with an output of its own name, and `more`; returns the name."""
        self.nodes.append(helper.make_node(op, inputs, [name, *more], name, **attributes))
        return name

    def linear(self, name: str, x: str, layer: nn.Linear) -> str:
        """Add a linear layer; one whose inputs were all pruned leaves its bias, [outputs]."""
        bias = self.weight(f"{name}.bias", layer.bias)
        if not layer.in_features:
            return bias
        weight = self.weight(f"{name}.weight", layer.weight.T)
        if not self.scale_rows or not name.startswith(INNER):
            return self.add("Add", name, self.add("MatMul", f"{name}.product", x, weight), bias)
        if x not in self.scaled:
            largest = self.add("ReduceMax", f"{x}.largest", self.add("Abs", f"{x}.abs", x),
                               axes=[-1])
            self.add("Add", f"{x}.size", largest, self.scalar(SMALLEST))
            self.add("Div", f"{x}.scaled_rows", x, f"{x}.size")
            self.scaled.add(x)
        product = self.add("MatMul", f"{name}.scaled_product", f"{x}.scaled_rows", weight)
        return self.add("Add", name, self.add("Mul", f"{name}.product", product, f"{x}.size"), bias)

    def layer_norm(self, name: str, x: str, layer: nn.LayerNorm) -> str:
        """Add a layer normalisation over the last axis."""
        return self.add(
            "LayerNormalization", name, x, self.weight(f"{name}.weight", layer.weight),
            self.weight(f"{name}.bias", layer.bias), axis=-1, epsilon=layer.eps)

    def activate(self, name: str, x: str, activation: str) -> str:
        """Add one of `modeling.ACTIVATIONS`."""
        if activation == "gelu":
            scaled = self.add("Div", f"{name}.scaled", x, self.scalar(math.sqrt(2)))
            gate = self.add("Add", f"{name}.gate", self.add("Erf", f"{name}.erf", scaled),
                            self.scalar(1.0))
            return self.add("Mul", name, self.add("Mul", f"{name}.twice", x, gate),
                            self.scalar(0.5))
        if activation in ("gelu_new", "gelu_pytorch_tanh"):
            cube = self.add("Pow", f"{name}.cube", x, self.scalar(3.0))
            bent = self.add("Add", f"{name}.bent", x, self.add(
                "Mul", f"{name}.part", cube, self.scalar(0.044715)))
            scaled = self.add("Mul", f"{name}.scaled", bent, self.scalar(math.sqrt(2 / math.pi)))
            gate = self.add("Add", f"{name}.gate", self.add("Tanh", f"{name}.tanh", scaled),
                            self.scalar(1.0))
            return self.add("Mul", name, self.add("Mul", f"{name}.half", x, self.scalar(0.5)),
                            gate)
        if activation in ("silu", "swish"):
            return self.add("Mul", name, x, self.add("Sigmoid", f"{name}.gate", x))
        return self.add({"relu": "Relu", "tanh": "Tanh"}[activation], name, x)


def add_words(graph: Graph, embedding: nn.Embedding) -> str:
    """Add the word embeddings: [batch, length, width]."""
    weight = embedding.weight.detach()
    if graph.scale_rows:
        size = weight.abs().amax(dim=-1, keepdim=True).clamp_(min=SMALLEST)
        weight = weight / size
    words = graph.add("Gather", WORDS, graph.weight(f"{WORDS}.weight", weight), "input_ids")
    if graph.scale_rows:
        sizes = graph.add("Gather", f"{WORDS}.size", graph.weight(f"{WORDS}.sizes", size),
                          "input_ids")
        words = graph.add("Mul", f"{WORDS}.product", words, sizes)
    return words


def add_embeddings(graph: Graph, part: nn.Module) -> str:
    """Add the sum of the three embeddings, normalised: [batch, length, hidden]."""
    shape = graph.add("Shape", "shape", "input_ids")
    length = graph.add("Gather", "length", shape, graph.scalar(1))
    numbers = graph.add("Range", "positions.range", graph.scalar(0), length, graph.scalar(1))
    types = "token_type_ids"
    if len(part.token_type_embeddings.weight) == 1:  # a model that reads none
        types = graph.add("Mul", "segments.none", types, graph.scalar(0))
    positions, segments = (
        graph.add("Gather", name, graph.weight(f"{name}.weight", embedding.weight), index)
        for name, embedding, index in (
            ("positions", part.position_embeddings, numbers),
            ("segments", part.token_type_embeddings, types)))
    words = add_words(graph, part.word_embeddings)
    total = graph.add("Add", "embeddings.part", words, positions)
    total = graph.add("Add", "embeddings.sum", total, segments)
    if part.project is None:
        return graph.layer_norm("embeddings", total, part.LayerNorm)
    narrow = graph.layer_norm("embeddings.narrow", total, part.LayerNorm)
    return graph.linear("embeddings", narrow, part.project)


def add_mask(graph: Graph) -> str:
    """Add what the mask adds to the scores: [batch, 1, 1, length]."""
    mask = graph.add("Unsqueeze", "mask.heads", "attention_mask", graph.vector(1))
    mask = graph.add("Unsqueeze", "mask.queries", mask, graph.vector(2))
    mask = graph.add("Cast", "mask.float", mask, to=TensorProto.FLOAT)
    mask = graph.add("Sub", "mask.padding", graph.scalar(1.0), mask)
    return graph.add("Mul", "mask", mask, graph.scalar(MASKED_SCORE))


def add_attention(graph: Graph, name: str, hidden: str, mask: str, part: nn.Module) -> str:
    """Add multi-head attention up to its context: [batch, length, heads x head width]."""
    heads, width = part.heads, part.head_width
    if not heads:
        return ""  # nothing that the output projection would read

    def split(which: str, order: list[int]) -> str:
        x = graph.linear(f"{name}.{which}", hidden, getattr(part, which))
        x = graph.add("Reshape", f"{name}.{which}.heads", x, graph.vector(0, 0, heads, width))
        return graph.add("Transpose", f"{name}.{which}.split", x, perm=order)

    scores = graph.add("MatMul", f"{name}.product", split("query", [0, 2, 1, 3]),
                       split("key", [0, 2, 3, 1]))  # [batch, heads, length, length]
    scores = graph.add("Div", f"{name}.scaled", scores, graph.scalar(math.sqrt(width)))
    attention = graph.add("Softmax", f"{name}.probabilities",
                          graph.add("Add", f"{name}.scores", scores, mask), axis=-1)
    context = graph.add("MatMul", f"{name}.split", attention, split("value", [0, 2, 1, 3]))
    context = graph.add("Transpose", f"{name}.joined", context, perm=[0, 2, 1, 3])
    return graph.add("Reshape", f"{name}.context", context, graph.vector(0, 0, heads * width))


def add_layer(
    graph: Graph, name: str, hidden: str, mask: str, layer: BertLayer, activation: str,
    is_last: bool,
) -> str:
    """Add one Transformer layer; of the last, only [CLS] passes through the feed-forward part."""
    context = add_attention(graph, f"{name}.attention", hidden, mask, layer.attention.self)
    output = graph.linear(f"{name}.attention.dense", context, layer.attention.output.dense)
    total = graph.add("Add", f"{name}.attention.sum", output, hidden)
    attended = graph.layer_norm(f"{name}.attended", total, layer.attention.output.LayerNorm)
    if is_last:  # the pooler reads nothing else; this saves two thirds of the layer
        attended = graph.add("Slice", f"{name}.first", attended, graph.vector(0),
                             graph.vector(1), graph.vector(1))
    inner = ""
    if layer.intermediate.neurons:
        inner = graph.linear(f"{name}.intermediate", attended, layer.intermediate.dense)
        inner = graph.activate(f"{name}.neurons", inner, activation)
    output = graph.linear(f"{name}.dense", inner, layer.output.dense)
    total = graph.add("Add", f"{name}.sum", output, attended)
    return graph.layer_norm(name, total, layer.output.LayerNorm)


def add_bert(graph: Graph, model: nn.Module) -> str:
    """Add a BERT up to its pooled output: [batch, hidden]."""
    config = model.config
    hidden = add_embeddings(graph, model.bert.embeddings)
    mask = add_mask(graph)
    last = config.num_hidden_layers - 1
    for number, layer in enumerate(model.bert.encoder.layer):
        hidden = add_layer(graph, f"{INNER}{number}", hidden, mask, layer, config.hidden_act,
                           number == last)
    first = graph.add("Gather", "first", hidden, graph.scalar(0), axis=1)  # [batch, hidden]
    return graph.activate("pooled", graph.linear("pooler", first, model.bert.pooler.dense),
                          config.pooler_act)


def gate_rows(weight: Tensor, cell: str) -> Tensor:
    """Return the rows of a weight or bias in the order of ONNX's gates, not of PyTorch's."""
    parts = weight.detach().chunk(4 if cell == "bilstm" else 3)  # i f g o; r z n
    return torch.cat([parts[gate] for gate in ((0, 3, 1, 2) if cell == "bilstm" else (1, 0, 2))])


def add_recurrent(graph: Graph, model: RecurrentClassifier) -> str:
    """Add the embeddings and recurrent layers up to the last states: [batch, 2 x hidden]."""
    config, layers = model.config, model.recurrent
    total = graph.add("ReduceSum", "lengths.total", "attention_mask", graph.vector(1), keepdims=0)
    lengths = graph.add("Cast", "lengths", total, to=TensorProto.INT32)
    x = graph.add("Transpose", "layer_0.input", add_words(graph, model.word_embeddings),
                  perm=[1, 0, 2])  # [length, batch, embedding]
    for number in range(config.num_hidden_layers):
        name = f"{INNER}{number}"

        def weight(kind: str, number: int = number) -> Tensor:  # of both directions
            return torch.stack([gate_rows(getattr(layers, f"{kind}_l{number}{direction}"),
                                          config.cell) for direction in ("", "_reverse")])

        biases = torch.cat([weight("bias_ih"), weight("bias_hh")], dim=1)
        options = {"linear_before_reset": 1} if config.cell == "bigru" else {}
        graph.add(
            config.cell[2:].upper(), name, x, graph.weight(f"{name}.weight", weight("weight_ih")),
            graph.weight(f"{name}.state_weight", weight("weight_hh")),
            graph.weight(f"{name}.bias", biases), lengths, more=(f"{name}.last",),
            direction="bidirectional", hidden_size=config.hidden_size, **options)
        joined = graph.add("Transpose", f"{name}.joined", name, perm=[0, 2, 1, 3])
        x = graph.add("Reshape", f"{name}.output", joined,
                      graph.vector(0, 0, 2 * config.hidden_size))  # [length, batch, 2 x hidden]
    last = graph.add("Transpose", "last", f"{name}.last", perm=[1, 0, 2])
    return graph.add("Reshape", "pooled", last, graph.vector(0, 2 * config.hidden_size))


def build(model: SequenceClassifier, scale_rows: bool = False) -> onnx.ModelProto:
    """Write a classifier as an ONNX graph in float32.

    Inputs are `input_ids`, `token_type_ids` and `attention_mask`, int64 [batch, length], both of
    any size; the output is `logits`, float32 [batch, labels].
    """
    config, graph = model.config, Graph(scale_rows)
    add_body = add_recurrent if isinstance(model, RecurrentClassifier) else add_bert
    pooled = add_body(graph, model)
    if config.classifier_relu:
        pooled = graph.add("Relu", "pooled.relu", pooled)
    graph.linear(OUTPUT, pooled, model.classifier)
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
              for name in INPUTS]
    outputs = [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT,
                                             ["batch", config.num_labels])]
    proto = helper.make_model(
        helper.make_graph(graph.nodes, "classifier", inputs, outputs, [*graph.weights.values()]),
        opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    # The loader compares these with config.json.
    helper.set_model_props(proto, {"shape": json.dumps(graph_shape(config))})
    return proto


def graph_shape(config: BertConfig) -> dict[str, Any]:
    """Return the sizes that an ONNX file has in its graph."""
    own = {"head_width": config.head_width, "heads": config.heads, "neurons": config.neurons}
    if isinstance(config, RecurrentConfig):
        own = {"model_type": config.model_type, "layers": config.num_hidden_layers,
               "embedding_size": config.embedding_size}
    return {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size, **own,
            "positions": config.max_position_embeddings, "segments": config.type_vocab_size,
            "labels": config.num_labels}


# ------------------------------------------------------------------ ONNX Runtime's tools


@contextmanager
def quiet() -> Iterator[None]:
    """Keep ONNX Runtime's tools from logging what no user can act upon."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def fuse(proto: onnx.ModelProto, attention: bool = True) -> Any:
    """Have ONNX Runtime's optimizer join nodes to its own kernels; returns its model.

    The embeddings stay apart, because their fused kernel quantizes the layer normalisation's
    weights as well.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    options.enable_embed_layer_norm = False
    options.enable_attention = attention
    options.use_raw_attention_mask(True)  # padding may stand anywhere
    inputs = copy.deepcopy([*proto.graph.input])  # it drops those that no node reads
    with quiet():
        fused = optimize_model(proto, "bert", num_heads=0, hidden_size=0,
                               optimization_options=options, opt_level=0)
    left = {value.name for value in fused.model.graph.input}
    fused.model.graph.input.extend(value for value in inputs if value.name not in left)
    fused.model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    fused.topological_sort()
    return fused


def halve(fused: Any) -> None:
    """Turn the weights of a fused model into float16; its inputs and outputs stay as they are.

    Recurrent layers stay in float32: ONNX Runtime has no other kernels of them for a CPU.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST

    fused.convert_float_to_float16(
        keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, "LSTM", "GRU"])


class _Calibration:
    """Batches of inputs, as ONNX Runtime's calibration reads them."""

    def __init__(self, batches: Iterable[tuple[Tensor, ...]]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        inputs = next(self.batches, None)
        return None if inputs is None else {
            name: tensor.numpy() for name, tensor in zip(INPUTS, inputs, strict=True)}


def quantized_products(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the inner linear layers' matrix products."""
    weights = {weight.name for weight in proto.graph.initializer}
    return [node for node in proto.graph.node if node.op_type == "MatMul"
            and node.name.startswith(INNER) and node.input[1] in weights]


def cpu_has_vnni() -> bool:
    """Say whether this CPU adds products of 8-bit integers without overflow (true unless x86)."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return True
    text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    return "vnni" in text or "amx_int8" in text or "sse" not in text


def quantize(
    proto: onnx.ModelProto, path: Path, reduce_range: bool,
    calibration: Iterable[tuple[Tensor, ...]] | None = None,
) -> None:
    """Have ONNX Runtime's quantizer write a graph with 8-bit weights to `path`.

    The word embeddings and the inner linear layers are quantized, these with a scale for each
    output. The others (positions, segments, pooler, classifier) are not: they are 2 % of a model,
    and their errors reach every token or the logits at full size.

    Args:
        proto: a fused graph with scaled rows.
        path: the file.
        reduce_range: weights of 7 bits, for CPUs whose kernels would overflow (`cpu_has_vnni`).
        calibration: inputs of the model, whose ranges all later ones get; None: each batch's own.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    products = quantized_products(proto)
    # The quantizer asks for their types, and shape inference stops at ONNX Runtime's own nodes.
    names = {value for node in products for value in (node.input[0], node.output[0])}
    proto.graph.value_info.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in sorted(names))
    options = {
        "per_channel": True, "reduce_range": reduce_range, "weight_type": QuantType.QInt8,
        "nodes_to_quantize": [WORDS, *(node.name for node in products)],
        "op_types_to_quantize": ["MatMul", "Gather"],
    }
    extra = {"MatMulConstBOnly": True, "DefaultTensorType": TensorProto.FLOAT}
    with TemporaryDirectory(dir=path.parent) as folder, quiet():
        source = Path(folder, "float.onnx")
        onnx.save(proto, source)
        if calibration is None:
            quantize_dynamic(source, path, extra_options=extra, **options)
            fix_ranges(path)
            return
        # Products go on in float32: rounding them again would only add to the error.
        extra["OpTypesToExcludeOutputQuantization"] = ["MatMul"]
        quantize_static(source, path, _Calibration(calibration), QuantFormat.QDQ,
                        activation_type=QuantType.QUInt8, extra_options=extra, **options)


def fix_ranges(path: Path) -> None:
    """Have a dynamically quantized file round its inputs in [-1, 1], whatever the batch holds.

    Scaled rows lie in it. The range of a batch, which the quantizer has it look for, would let a
    row's logits depend on the others.
    """
    proto = onnx.load(path)
    for node in proto.graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            rounded, scale, zero = node.output
            proto.graph.initializer.extend([
                numpy_helper.from_array(np.array(1 / 127.5, np.float32), scale),
                numpy_helper.from_array(np.array(128, np.uint8), zero)])
            node.op_type = "QuantizeLinear"
            node.input.extend([scale, zero])
            del node.output[1:]
    onnx.save(proto, path)


# ------------------------------------------------------------------ running a file


def open_session(path: Path, device: torch.device | None = None) -> onnxruntime.InferenceSession:
    """Open an ONNX file with as many threads as PyTorch is set to.

    A GPU runs it where this ONNX Runtime can, the CPU otherwise. Raises `UserError` for a missing
    or damaged file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected an ONNX model")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    providers = ["CPUExecutionProvider"]
    if device is not None and device.type == "cuda":
        providers = [name for name in ("CUDAExecutionProvider", *providers)
                     if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # its classes have no common one of their own
        raise UserError(f"{path}: damaged, or not an ONNX model ({first_line(error)})") from error


class OnnxClassifier(nn.Module):
    """A classifier that ONNX Runtime computes from the `model.onnx` of a model directory.

    It is called as a `SequenceClassifier` is, computes in its own precision wherever it is moved,
    and returns neither attention scores nor hidden states.

    Args:
        folder: the model directory.
        num_labels: how many outputs the task needs; None: as many as there are.
        device: see `open_session`.

    Raises:
        UserError: a missing or damaged file, or one that does not fit `config.json`.
    """

    def __init__(
        self, folder: Path, num_labels: int | None = None, device: torch.device | None = None
    ) -> None:
        path = folder / ONNX_NAME
        config = read_config(find_config(folder))
        session = open_session(path, device)
        stored = json.loads(session.get_modelmeta().custom_metadata_map.get("shape", "{}"))
        for name, size in graph_shape(config).items():
            if stored.get(name) != size:
                raise UserError(
                    f"{path}: its {name} is {stored.get(name, 'not told')}; its config.json has"
                    f" {size}; expected the pair that quantize.py wrote")
        if num_labels is not None and num_labels != config.num_labels:
            raise UserError(
                f"{path}: its classifier has {config.num_labels} labels; expected {num_labels}")
        if num_labels is not None:
            config.check_task(folder)
        super().__init__()
        self.config, self.session = config, session
        with torch.device("meta"):  # shapes without values
            self.parameter_total = classifier_class(config)(config).parameter_total
        self.eval()

    def forward(
        self,
        input_ids: Tensor,  # [batch, length]
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        score_layers: Iterable[int] | None = None,
    ) -> TaskOutput:
        """Return float32 logits [batch, labels] on the CPU, and two empty lists."""
        self.config.check_length(input_ids.shape[1], "the model")
        segments = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = {name: tensor.cpu().numpy() for name, tensor in
                  zip(INPUTS, (input_ids, segments, mask), strict=True)}
        logits = self.session.run([OUTPUT], inputs)[0]
        if not np.isfinite(logits).all():
            raise UserError("the ONNX model's logits are not finite: it is damaged; do not use it")
        return TaskOutput(torch.from_numpy(logits), [], [])
