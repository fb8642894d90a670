"""The model card of an exported folder: what the records beside a model say of it, and no more.

A card is the `README.md` of a folder on a hub: YAML that the hub reads, then text.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from transformer.config import OWN_TYPES, BertConfig
from transformer.families import architecture
from transformer.file_utils import UserError, read_json
from transformer.own_tasks import stored_task
from transformer.run_folder import RESULTS_NAME
from transformer.runtime import as_list
from transformer.tables import markdown_table
from transformer.tasks import Task, get_task

# The hub's names of our metrics; means of two of them have none.
METRICS = {"acc": "accuracy", "f1": "f1", "macro_f1": "f1", "mcc": "matthews_correlation",
           "pearson": "pearsonr", "spearmanr": "spearmanr"}
SPLITS = {"dev": "validation", "dev_mm": "validation_mismatched"}
TABLES = "csv"  # the hub's word for tables in files, where no --dataset says whose they are
LISTED_CLASSES = 20  # of more, a card has neither names nor counts
# What a sample asks of a user's own model, by --language.
OWN_TEXTS = {"": ("a text of yours", "and a second one"),
             "zh": ("在这里写一句话", "这里写第二句话")}
FLAGS = ("num_train_epochs", "learning_rate", "train_batch_size", "max_seq_length", "temperature",
         "hard_label_weight", "soft_label_weight", "temperature_squared", "no_attention_loss",
         "warmup_proportion", "weight_decay", "aug_train", "match_original", "num_tokens",
         "constraint", "seed")

PIPELINE = """```python
from transformers import pipeline

model = pipeline("{pipeline}", model="{place}")
print(model({example}{options}))
```"""
ONNX = """Without PyTorch, in this folder:

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({length})
row = tokenizer.encode({example})
inputs = {{"input_ids": row.ids, "token_type_ids": row.type_ids,
          "attention_mask": row.attention_mask}}
session = onnxruntime.InferenceSession("{file}")
print(session.run(["logits"], {{name: np.array([ids]) for name, ids in inputs.items()}}))
```"""
OWN_CODE = ("{}: `python predict.py --model FOLDER`, of the code that made it, reads the weights,"
            " and no other program does.")
KINDS = {"bilstm": "bidirectional LSTM", "bigru": "bidirectional GRU"}  # or BERTs
OURS_ALONE = (*KINDS, *OWN_TYPES)  # model types of weights that no other program reads


@dataclass
class History:
    """What the records of a model say: its task, its scores by split and metric, how it was made.

    classes: by split, the counts of each class.
    steps: one sentence each, the last step first.
    models: the names of the folders that were read.
    """

    task: Task | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    classes: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    selection: str = ""
    steps: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)


def public_name(model: str) -> str:
    """Return a hub id as it is, and of a local folder its name alone."""
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@\w+)?", model) and not Path(model).exists()
    return model if is_id else Path(model).name


def find_source(folder: Path, source: str) -> Path | None:
    """Return the folder that a model was made from, where it was or beside `folder`, if there."""
    places = (Path(source), folder.parent / Path(source).name)
    return next((place for place in places if place.is_dir()), None)


def read_evaluations(folders: Iterable[Path | str]) -> list[dict[str, Any]]:
    """Read the evaluations of models in these folders; one that lacks it is a `UserError`."""
    evaluations = []
    for path in (Path(folder, RESULTS_NAME) for folder in folders):
        evaluations.append(read_json(path) if path.is_file() else {})
        if not {"model", "all_metrics"} <= evaluations[-1].keys():
            raise UserError(f"{path}: expected the evaluation of a model (--do_eval)")
    return evaluations


def evaluated_model(result: Mapping[str, Any]) -> str:
    """Return the name of the folder of the model that was evaluated; "" in a run's own results."""
    return Path(result.get("model", "")).name


def read_history(folder: Path, evaluations: Iterable[Mapping[str, Any]] = ()) -> History:
    """Read the records of a model directory, and of those that it was made from.

    `evaluations` are results that lie elsewhere; those of these models count.
    """
    arguments, results, quantized, pruned = (
        read_json(path) if (path := folder / f"{name}.json").is_file() else {}
        for name in ("args", "eval_results", "quantization", "kprune"))
    source = quantized.get("source") or pruned.get("model") or ""
    place = find_source(folder, source) if source else None
    found = read_history(place, evaluations) if place else History()
    found.models.append(folder.name)
    if pruned:
        results = {**pruned.get("after", {}), "task": pruned["task"]}
    metrics, classes = (
        {split: value for result in (results, *evaluations)
         if result is results or evaluated_model(result) == folder.name
         for split, value in result.get(key, {}).items()} for key in ("all_metrics", "per_class"))
    if quantized:  # the scores stay those of the weights
        after = [f"{split} {name} {value:.4f}" for split, name, value in scores(metrics)]
        found.steps.insert(0, f"Quantized by `quantize.py` ({quantized['method']}) from"
                              f" {public_name(source)}{details(quantized, folder)}"
                              f"{'; then ' * bool(after)}{', '.join(after)}.")
        found.task = found.task or stored_task(folder)
        return found
    step = ""
    if pruned:
        step = (f"Pruned by K-prune from {public_name(source)}: {100 * pruned['flops_removed']:.1f}"
                " % of the operations of heads and neurons removed")
        found.tags.append("pruning")
        found.selection = f"none; of the model before pruning: {found.selection or 'unknown'}"
    elif "arguments" in arguments:
        step = training(arguments)
        found.tags += ["knowledge-distillation"] * ("teacher_model" in arguments["arguments"])
    if step:
        found.steps.insert(0, f"{step}{details(arguments, folder)}.")
    found.task = task_of_model(folder, results.get("task")) or found.task
    found.metrics, found.classes = metrics, classes
    found.selection = results.get("selection", found.selection)
    if "chosen" in results:
        found.selection += (f"; of {len(results['sweep'])} settings {results['chosen']}, the best"
                            " on dev")
    return found


def task_of_model(folder: Path, name: str | None) -> Task | None:
    """Return the task of a model: its own description, that of its results, that of its config."""
    task = stored_task(folder)
    if name is not None and (task is None or task.is_glue):
        with suppress(UserError):  # SQuAD is no task of the table
            return get_task(name)
    return task


def training(record: Mapping[str, Any]) -> str:
    """Say which training made a model, and from what."""
    arguments = record["arguments"]
    start = f", starting from {public_name(record['student'])}" if "student" in record else ""
    if "teacher_model" not in arguments:
        return f"Trained without distillation{start}"
    layers = "hidden states" + " and attention" * (not arguments.get("no_attention_loss"))
    what = f"its {layers}"
    if arguments.get("pred_distill"):
        what = f"its logits, {layers}" if arguments.get("joint") else "its logits"
    general = " on text without labels" if "pregenerated_data" in arguments else ""
    teachers = [public_name(teacher) for teacher in as_list(arguments["teacher_model"])]
    if len(teachers) > 1:
        what = "the mean of their predictions"
        if weights := arguments.get("teacher_weights"):
            what += f", weights {':'.join(f'{weight:g}' for weight in weights)}"
    return f"Distilled from {' and '.join(teachers)} ({what}){general}{start}"


def details(record: Mapping[str, Any], folder: Path) -> str:
    """Return commit, precision and flags as the end of a sentence; of lists, this student's."""
    arguments = record.get("arguments", {})
    outputs = arguments.get("output_dir")
    each = isinstance(outputs, list) and not arguments.get("sweep")  # else all were tried
    names = [Path(path).name for path in outputs] if each else []

    def own(value: Any) -> Any:
        if isinstance(value, list) and len(value) == len(names) and folder.name in names:
            return value[names.index(folder.name)]
        return ",".join(map(str, value)) if isinstance(value, list) else value

    told = [f"{name} {record[name]}" for name in ("commit", "precision") if record.get(name)]
    told += [f"{name} {own(arguments[name])}" for name in FLAGS
             if arguments.get(name) not in (None, False)]
    return f"; {', '.join(told)}" if told else ""


def scores(all_metrics: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, float]]:
    """Yield (split, metric, value) of every score that is a number."""
    for split, metrics in all_metrics.items():
        for name, value in metrics.items():
            if isinstance(value, float | int):
                yield split, name, value


def front_matter(found: History, facts: Mapping[str, Any]) -> ModelCardData:
    """Return what the hub reads; what nothing tells is left out."""
    dataset, task = facts["dataset"], found.task
    results = []
    for split, name, value in scores(found.metrics if task else {}):
        if name in METRICS:
            matched = "_matched" if split == "dev" and "dev_mm" in task.dev_files else ""
            results.append(EvalResult(
                task_type=facts["pipeline"], dataset_type=dataset or TABLES,
                dataset_name=task.folder,
                dataset_config=task.name.replace("-", "") if task.is_glue else None,
                dataset_split=SPLITS.get(split, split) + matched, metric_type=METRICS[name],
                metric_args={"average": "macro"} if name == "macro_f1" else None,
                metric_name=name, metric_value=value))
    return ModelCardData(
        license=facts["license"] or None, language=facts["language"] or None,
        library_name=None if facts["model_type"] in OURS_ALONE else "transformers",
        pipeline_tag=facts["pipeline"], base_model=facts["base_model"] or None,
        datasets=[dataset] if dataset else None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        tags=[facts["model_type"] if facts["model_type"] in KINDS else facts["family"], "tinybert",
              *dict.fromkeys(found.tags), *facts["tags"]],
        eval_results=results or None, model_name=facts["name"] if results else None)


def samples(found: History, facts: Mapping[str, Any]) -> list[str]:
    """Return code that runs as printed, in the folder or with its hub id."""
    task = found.task
    pair = task is not None and task.text_b is not None
    own = OWN_TEXTS.get(facts["language"], OWN_TEXTS[""])
    first, second = own if task and not task.is_glue else ("a charming film", "the film has charm")
    texts = [f'"{first}"', *[f'"{second}"'] * pair]
    examples = {
        "text-classification": f'{{"text": {texts[0]}, "text_pair": {texts[-1]}}}' if pair
                               else texts[0],
        "fill-mask": '"a charming [MASK]"', "feature-extraction": texts[0]}
    options = ", top_k=None, truncation=True" * (facts["pipeline"] == "text-classification")
    if facts["model_type"] in OURS_ALONE:
        parts = [OWN_CODE.format("It is no Transformer" if facts["model_type"] in KINDS else
                                 "Its layers have unequal shapes")]
    else:
        parts = [PIPELINE.format(example=examples[name], options=options, **facts)
                 for name in [facts["pipeline"]] if name in examples]
    if facts["onnx"]:
        parts.append(ONNX.format(example=", ".join(texts), file=facts["onnx"][-1], **facts))
    return parts


def class_table(task: Task, classes: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    """Return the counts of each class of an own task, on the test set where there is one.

    None where there are too many classes, or nothing was counted.
    """
    split = next((name for name in ("test", "dev") if classes.get(name)), None)
    if task.is_glue or split is None or len(classes[split]) > LISTED_CLASSES:
        return []
    rows = [[f"`{label}`", str(count["rows"]), str(count["predicted"]), str(count["correct"]),
             f"{2 * count['correct'] / max(1, count['rows'] + count['predicted']):.4f}"]
            for label, count in classes[split].items()]
    header = ["class", f"{split} rows", "predicted", "correct", "F1"]
    return [markdown_table(header, rows).rstrip()]


def model_card(found: History, config: BertConfig, facts: Mapping[str, Any]) -> str:
    """Write the card of an exported folder.

    Args:
        found: what the records beside the model say.
        config: the exported model's.
        facts: name, place (hub id or "."), pipeline, model_type, family, parameters, length, onnx
            (files), notes (sentences), tags; license, language, base_model and dataset as given,
            or "".
    """
    names = [*config.id2label.values()]
    labels = (", ".join(f"`{name}`" for name in names) if len(names) <= LISTED_CLASSES
              else f"{len(names)}, in `config.json`")
    purpose = f" for {found.task.folder}" if found.task else ""
    kind = KINDS.get(facts["model_type"], architecture(facts["family"], "BERT"))
    shape = (f"A {kind}{purpose}: {config.num_hidden_layers} layers, {config.hidden_size} wide,"
             f" {facts['parameters'] / 1e6:.1f} million parameters.")
    if facts["pipeline"] == "text-classification":
        shape += " It gives one score." if config.num_labels == 1 else f" Labels: {labels}."
    parts = [f"# {facts['name']}", shape, "## Use", *samples(found, facts)]
    rows = [f"| {split} | {name} | {value:.4f} |" for split, name, value in scores(found.metrics)]
    if rows:
        parts += ["## Results", "\n".join(["| split | metric | value |", "|---|---|---:|", *rows])]
        if found.task:
            parts += class_table(found.task, found.classes)
            shares = {"dev": found.task.dev_share, "test": found.task.test_share}
            if told := [f"{split} {share:g}" for split, share in shares.items() if share]:
                parts.append(f"Shares of the training file, by texts: {', '.join(told)}.")
        if found.selection:
            parts.append(f"Selection of the checkpoint: {found.selection}.")
    made = [*facts["notes"], *found.steps]
    if made:
        parts += ["## How it was made", "\n".join(f"- {step}" for step in made)]
    return f"---\n{front_matter(found, facts).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
