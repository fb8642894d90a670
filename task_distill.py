"""Distil a fine-tuned teacher into a student on one task, or evaluate a student.

Task distillation has two stages, each a run of this script (paper, sections 3.2 and 4.2):
intermediate layers first (attention and hidden states), then, with --pred_distill, the logits.
Several students share the teacher's forward pass.

Examples:
    python task_distill.py --teacher_model models/final_rte_teacher \
        --student_model models/distilled_tinybert_4l --data_dir data/glue_data/RTE \
        --task_name RTE --output_dir models/tmp_distilled_tinybert_4l_rte \
        --max_seq_length 128 --train_batch_size 32 --num_train_epochs 10 --aug_train
    python task_distill.py --pred_distill --teacher_model models/final_rte_teacher \
        --student_model models/tmp_distilled_tinybert_4l_rte --data_dir data/glue_data/RTE \
        --task_name RTE --output_dir models/distilled_tinybert_4l_rte --aug_train \
        --learning_rate 3e-5 --num_train_epochs 3 --eval_step 100
    python task_distill.py --pred_distill --joint --hard_label_weight 0.5 --soft_label_weight 0.5 \
        --teacher_model models/final_rte_teacher --student_model models/distilled_tinybert_4l \
        --data_dir data/glue_data/RTE --task_name RTE --output_dir models/joint_tinybert_4l_rte
    python task_distill.py --pred_distill --sweep --learning_rate 1e-5 2e-5 3e-5 \
        --train_batch_size 16 32 --teacher_model models/final_rte_teacher \
        --student_model models/tmp_distilled_tinybert_4l_rte --data_dir data/glue_data/RTE \
        --task_name RTE --output_dir models/distilled_tinybert_4l_rte --aug_train
    python task_distill.py --do_eval --student_model models/distilled_tinybert_4l_rte \
        --data_dir data/glue_data/RTE --task_name RTE --output_dir tmp
    python task_distill.py --do_eval --student_model models/distilled_mine --data_dir data/mine \
        --eval_split dev test --output_dir tmp_mine
"""

import argparse
import copy
import functools
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transformer import distributed
from transformer.batching import (
    Batch,
    padded_collate,
    padding_multiple,
    shuffled_passes,
)
from transformer.checkpoint import has_weights
from transformer.config import BertConfig, find_config
from transformer.distillation import (
    IntermediateLoss,
    IntermediateTeacher,
    PredictionLoss,
    check_layers,
    describe_layers,
    map_layers,
    no_teacher,
)
from transformer.evaluation import (
    Selection,
    by_split,
    evaluate_splits,
    evaluation_splits,
    predict_logits,
    warn_of_chance,
    write_results,
)
from transformer.features import Features, load_features
from transformer.file_utils import UserError, atomic_path, read_json
from transformer.hub import fetch_model
from transformer.hugging_face import predict_examples
from transformer.inference import load_classifier, read_classifier
from transformer.modeling import freeze
from transformer.optimization import BertAdam, param_groups
from transformer.own_tasks import add_data_arguments, task_of
from transformer.recurrent import (
    RecurrentClassifier,
    RecurrentConfig,
    classifier_class,
    copy_embeddings,
    read_config,
)
from transformer.run import StudentOutput, TrainingRun, check_training_disk
from transformer.run_folder import RESULTS_NAME, RunFolder, prepare_output_dir, save_arguments
from transformer.runtime import (
    add_distillation_arguments,
    add_eval_split_argument,
    as_list,
    check_numbers,
    compile_models,
    format_values,
    get_device,
    log_start,
    parameter_count,
    per_student,
    resolve_precision,
    run_script,
    set_seed,
    training_steps,
)
from transformer.tasks import Task, iterate_examples, original_rows
from transformer.teachers import Teacher, choose_labels, choose_tokenizer, in_order, mean_logits
from transformer.tokenization import AnyTokenizer
from transformer.training import StudentTrainer

logger = logging.getLogger(__name__)

# Flags of the prediction stage's loss alone, and of those on the teacher's layers.
PREDICTION_FLAGS = ("joint", "hard_label_weight", "soft_label_weight", "temperature",
                    "temperature_squared", "hard_labels")
LAYER_FLAGS = ("layer_map", "no_attention_loss", "attention_loss_weight", "hidden_loss_weight")

# What a setting's folder holds beside its model.
RECORDS = ("args.json", "log.jsonl", "eval_results.json", "eval_results.txt")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "task_distill.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_data_arguments(parser)
    add("--teacher_model", default=None, type=str, nargs="+",
        help="fine-tuned teacher: folder, URL or hub id; not needed with --do_eval. With"
             " --pred_distill any classifier that the package transformers reads; of several the"
             " probabilities are averaged")
    add("--teacher_weights", default=None, type=float, nargs="+",
        help="weight of each of several teachers; not given: all the same")
    add("--student_model", default=None, type=str, required=True, nargs="+",
        help="student to start from or to evaluate: folder, URL or hub id; several students"
             " share the teacher's pass")
    add("--output_dir", default=None, type=str, required=True, nargs="+",
        help="folder for the student, its logs and results; one for each student")
    add("--cache_dir", default="", type=str,
        help="folder for downloaded models; empty: $TINYBERT_CACHE, else ~/.cache/tinybert, and for"
             " the hub its own cache")
    add("--max_seq_length", default=128, type=int,
        help="longest input in word pieces; not given: the task's (64 for single sentences)")
    add("--do_eval", action="store_true", help="only evaluate the student")
    add_eval_split_argument(parser)
    add("--train_batch_size", default=32, type=int, nargs="+",
        help="rows a step, over all micro-batches; several with --sweep")
    add("--learning_rate", default=5e-5, type=float, nargs="+",
        help="intermediate stage: constant rate; prediction stage: peak of the schedule; one for"
             " each student, one for all, or with --sweep those to try")
    add("--num_train_epochs", default=3.0, type=float,
        help="passes over the rows; not given: the task's in the intermediate stage (20; CoLA 50;"
             " MNLI, QQP, QNLI 10)")
    add("--aug_train", action="store_true",
        help="train on train_aug.tsv (data_augmentation.py writes it)")
    add("--eval_step", type=int, default=50,
        help="steps between log lines and, in the prediction stage, dev evaluations")
    add("--pred_distill", action="store_true", help="the prediction stage, on the logits")
    add("--sweep", action="store_true",
        help="prediction stage: train every combination of the rates and batch sizes, each in a"
             " subfolder, and keep each student's best on dev in its output folder")
    add("--temperature", type=float, default=1.0, help="divides the logits of both models (t)")
    add("--hard_label_weight", type=float, default=0.0,
        help="prediction stage: weight of the cross-entropy with the labels (Hinton's loss)")
    add("--soft_label_weight", type=float, default=1.0,
        help="prediction stage: weight of the cross-entropy with the teacher's probabilities")
    add("--temperature_squared", action="store_true",
        help="prediction stage: multiply the teacher's term by the temperature's square, so that"
             " its gradient keeps its size")
    add("--hard_labels", choices=["original", "all"], default="all",
        help="with --aug_train: whose labels count in --hard_label_weight's term, a mean over all"
             " rows: those of train's own rows, or of all; an augmented row has the label of the"
             " one that it was made of")
    add("--joint", action="store_true",
        help="prediction stage: add the intermediate stage's losses, both stages in one")
    add("--attention_loss_weight", type=float, default=1.0,
        help="intermediate stage and --joint: weight of the attention loss")
    add("--hidden_loss_weight", type=float, default=1.0,
        help="intermediate stage and --joint: weight of the loss on hidden states and embeddings")
    add("--copy_embeddings", action="store_true",
        help="a bilstm or bigru student that is only a config.json starts from the teacher's word"
             " embeddings, where it is narrower from their principal components")
    add("--max_train_rows", type=int, default=0, help="train on the first rows only; 0: all")
    add_distillation_arguments(parser, eval_batch_size=32)
    return parser


def apply_task_defaults(args: argparse.Namespace, task: Task) -> None:
    """Replace the flags that were not given by the task's own values (paper, section 4.2)."""
    if "max_seq_length" not in args.given:
        args.max_seq_length = task.max_seq_length
    if "num_train_epochs" not in args.given and not args.pred_distill:
        args.num_train_epochs = float(task.intermediate_epochs)


def uses_layers(args: argparse.Namespace) -> bool:
    """Say whether students learn from the teacher's layers: the intermediate stage, or --joint."""
    return args.joint or not args.pred_distill


def check_losses(args: argparse.Namespace) -> None:
    """Raise a `UserError` for flags of losses that the stage does not have."""
    for flag in PREDICTION_FLAGS:
        if flag in args.given and not args.pred_distill:
            raise UserError(f"--{flag} is for the prediction stage; expected --pred_distill, too")
    for flag in LAYER_FLAGS:
        if flag in args.given and (args.do_eval or not uses_layers(args)):
            raise UserError(f"--{flag} is for the intermediate stage and for --pred_distill"
                            " --joint; expected one of them")
    if not args.hard_label_weight and not args.soft_label_weight:
        raise UserError("--hard_label_weight 0 --soft_label_weight 0: the classifier would learn"
                        " nothing; expected one above 0")
    if args.no_attention_loss and "attention_loss_weight" in args.given:
        raise UserError("--no_attention_loss leaves no loss for --attention_loss_weight; expected"
                        " one of the two")
    if not args.pred_distill and not args.hidden_loss_weight and (
            args.no_attention_loss or not args.attention_loss_weight):
        raise UserError("--hidden_loss_weight 0 without an attention loss: the student would learn"
                        " nothing; expected a weight above 0")
    if args.hard_labels == "original" and not (args.aug_train and args.hard_label_weight):
        raise UserError("--hard_labels original: expected --aug_train and --hard_label_weight, too")
    args.layer_map = per_student("layer_map", args.layer_map, len(args.student_model))


def check_teachers(args: argparse.Namespace) -> None:
    """Raise a `UserError` for several teachers where the stage takes one, or for their weights."""
    teachers = as_list(args.teacher_model)
    if len(teachers) > 1 and uses_layers(args) and not args.do_eval:
        raise UserError(f"--teacher_model: {len(teachers)} teachers; expected one, whose layers"
                        " are learned from, or --pred_distill without --joint")
    if args.teacher_weights and len(args.teacher_weights) != len(teachers):
        raise UserError(f"--teacher_weights: {len(args.teacher_weights)} weights for"
                        f" {len(teachers)} teachers; expected one each")
    args.teacher_model = teachers[0] if len(teachers) == 1 else teachers


def check_args(args: argparse.Namespace) -> None:
    """Raise a `UserError` for flags out of range, or that do not fit together.

    Rates and layer maps become a list of one a student, a batch size and a teacher the value
    itself.
    """
    check_numbers(args, "num_train_epochs", "teacher_weights")
    if args.eval_split and not args.do_eval:
        raise UserError("--eval_split is for --do_eval; training selects on the dev set")
    for flag in ("aug_train", "pred_distill", "copy_embeddings", "compile", "resume", "sweep",
                 "tensorboard", "teacher_weights"):
        if args.do_eval and getattr(args, flag):
            raise UserError(f"--{flag} is for training; leave it out with --do_eval")
    check_losses(args)
    check_teachers(args)
    args.learning_rate, sizes = as_list(args.learning_rate), as_list(args.train_batch_size)
    if args.sweep and not args.pred_distill:
        raise UserError("--sweep chooses by dev scores; expected --pred_distill, too")
    if len(sizes) > 1 and not args.sweep:
        raise UserError(f"--train_batch_size {' '.join(map(str, sizes))}: several need --sweep")
    args.train_batch_size = sizes if args.sweep else sizes[0]
    if not args.sweep:
        args.learning_rate = per_student(
            "learning_rate", args.learning_rate, len(args.student_model))


def load_rows(args: argparse.Namespace, task: Task, split: str, tokenizer: AnyTokenizer,
              labels: tuple[str, ...], max_rows: int = 0) -> Features:
    return load_features(task, args.data_dir, split, tokenizer, args.max_seq_length, labels,
                         max_rows, cache=True)


def model_settings(args: argparse.Namespace, source: str) -> Path:
    """Return the folder of a model, which may lack its weights."""
    return fetch_model(source, args.cache_dir or None, weights=False)


def check_layer_maps(
    args: argparse.Namespace, students: Mapping[str, Path], teacher: BertConfig
) -> None:
    """Raise a `UserError` for a student that cannot learn from the teacher's layers."""
    for source, chosen in zip(args.student_model, args.layer_map, strict=True):
        config = read_config(path := find_config(students[source]))
        if isinstance(config, RecurrentConfig):
            raise UserError(f"{path}: a {config.model_type} has no attention scores and no states"
                            " to learn layer by layer; expected --pred_distill without --joint")
        check_layers(teacher, config, chosen, attention=not args.no_attention_loss)


def check_copied(students: Mapping[str, Path], teacher: Teacher) -> None:
    """Raise a `UserError` where there are no word embeddings to copy, or nobody to take them."""
    if not teacher.is_ours:
        raise UserError(f"--copy_embeddings: of {teacher.source} only the logits are read; expected"
                        " a BERT or a relative of it as the first teacher")
    if not any(isinstance(read_config(find_config(folder)), RecurrentConfig)
               and not has_weights(folder) for folder in students.values()):
        raise UserError("--copy_embeddings: no student is a bilstm or bigru without weights;"
                        " expected one, or a call without the flag")


class Shared(NamedTuple):
    """What all students of a call learn from.

    teacher: frozen, for those who learn from its layers; else None.
    id2label: the names of the outputs.
    tokenizer: the students'; `train_rows` and `dev`, the rows of each dev set, are encoded by it.
    teacher_logits: computes those of the training rows [rows, labels], once.
    label_mask: [rows], whether a training row's label counts; None: all do.
    """

    task: Task
    teacher: nn.Module | None
    teacher_size: str
    id2label: dict[int, str]
    tokenizer: AnyTokenizer
    train_rows: Features
    dev: dict[str, Features]
    teacher_logits: Callable[[], Tensor]
    label_mask: Tensor | None
    device: torch.device
    dtype: torch.dtype | None


def load_shared(args: argparse.Namespace, task: Task, device: torch.device,
                dtype: torch.dtype | None) -> Shared:
    """Read the rows, then load the fine-tuned teachers strictly."""
    if args.teacher_model is None:
        raise UserError("--teacher_model is missing; expected a fine-tuned teacher's folder")
    if task.is_regression and (args.temperature_squared or args.temperature != 1):
        raise UserError(f"--temperature: {task.name} is a regression, whose loss has none; expected"
                        " a task with classes")
    splits = evaluation_splits(task, args.data_dir)
    teachers = [Teacher.read(source, model_settings(args, source), task, args.max_seq_length,
                             args.do_lower_case or None, needs_layers=uses_layers(args))
                for source in as_list(args.teacher_model)]
    students = {source: model_settings(args, source) for source in args.student_model}
    if uses_layers(args):
        check_layer_maps(args, students, teachers[0].config)
    if args.copy_embeddings:
        check_copied(students, teachers[0])
    tokenizer = choose_tokenizer(students, teachers[0], args.do_lower_case or None,
                                 same_pieces=uses_layers(args) or args.copy_embeddings)
    labels, names = choose_labels(students, teachers[0], task, same_order=uses_layers(args))
    split = "aug" if args.aug_train else "train"
    train_rows = load_rows(args, task, split, tokenizer, labels, args.max_train_rows)
    dev = {split: load_rows(args, task, split, tokenizer, labels) for split in splits}
    label_mask = None
    if args.hard_labels == "original":
        label_mask = torch.tensor(original_rows(task, args.data_dir, args.max_train_rows))
    for teacher in teachers:
        teacher.load(fetch_model(teacher.source, args.cache_dir or None), task, device, dtype,
                     pack=not args.compile)

    def logits_of(teacher: Teacher) -> Tensor:
        if not teacher.is_ours:
            examples = iterate_examples(task, args.data_dir, split, args.max_train_rows or None)
            return predict_examples(
                teacher.model, teacher.tokenizer, examples, len(train_rows), args.max_seq_length,
                args.eval_batch_size, device, teacher.source)
        rows = train_rows if teacher.tokenizer is tokenizer else load_rows(
            args, task, split, teacher.tokenizer, labels, args.max_train_rows)
        return predict_logits(teacher.model, rows, device, args.eval_batch_size, dtype)

    @functools.cache
    def teacher_logits() -> Tensor:
        return mean_logits([in_order(logits_of(teacher), teacher.labels, labels)
                            for teacher in teachers],
                           args.teacher_weights or [1.0] * len(teachers), args.temperature)

    return Shared(task, teachers[0].model if uses_layers(args) else None,
                  " ".join(teacher.size for teacher in teachers), names, tokenizer, train_rows, dev,
                  teacher_logits, label_mask, device, dtype)


def load_student(args: argparse.Namespace, shared: Shared, source: str) -> nn.Module:
    """Load a student, whose outputs take the teacher's label names."""
    teacher, task = shared.teacher, shared.task
    # A general student has no classifier yet; the prediction stage trains it.
    folder = fetch_model(source, args.cache_dir or None)
    student_class = classifier_class(read_config(find_config(folder)))
    if student_class is RecurrentClassifier and not has_weights(folder):
        student = student_class.from_scratch(
            folder, shared.tokenizer, num_labels=task.num_labels)
        if args.copy_embeddings:
            first = as_list(args.teacher_model)[0]
            copy_embeddings(student, fetch_model(first, args.cache_dir or None))
    else:
        student = student_class.from_pretrained(
            folder, new_head=True, num_labels=task.num_labels,
            fit_size=teacher.config.hidden_size if uses_layers(args) else None)
    student.config.id2label = dict(shared.id2label)
    student.config.other["finetuning_task"] = task.name  # as Hugging Face's run_glue
    student.config.classifier_relu |= args.match_original
    student.config.check_length(args.max_seq_length, "the model")
    return student


def make_trainer(
    args: argparse.Namespace, shared: Shared, number: int, total_steps: int
) -> StudentTrainer:
    """Make student `number` with its stage's loss, exactly as if it were the only one."""
    set_seed(args.seed)
    student = load_student(args, shared, args.student_model[number]).to(shared.device)
    loss = prediction = PredictionLoss(
        student, args.temperature, args.match_original, args.hard_label_weight,
        args.soft_label_weight, args.temperature_squared) if args.pred_distill else None
    if uses_layers(args):
        layer_map = map_layers(shared.teacher.config.num_hidden_layers,
                               student.config.num_hidden_layers, args.layer_map[number])
        loss = IntermediateLoss(
            student, layer_map, args.match_original,
            0.0 if args.no_attention_loss else args.attention_loss_weight,
            args.hidden_loss_weight, prediction, is_student=True)
    optimizer = BertAdam(
        param_groups(student, args.weight_decay), lr=args.learning_rate[number],
        schedule="warmup_linear" if args.pred_distill else "none",
        warmup=args.warmup_proportion, t_total=total_steps)
    return StudentTrainer(student, loss, optimizer, shared.device, shared.dtype)


def row_targets(args: argparse.Namespace, shared: Shared) -> dict[str, Tensor]:
    """Return what batches hold of each row beside its features, [rows, ...]."""
    targets = {}
    if not uses_layers(args):
        # The teacher is frozen: its logits of a row are computed once, not every epoch.
        targets["teacher_logits"] = (
            shared.teacher_logits() if args.soft_label_weight
            else torch.zeros(len(shared.train_rows), shared.task.num_labels))
    if shared.label_mask is not None:
        targets["label_mask"] = shared.label_mask
    return targets


def distil(args: argparse.Namespace, shared: Shared, folder: RunFolder,
           upload: Callable[[], None]) -> None:
    """Train the students of one batch size side by side, into the folders of `folder`."""
    # Students
    device, rows = shared.device, shared.train_rows
    steps_per_epoch = -(-len(rows) // args.train_batch_size)
    total_steps = training_steps(args.num_train_epochs, steps_per_epoch)
    micro_batch_size = -(-args.train_batch_size // args.gradient_accumulation_steps)
    trainers = [make_trainer(args, shared, number, total_steps)
                for number in range(len(args.student_model))]
    losses, teacher, layers = [trainer.loss for trainer in trainers], no_teacher, {}
    if uses_layers(args):
        teacher = IntermediateTeacher(shared.teacher if args.joint else shared.teacher.bert,
                                      (layer for loss in losses for layer in loss.score_layers))
        layers = {"layer_map": describe_layers(losses)}
    compiled = compile_models(args.compile, device, *losses,
                              *([teacher] if uses_layers(args) else []))

    # Output
    check_training_disk(trainers, folder.paths, models_written=3)
    folder.start(log_start(
        args, device, shared.dtype, compiled=compiled, task=shared.task.name, rows=len(rows),
        batch=args.train_batch_size, teacher=shared.teacher_size,
        students=" ".join(parameter_count(trainer.student) for trainer in trainers), **layers))
    outputs = [
        StudentOutput(trainer, path, shared.tokenizer,
                      Selection(shared.task) if args.pred_distill else None, shared.task,
                      tensorboard=args.tensorboard)
        for trainer, path in zip(trainers, folder.paths, strict=True)]

    # Steps: in the intermediate stage the newest student is kept, in the other the best on dev
    multiple = padding_multiple(device)
    collate = pad = padded_collate(
        rows, multiple, args.max_seq_length if args.match_original else None, args.max_seq_length)
    if targets := row_targets(args, shared):
        def collate(rows: Sequence[int]) -> Batch:
            return pad(rows) | {name: values[rows] for name, values in targets.items()}

    run = TrainingRun(
        outputs, lambda first: shuffled_passes(
            collate, rows.lengths, args.train_batch_size, micro_batch_size, args.seed, multiple,
            first),
        lambda epoch: steps_per_epoch, total_steps, report_every=args.eval_step,
        save_steps=args.save_steps, save_minutes=args.save_minutes,
        resume=folder.state == "resume")

    def evaluate(student: nn.Module) -> dict[str, dict[str, Any]]:
        return evaluate_splits(student, shared.dev, shared.task, device, args.eval_batch_size,
                               shared.dtype)

    for step in run.steps(teacher, shared.task.name):
        if run.reports():
            run.report(evaluate if args.pred_distill else None)
        if step.epoch_ends:
            for output in [] if args.pred_distill else outputs:
                output.save()
            upload()

    # Results
    for output in outputs:
        if args.pred_distill:
            output.save("last")
        output.finish({"task": shared.task.name, "rows": len(shared.dev["dev"]),
                       "train_rows": len(rows), "steps": total_steps})
    run.finish()


def setting_name(rate: float, batch_size: int) -> str:
    """Return the subfolder of one combination of a sweep, such as `lr1e-05_batch16`."""
    return f"lr{rate:g}_batch{batch_size}"


def sweep(args: argparse.Namespace, shared: Shared, folder: RunFolder) -> None:
    """Train every student with every rate and batch size; keep its best on dev.

    Those of one batch size share the teacher's logits and are trained side by side.
    """
    for source in args.student_model:
        load_student(args, shared, source)  # before anything is written: it may not fit
    folder.start(log_start(args, shared.device, shared.dtype, task=shared.task.name))
    distributed.barrier()
    for batch_size in args.train_batch_size:
        setting = copy.copy(args)
        setting.sweep, setting.data_url, setting.train_batch_size = False, "", batch_size
        setting.resume = folder.state == "resume"
        combinations = [(number, rate) for number in range(len(args.student_model))
                        for rate in args.learning_rate]
        setting.student_model = [args.student_model[number] for number, _ in combinations]
        setting.layer_map = [args.layer_map[number] for number, _ in combinations]
        setting.learning_rate = [rate for _, rate in combinations]
        setting.output_dir = [str(folder.paths[number] / setting_name(rate, batch_size))
                              for number, rate in combinations]
        subfolder = RunFolder.open(setting, setting.student_model)
        if subfolder.state != "finished":
            distil(setting, shared, subfolder, folder.upload)
    if distributed.is_main():
        for path in folder.paths:
            keep_best(path, shared.task.metrics[0], args.learning_rate, args.train_batch_size)


def keep_best(path: Path, metric: str, rates: list[float], batch_sizes: list[int]) -> None:
    """Copy the model of the best setting below `path` into it, and list all in its results."""
    settings = []
    for batch_size in batch_sizes:
        for rate in rates:
            name = setting_name(rate, batch_size)
            result = read_json(path / name / RESULTS_NAME)
            settings.append({
                "folder": name, "learning_rate": rate, "train_batch_size": batch_size,
                "metrics": result["best"], "last": result["last"]})
    scores = [setting["metrics"][metric] for setting in settings]
    scores = [-math.inf if score is None else score for score in scores]  # null: not a number
    chosen = settings[scores.index(max(scores))]["folder"]
    for file in sorted((path / chosen).iterdir()):
        if file.is_file() and file.name not in RECORDS:
            with atomic_path(path / file.name) as temporary:
                shutil.copyfile(file, temporary)
    write_results(path, {**read_json(path / chosen / RESULTS_NAME), "chosen": chosen,
                         "sweep": settings})
    logger.info("%s: the best of %d settings on dev is %s", path, len(settings), chosen)


def evaluate_only(args: argparse.Namespace, task: Task, device: torch.device,
                  dtype: torch.dtype | None) -> None:
    """Measure each student, PyTorch or ONNX, on splits of the task; write the results."""
    first, *others = evaluation_splits(task, args.data_dir, args.eval_split)
    for source, path in zip(args.student_model, args.output_dir, strict=True):
        _, tokenizer, labels = read_classifier(
            model_settings(args, source), task, args.max_seq_length, args.do_lower_case or None)
        rows = {split: load_rows(args, task, split, tokenizer, labels)
                for split in (first, *others)}
        student = load_classifier(
            fetch_model(source, args.cache_dir or None), task.num_labels, device)
        output_dir = prepare_output_dir(path, args.overwrite_output_dir, keep=True)
        save_arguments(output_dir, log_start(
            args, device, dtype, task=task.name, parameters=parameter_count(student)))
        freeze(student, dtype, device)
        results = evaluate_splits(student, rows, task, device, args.eval_batch_size, dtype)
        metrics, per_class = (by_split(results, name) for name in ("metrics", "per_class"))
        write_results(output_dir, {
            "task": task.name, "split": first, "model": source,
            "metrics": metrics[first], "all_metrics": metrics, "rows": len(rows[first]),
            "per_class": per_class,
            "selection": "none: this checkpoint as it is",
        })
        logger.info("%s (%d rows): %s", task.name, len(rows[first]), format_values(metrics))
        warn_of_chance(task, metrics, per_class)


def main(args: argparse.Namespace) -> None:
    # Settings
    check_args(args)
    task = task_of(args)
    apply_task_defaults(args, task)
    device = get_device(args.no_cuda)
    dtype = resolve_precision(args.precision, device)
    folder = RunFolder.open(args, args.student_model)

    # Evaluation or distillation
    if args.do_eval:
        evaluate_only(args, task, device, dtype)
    elif folder.state != "finished":
        shared = load_shared(args, task, device, dtype)
        if args.sweep:
            sweep(args, shared, folder)
        else:
            distil(args, shared, folder, folder.upload)
    folder.upload(strict=True)


if __name__ == "__main__":
    run_script(main, get_args_parser())
