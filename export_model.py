"""Make the folder that goes to a hub: weights, tokenizer, ONNX and a model card, checked.

transformers, optimum, transformers.js, onnxruntime with tokenizers, and every script here read it:

    model.safetensors, config.json, README.md (the model card)
    vocab.txt, tokenizer.json, tokenizer_config.json
    task.json                   of a task of your own
    onnx/model.onnx             --onnx: the graph, fused
    onnx/model_quantized.onnx   --int8: the same with 8-bit weights

Where --model is an ONNX model of quantize.py, its graph goes to onnx/ as it is, and the weights
are those that it was made from. Of a pruned model no other program reads the weights, unless
--padded fills its shape up with zeros; the graphs stay small. Of a bilstm or bigru others read the
graphs only.

Examples:
    python export_model.py --model models/distilled_tinybert_4l_rte --onnx --int8 \
        --output_dir models/export/distilled_tinybert_4l_rte --language en --license apache-2.0
    python export_model.py --model models/kprune_tinybert_6l_sst2 --padded \
        --output_dir models/export/kprune_tinybert_6l_sst2 --push_to_hub me/tinybert-6l-sst2-pruned
"""

import argparse
import copy
import logging
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from transformer.checkpoint import load_state, save_config, stored_state, weights_record
from transformer.config import BertConfig, find_config
from transformer.data_layout import TASK_NAME
from transformer.families import FAMILIES
from transformer.file_utils import (
    CONFIG_NAME,
    ONNX_NAME,
    SAFE_WEIGHTS_NAME,
    TOKENIZER_FILES,
    UserError,
    atomic_path,
    read_json,
    write_text,
)
from transformer.hub import fetch_model
from transformer.model_card import (
    evaluated_model,
    find_source,
    model_card,
    read_evaluations,
    read_history,
)
from transformer.modeling import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertModel,
    BertPreTrainedModel,
    TinyBertForSequenceClassification,
    freeze,
)
from transformer.own_tasks import save_task
from transformer.recurrent import LAYERS, classifier_class, read_config
from transformer.run_folder import prepare_output_dir
from transformer.runtime import commit_id, first_line, run_script
from transformer.tokenization import AnyTokenizer, load_tokenizer

logger = logging.getLogger(__name__)

# The class and the hub's task of a model, by a weight that only it has; the encoder has them all.
KINDS = {
    "classifier.weight": (TinyBertForSequenceClassification, "text-classification"),
    "qa_outputs.weight": (BertForQuestionAnswering, "question-answering"),
    "cls.predictions.transform.dense.weight": (BertForMaskedLM, "fill-mask"),
    "bert.embeddings.word_embeddings.weight": (BertModel, "feature-extraction"),
}
# What the readers of a hub look for, by method of quantize.py.
GRAPHS = {"fp32": "onnx/model.onnx", "fp16": "onnx/model_fp16.onnx",
          "int8-dynamic": "onnx/model_quantized.onnx", "int8-static": "onnx/model_quantized.onnx"}
PUBLISHED = [SAFE_WEIGHTS_NAME, CONFIG_NAME, *TOKENIZER_FILES, TASK_NAME, "README.md",
             *GRAPHS.values()]  # what is uploaded
# Largest difference of logits to the source that passes, as a share of the largest logit.
TOLERANCE = {"fp32": 1e-4, "fp16": 0.05, "int8-dynamic": 0.3, "int8-static": 0.3}


class Source(NamedTuple):
    """A model to export; `graphs` are ONNX files that are there already, by method."""

    folder: Path
    model: BertPreTrainedModel
    dtype: torch.dtype
    tokenizer: AnyTokenizer
    pipeline: str
    graphs: dict[str, Path]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "export_model.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=str, nargs="+", required=True,
        help="one or more models: folder, URL or hub id")
    add("--output_dir", type=str, nargs="+", required=True, help="a folder for each")
    add("--onnx", action="store_true", help="write onnx/model.onnx as well (classifiers only)")
    add("--int8", action="store_true",
        help="write onnx/model_quantized.onnx as well: 8-bit weights, for every CPU and browser")
    add("--padded", action="store_true",
        help="write a pruned model in full shape, with zeros: the same logits, read everywhere")
    add("--push_to_hub", type=str, default="", metavar="REPO",
        help="then upload the folder to this model of the hub (HF_ENDPOINT, HF_TOKEN)")
    for name, what in (("license", "licence, such as apache-2.0"), ("language", "such as en"),
                       ("base_model", "hub id of what it was made from, such as"
                                      " google-bert/bert-base-uncased"),
                       ("dataset", "hub id of the task's data, such as nyu-mll/glue")):
        add(f"--{name}", type=str, default="", help=f"for the model card: {what}")
    add("--results", type=Path, nargs="*", default=[], metavar="FOLDER",
        help="for the model card: folders of evaluations of --model, such as that of the test set")
    add("--cache_dir", type=str, default="",
        help="folder for models given as URLs; empty: $TINYBERT_CACHE, else ~/.cache/tinybert")
    add("--overwrite_output_dir", action="store_true",
        help="write into an output folder that is not empty")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise a `UserError` for flags that do not go together."""
    if len({Path(path).resolve() for path in args.output_dir}) != len(args.model):
        raise UserError(f"--output_dir: {len(args.output_dir)} folders for {len(args.model)} models"
                        " of --model; expected one each")
    if args.push_to_hub and len(args.model) > 1:
        raise UserError(f"--push_to_hub {args.push_to_hub}: expected one --model")


# ------------------------------------------------------------------ the source


def load_source(folder: Path) -> Source:
    """Load a model of any kind in float32, with its vocabulary and what ONNX file it has."""
    graphs = {}
    record = read_json(path) if (path := folder / "quantization.json").is_file() else {}
    if record.get("format") == "onnx":
        graphs[record["method"]] = folder / ONNX_NAME
        source = find_source(folder, record["source"])
        if source is None:
            raise UserError(f"{path}: the model that it was made from, {record['source']}, is not"
                            " there; expected it for the weights")
        if weights_record(source)["source_sha256"] != record["source_sha256"]:
            raise UserError(f"{path}: the weights of {source} have changed since; quantize it anew")
        folder = source
    config, state = read_config(find_config(folder)), load_state(folder)
    model_class, pipeline = next((kind for key, kind in KINDS.items() if key in state),
                                 (BertModel, ""))
    if pipeline == "text-classification":
        model_class = classifier_class(config)
    model = freeze(model_class.from_state(config, state, folder))
    tokenizer = load_tokenizer(folder)
    config.check_vocabulary(len(tokenizer), folder)
    dtype = next(iter(state.values())).dtype
    return Source(folder, model, dtype, tokenizer, pipeline, graphs)


def pad(model: BertPreTrainedModel) -> BertPreTrainedModel:
    """Return a pruned model in full shape: the heads and neurons that it lacks are zeros.

    Such a head attends to all tokens alike and sees zeros, and of such a neuron nothing reads the
    output, so the logits are the same.
    """
    config = copy.deepcopy(model.config)
    config.heads_per_layer = config.neurons_per_layer = None
    full = type(model)(config)
    own = model.state_dict()
    for name, tensor in full.state_dict().items():
        if not name.startswith(model.only_distillation):
            tensor.zero_()[tuple(slice(size) for size in own[name].shape)] = own[name]
    return freeze(full)


# ------------------------------------------------------------------ the folder


def write_graphs(source: Source, methods: list[str], output_dir: Path) -> dict[str, Path]:
    """Write the ONNX files of `methods` and copy those that are there; returns them by method."""
    from transformer.onnx_model import build, fuse, quantize  # here: a second to load

    written = {}
    for method in dict.fromkeys([*methods, *source.graphs]):
        written[method] = output_dir / GRAPHS[method]
        with atomic_path(written[method]) as temporary:
            if method in source.graphs:
                temporary.write_bytes(source.graphs[method].read_bytes())
            elif method == "fp32":
                temporary.write_bytes(fuse(build(source.model)).model.SerializeToString())
            else:  # 7-bit weights: who will run it may have a CPU whose kernels overflow
                fused = fuse(build(source.model, scale_rows=True), attention=False)
                quantize(fused.model, temporary, reduce_range=True)
    return written


def fixed_batch(config: BertConfig, pieces: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, segments and mask of four rows that are always the same."""
    length = min(24, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(pieces, (4, length), generator=generator)
    mask = (torch.arange(length) < torch.tensor([length, length, length // 2, 3])[:, None]).long()
    segments = (torch.arange(length) >= length // 3).long() * mask * (config.type_vocab_size > 1)
    return ids * mask, segments, mask


def answers(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return a model's logits, or the encoder's last hidden states."""
    with torch.inference_mode():
        output = model(*inputs)
    return output.hidden_states[-1] if isinstance(model, BertModel) else output.logits


def check_export(source: Source, output_dir: Path, graphs: dict[str, Path]) -> list[str]:
    """Read the folder anew and compare what it answers with the source; returns the differences.

    Raises:
        UserError: a file whose answers differ, or a tokenizer with other ids.
    """
    inputs = fixed_batch(source.model.config, len(source.tokenizer))
    expected = answers(source.model, inputs)
    again = freeze(type(source.model).from_pretrained(output_dir))
    checked = [(SAFE_WEIGHTS_NAME, answers(again, inputs), "fp32")]
    if graphs:
        from transformer.onnx_model import INPUTS, OUTPUT, open_session
    for method, path in graphs.items():
        feed = {name: value.numpy() for name, value in zip(INPUTS, inputs, strict=True)}
        logits = torch.from_numpy(open_session(path).run([OUTPUT], feed)[0])
        checked.append((GRAPHS[method], logits, method))
    told = []
    for name, logits, method in checked:
        difference = float((logits - expected).abs().max())
        told.append(f"{name} {difference:.1e}")
        if not difference <= TOLERANCE[method] * float(expected.abs().max()):
            raise UserError(f"{output_dir / name}: its answers differ from those of {source.folder}"
                            f" by {difference:.3g}; do not use it")
    return told


def push(output_dir: Path, repo: str) -> None:
    """Upload the folder; whatever goes wrong is one line that says how to do it later."""
    from huggingface_hub import HfApi, errors
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        address = HfApi().create_repo(repo, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=output_dir,
                              allow_patterns=PUBLISHED)
    except (errors.HTTPError, OSError, ValueError) as error:
        raise UserError(f"--push_to_hub {repo}: {first_line(error)}; the folder is complete, to"
                        f" upload it later: hf upload {repo} {output_dir}") from error
    print(f"{output_dir}: uploaded to {address}")


def check_kind(config: BertConfig, folder: Path) -> None:
    """Raise a `UserError` for what no other program computes; warn where it reads graphs only."""
    if config.model_type == "shared_layer_bert":
        config.check_own_layers(folder, "what others read of such a kind is an ALBERT")
    if config.model_type not in ("bert", "pruned_bert", *FAMILIES, *LAYERS):
        raise UserError(f"{find_config(folder)}: {config.model_type} is a kind that no other"
                        " program computes; for ONNX Runtime use quantize.py --format onnx")
    if config.is_pruned or config.model_type in LAYERS:
        kind = config.model_type if config.model_type in LAYERS else "pruned, without --padded"
        logger.warning("%s: %s: only this package reads the weights, --onnx is for all others",
                       folder, kind)


def export(folder: Path, output_dir: Path, args: argparse.Namespace) -> None:
    """Export one model."""
    evaluations = read_evaluations(args.results)
    history = read_history(folder, evaluations)
    if evaluations and not {*map(evaluated_model, evaluations)} & {*history.models}:
        logger.warning("%s: --results are not of this model; they are left out", folder)
    source = load_source(folder)
    methods = [m for m, wanted in (("fp32", args.onnx), ("int8-dynamic", args.int8)) if wanted]
    if methods and source.pipeline != "text-classification":
        raise UserError(f"{folder}: --onnx and --int8 take classifiers; this model is for"
                        f" {source.pipeline}")
    if methods:
        source.model.config.check_own_layers(source.folder, "leave out --onnx and --int8")
    if "int8-static" in source.graphs:
        methods = [method for method in methods if method != "int8-dynamic"]
    model = pad(source.model) if args.padded else source.model
    config = model.config
    check_kind(config, source.folder)

    # The files
    prepare_output_dir(output_dir, args.overwrite_output_dir, [folder, source.folder])
    stored = copy.deepcopy(model).to(source.dtype)
    save_config(stored, output_dir, source.tokenizer)
    left_out = ("cls.predictions.decoder.", *model.only_distillation)  # the word embeddings again
    state = {key: tensor for key, tensor in stored.state_dict().items()
             if not key.startswith(left_out)}
    state = {key: tensor.contiguous() for key, tensor in stored_state(state, config).items()}
    with atomic_path(output_dir / SAFE_WEIGHTS_NAME) as temporary:
        temporary.write_bytes(save(state, metadata={"format": "pt"}))
    graphs = write_graphs(source, methods, output_dir) if methods or source.graphs else {}
    told = check_export(source, output_dir, graphs)

    if history.task is not None:
        save_task(history.task, output_dir)

    # The card
    files = [GRAPHS[method] for method in graphs]
    notes = [f"Exported by `export_model.py`; commit {commit_id()}. On a batch of 4 rows it answers"
             f" as the model before, but for at most: {', '.join(told)}."]
    facts = {
        **vars(args), "name": (args.push_to_hub or output_dir.resolve().name).rpartition("/")[2],
        "place": args.push_to_hub or ".", "pipeline": source.pipeline, "notes": notes,
        "model_type": config.model_type, "family": config.family,
        "length": config.max_position_embeddings, "onnx": files,
        "parameters": source.model.parameter_total,
        "tags": ["onnx", "transformers.js"] if files else [],
    }
    write_text(output_dir / "README.md", model_card(history, config, facts))
    print(f"{output_dir}: largest difference to {source.folder}: {', '.join(told)}")


def main(args: argparse.Namespace) -> None:
    check_args(args)
    for model, output in zip(args.model, args.output_dir, strict=True):
        export(fetch_model(model, args.cache_dir or None), Path(output), args)
    if args.push_to_hub:
        push(Path(args.output_dir[0]), args.push_to_hub)


if __name__ == "__main__":
    run_script(main, get_args_parser())
