"""Distil a fine-tuned teacher into a student on one GLUE task, or evaluate a student.

Task distillation has two stages, each a run of this script (paper, sections 3.2 and 4.2):
intermediate layers first (attention and hidden states), then, with --pred_distill, the logits.

Examples:
    python task_distill.py --teacher_model models/final_rte_teacher \
        --student_model models/distilled_tinybert_4l --data_dir data/glue_data/RTE \
        --task_name RTE --output_dir models/tmp_distilled_tinybert_4l_rte \
        --max_seq_length 128 --train_batch_size 32 --num_train_epochs 10 --aug_train
    python task_distill.py --pred_distill --teacher_model models/final_rte_teacher \
        --student_model models/tmp_distilled_tinybert_4l_rte --data_dir data/glue_data/RTE \
        --task_name RTE --output_dir models/distilled_tinybert_4l_rte --aug_train \
        --learning_rate 3e-5 --num_train_epochs 3 --eval_step 100
    python task_distill.py --do_eval --student_model models/distilled_tinybert_4l_rte \
        --data_dir data/glue_data/RTE --task_name RTE --output_dir tmp
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from transformer.checkpoint import fetch_model, save_pretrained
from transformer.distillation import (
    Batch,
    Collate,
    check_heads,
    freeze,
    intermediate_losses,
    map_layers,
    prediction_loss,
    train,
)
from transformer.evaluation import (
    Selection,
    evaluate_splits,
    predict_logits,
    write_results,
)
from transformer.file_utils import UserError, s3_address, upload_folder
from transformer.glue import (
    GLUE_TASKS,
    Features,
    GlueTask,
    batches,
    encode_examples,
    get_task,
    label_order,
    load_examples,
)
from transformer.modeling import TinyBertForSequenceClassification
from transformer.optimization import BertAdam, param_groups
from transformer.runtime import (
    JsonLog,
    RunningMean,
    add_training_arguments,
    autocast,
    check_numbers,
    get_device,
    log_start,
    parameter_count,
    prepare_output_dir,
    resolve_precision,
    run_script,
    save_arguments,
    set_seed,
    training_steps,
)
from transformer.tokenization import BertTokenizer

logger = logging.getLogger(__name__)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "task_distill.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data_dir", default=None, type=str, required=True, help="the task's folder of TSV files")
    add("--teacher_model", default=None, type=str,
        help="fine-tuned teacher: folder or URL; not needed with --do_eval")
    add("--student_model", default=None, type=str, required=True,
        help="student to start from or to evaluate: folder or URL")
    add("--task_name", default=None, type=str, required=True,
        help=f"any case, one of: {', '.join(GLUE_TASKS)}")
    add("--output_dir", default=None, type=str, required=True,
        help="folder for the student, its logs and results")
    add("--cache_dir", default="", type=str,
        help="folder for models given as URLs; empty: .cache/models")
    add("--max_seq_length", default=128, type=int,
        help="longest input in word pieces; not given: the task's (64 for single sentences)")
    add("--do_eval", action="store_true", help="only evaluate the student on the dev set")
    add("--do_lower_case", action="store_true",
        help="lower-case the text; without it the model's own setting holds")
    add("--train_batch_size", default=32, type=int, help="rows a step, over all micro-batches")
    add("--eval_batch_size", default=32, type=int, help="rows a batch on dev")
    add("--learning_rate", default=5e-5, type=float,
        help="intermediate stage: constant rate; prediction stage: peak of the schedule")
    add("--weight_decay", "--wd", default=1e-4, type=float,
        help="decoupled weight decay, per unit of learning rate")
    add("--num_train_epochs", default=3.0, type=float,
        help="passes over the rows; not given: the task's in the intermediate stage (20; CoLA 50;"
             " MNLI, QQP, QNLI 10)")
    add("--warmup_proportion", default=0.1, type=float,
        help="prediction stage: share of the steps over which the learning rate rises")
    add("--no_cuda", action="store_true", help="compute on the CPU")
    add("--seed", type=int, default=42, help="seed of every random choice")
    add("--gradient_accumulation_steps", type=int, default=1,
        help="micro-batches a step; the step's result does not depend on it")
    add("--aug_train", action="store_true",
        help="train on train_aug.tsv (data_augmentation.py writes it)")
    add("--eval_step", type=int, default=50,
        help="steps between log lines and, in the prediction stage, dev evaluations")
    add("--pred_distill", action="store_true", help="the prediction stage, on the logits")
    add("--data_url", type=str, default="", help="s3://bucket/prefix to upload output_dir to")
    add("--temperature", type=float, default=1.0, help="divides the logits of both models (t)")
    add("--max_train_rows", type=int, default=0, help="train on the first rows only; 0: all")
    add("--match_original", action="store_true",
        help="the original's losses: padding counts, soft cross-entropy divided by the number of"
             " labels, ReLU before the classifier")
    add_training_arguments(parser)
    return parser


def apply_task_defaults(args: argparse.Namespace, task: GlueTask) -> None:
    """Replace the flags that were not given by the task's own values (paper, section 4.2)."""
    if "max_seq_length" not in args.given:
        args.max_seq_length = task.max_seq_length
    if "num_train_epochs" not in args.given and not args.pred_distill:
        args.num_train_epochs = float(task.intermediate_epochs)


@dataclass
class IntermediateLoss:
    """Eq. 7-9 on a batch: attention scores, hidden states and embeddings, summed over layers."""

    student: nn.Module
    teacher: nn.Module
    match_original: bool

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        mask = batch["attention_mask"]
        inputs = (batch["input_ids"], batch["token_type_ids"], mask)
        with torch.no_grad():
            _, teacher_scores, teacher_hidden = self.teacher(*inputs)
        _, student_scores, student_hidden = self.student(*inputs, is_student=True)
        return intermediate_losses(
            student_scores, student_hidden, teacher_scores, teacher_hidden, mask,
            self.match_original)


@dataclass
class PredictionLoss:
    """Eq. 10 on a batch that brings its rows' teacher logits."""

    student: nn.Module
    temperature: float
    match_original: bool

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        inputs = (batch["input_ids"], batch["token_type_ids"], batch["attention_mask"])
        return {"cls_loss": prediction_loss(
            self.student(*inputs)[0], batch["teacher_logits"], self.temperature,
            self.match_original)}


def load_tokenizer(args: argparse.Namespace, model_dir: Path,
                   *models: nn.Module) -> BertTokenizer:
    """Load the vocabulary of `model_dir` and check that it and the rows' length fit the models."""
    tokenizer = BertTokenizer.from_pretrained(model_dir, args.do_lower_case or None)
    for model in models:
        model.config.check_vocabulary(len(tokenizer), model_dir)
        model.config.check_length(args.max_seq_length, "the model")
    return tokenizer


def load_features(args: argparse.Namespace, task: GlueTask, split: str, tokenizer: BertTokenizer,
                  labels: tuple[str, ...], max_rows: int = 0) -> Features:
    examples = load_examples(task, args.data_dir, split, max_rows or None)
    return encode_examples(examples, tokenizer, args.max_seq_length, labels, task.is_regression)


def load_models(
    args: argparse.Namespace, task: GlueTask
) -> tuple[nn.Module, nn.Module, BertTokenizer]:
    """Load the teacher strictly, and a student whose outputs take the teacher's label names."""
    if args.teacher_model is None:
        raise UserError("--teacher_model is missing; expected a fine-tuned teacher's folder")
    cache_dir = args.cache_dir or None
    teacher_dir = fetch_model(args.teacher_model, cache_dir)
    teacher = TinyBertForSequenceClassification.from_pretrained(
        teacher_dir, num_labels=task.num_labels)
    # A general student has no classifier yet; the prediction stage trains it.
    student = TinyBertForSequenceClassification.from_pretrained(
        fetch_model(args.student_model, cache_dir), new_head=True, num_labels=task.num_labels,
        fit_size=teacher.config.hidden_size)
    if not args.pred_distill:
        map_layers(teacher.config.num_hidden_layers, student.config.num_hidden_layers)
        check_heads(teacher.config.num_attention_heads, student.config.num_attention_heads)
    labels, own = (label_order(task, m.config.id2label) for m in (teacher, student))
    if own != labels and not student.config.id2label[0].startswith("LABEL_"):
        raise UserError(f"{args.student_model}: its labels are ordered {own},"
                        f" the teacher's {labels}")
    student.config.id2label = dict(teacher.config.id2label)
    student.config.classifier_relu |= args.match_original
    return freeze(teacher), student, load_tokenizer(args, teacher_dir, teacher, student)


def make_losses(
    args: argparse.Namespace, student: nn.Module, teacher: nn.Module, features: Features,
    device: torch.device, context: Callable[[], AbstractContextManager],
) -> tuple[Callable[[Batch], dict[str, Tensor]], Collate]:
    """Return the stage's loss, and what makes its batches out of row numbers."""
    pad_to = args.max_seq_length if args.match_original else None
    if not args.pred_distill:
        losses = IntermediateLoss(student, teacher, args.match_original)
        return losses, partial(features.collate, pad_to=pad_to)
    # The teacher is frozen: its answer to a row is computed once, not every epoch.
    teacher_logits = predict_logits(teacher, features, device, args.eval_batch_size, context)

    def make_batch(rows: Sequence[int]) -> Batch:
        return features.collate(rows, pad_to) | {"teacher_logits": teacher_logits[rows]}

    return PredictionLoss(student, args.temperature, args.match_original), make_batch


def evaluate_only(args: argparse.Namespace, task: GlueTask, device: torch.device,
                  dtype: torch.dtype | None) -> None:
    """Measure the student on each dev set of the task and write the results."""
    student_dir = fetch_model(args.student_model, args.cache_dir or None)
    student = TinyBertForSequenceClassification.from_pretrained(
        student_dir, num_labels=task.num_labels)
    tokenizer = load_tokenizer(args, student_dir, student)
    labels = label_order(task, student.config.id2label)
    dev = {split: load_features(args, task, split, tokenizer, labels) for split in task.dev_files}
    output_dir = prepare_output_dir(args.output_dir, args.overwrite_output_dir)
    save_arguments(output_dir, log_start(
        args, device, dtype, task=task.name, parameters=parameter_count(student)))
    student.to(device)
    metrics = evaluate_splits(student, dev, task, device, args.eval_batch_size,
                              lambda: autocast(device, dtype))
    write_results(output_dir, {
        "task": task.name, "split": "dev", "model": str(args.student_model),
        "metrics": metrics["dev"], "all_metrics": metrics, "rows": len(dev["dev"]),
        "selection": "none: this checkpoint as it is",
    })
    logger.info("%s (%d rows): %s", task.name, len(dev["dev"]), metrics)


def main(args: argparse.Namespace) -> None:
    # Settings
    check_numbers(args)
    task = get_task(args.task_name)
    apply_task_defaults(args, task)
    device = get_device(args.no_cuda)
    dtype = resolve_precision(args.precision, device)
    set_seed(args.seed)
    address = s3_address(args.data_url)
    if args.do_eval:
        evaluate_only(args, task, device, dtype)
        return

    # Models and data
    teacher, student, tokenizer = load_models(args, task)
    labels = label_order(task, teacher.config.id2label)
    features = load_features(args, task, "aug" if args.aug_train else "train", tokenizer, labels,
                             args.max_train_rows)
    dev = {split: load_features(args, task, split, tokenizer, labels) for split in task.dev_files}
    steps_per_epoch = -(-len(features) // args.train_batch_size)
    total_steps = training_steps(args.num_train_epochs, steps_per_epoch)

    # Output
    output_dir = prepare_output_dir(args.output_dir, args.overwrite_output_dir)
    save_arguments(output_dir, log_start(
        args, device, dtype, task=task.name, rows=len(features), batch=args.train_batch_size,
        teacher=parameter_count(teacher), student=parameter_count(student)))
    log = JsonLog(output_dir / "log.jsonl")
    teacher.to(device)
    student.to(device)

    def context():
        return autocast(device, dtype)

    # Distillation
    optimizer = BertAdam(
        param_groups(student, args.weight_decay), lr=args.learning_rate,
        schedule="warmup_linear" if args.pred_distill else "none",
        warmup=args.warmup_proportion, t_total=total_steps)
    losses, make_batch = make_losses(args, student, teacher, features, device, context)
    generator = torch.Generator().manual_seed(args.seed)
    epochs = ((make_batch, batches(features.lengths, args.train_batch_size, generator))
              for _ in count())
    means, selection, losses_at_end = RunningMean(), Selection(task), {}
    steps = islice(train(student, losses, epochs, optimizer, args.gradient_accumulation_steps,
                         device, context), total_steps)
    progress = tqdm(steps, desc=task.name, total=total_steps, unit="step", disable=None)
    for step, (step_losses, epoch_ends) in enumerate(progress, start=1):
        means.add(step_losses)
        if step % args.eval_step == 0 or step == total_steps:
            losses_at_end = means.read()
            record = {"step": step, "epoch": round(step / steps_per_epoch, 3),
                      "lr": optimizer.get_lr()[0], **losses_at_end}
            if args.pred_distill:
                metrics = evaluate_splits(
                    student, dev, task, device, args.eval_batch_size, context)
                record |= {"metrics": metrics["dev"], "all_metrics": metrics}
                if selection.update(metrics):
                    save_pretrained(student, output_dir, tokenizer)
            log.write(record)
            logger.info("step %d/%d  %s", step, total_steps,
                        "  ".join(f"{k} {v}" for k, v in record.items() if k != "all_metrics"))
        if not args.pred_distill and (epoch_ends or step == total_steps):
            save_pretrained(student, output_dir, tokenizer)

    # Results
    result = {"task": task.name, "rows": len(dev["dev"]), "train_rows": len(features),
              "steps": total_steps, "losses": losses_at_end}
    if args.pred_distill:
        save_pretrained(student, output_dir / "last", tokenizer)
        result |= selection.results()
        logger.info("%s on dev: best %s, last %s", task.name, result["best"], result["last"])
    write_results(output_dir, result)
    if address:
        upload_folder(output_dir, *address)


if __name__ == "__main__":
    run_script(main, get_args_parser())
