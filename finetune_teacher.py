"""Fine-tune a BERT on one task: a teacher, or a student without distillation.

The model is measured on the dev set before the first step, and the best dev checkpoint is kept,
so fine-tuning a teacher again can only improve it.

Examples:
    python finetune_teacher.py --task_name RTE --data_dir data/glue_data/RTE \
        --bert_model models/bert-base-uncased-rte --output_dir models/final_rte_teacher \
        --num_train_epochs 5 --train_batch_size 32 --learning_rate 2e-5
    python finetune_teacher.py --data_dir data/mine --bert_model models/bert-base-uncased \
        --new_classifier --output_dir models/teacher_mine
"""

import argparse
import logging
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from transformer.batching import Batch, padded_collate, padding_multiple, shuffled_passes
from transformer.config import find_config
from transformer.distillation import no_teacher
from transformer.evaluation import Selection, evaluate_splits, evaluation_splits
from transformer.features import load_features
from transformer.hub import fetch_model
from transformer.inference import match_labels, note_task
from transformer.modeling import SequenceClassifier, model_inputs, scratch_config
from transformer.optimization import BertAdam, param_groups
from transformer.own_tasks import add_data_arguments, task_of
from transformer.recurrent import classifier_class, read_config
from transformer.run import StudentOutput, TrainingRun, check_training_disk
from transformer.run_folder import RunFolder
from transformer.runtime import (
    add_training_arguments,
    compile_models,
    get_device,
    log_start,
    parameter_count,
    resolve_precision,
    run_script,
    set_seed,
)
from transformer.tasks import Task
from transformer.tokenization import AnyTokenizer, load_tokenizer
from transformer.training import StudentTrainer

logger = logging.getLogger(__name__)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "finetune_teacher.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_data_arguments(parser)
    add("--bert_model", required=True, help="model to start from: folder, URL or hub id")
    add("--output_dir", required=True, help="folder to write the model to")
    add("--max_seq_length", type=int, default=128,
        help="longest input in word pieces; longer ones are cut; not given: 128, or what an own"
             " task's task.json says")
    add("--train_batch_size", type=int, default=32, help="rows a step")
    add("--learning_rate", type=float, default=2e-5, help="peak learning rate")
    add("--num_train_epochs", type=float, default=3.0,
        help="passes over the rows; 0 only measures")
    add("--max_train_rows", type=int, default=0, help="train on the first rows only; 0: all")
    add("--aug_train", action="store_true",
        help="train on train_aug.tsv (data_augmentation.py writes it)")
    add("--new_classifier", action="store_true",
        help="fresh classifier: bert_model has none, or another task's")
    add("--from_scratch", action="store_true",
        help="random weights in the shape of bert_model's config.json")
    add("--vocab_dir", default=None,
        help="folder, URL or hub id of a model whose vocabulary to use; without it, bert_model's")
    add_training_arguments(parser, weight_decay=0.01)
    return parser


def read_settings(
    args: argparse.Namespace, task: Task
) -> tuple[AnyTokenizer, tuple[str, ...]]:
    """Read the vocabulary, and the labels in the order of the outputs, before any weights.

    Raises:
        UserError: vocabulary, labels or the rows' length do not fit the model.
    """
    folder = fetch_model(args.bert_model, weights=False)
    path = find_config(folder)
    config, labels = read_config(path), task.labels
    if not (args.from_scratch or args.new_classifier):
        labels = match_labels(task, config, path)
    tokenizer = load_tokenizer(
        fetch_model(args.vocab_dir or args.bert_model, weights=False), args.do_lower_case or None)
    if args.from_scratch:
        config = scratch_config(folder, tokenizer, type(config))
    config.check_vocabulary(len(tokenizer), args.vocab_dir or args.bert_model,
                            folder if args.vocab_dir else None)
    config.check_length(args.max_seq_length, args.bert_model)
    return tokenizer, labels


def load_model(
    args: argparse.Namespace, task: Task, labels: tuple[str, ...], tokenizer: AnyTokenizer
) -> SequenceClassifier:
    """Load, or with --from_scratch make, the classifier; its outputs get the task's label names."""
    folder = fetch_model(args.bert_model, weights=not args.from_scratch)
    model_class = classifier_class(read_config(find_config(folder)))
    if args.from_scratch:
        model = model_class.from_scratch(folder, tokenizer, num_labels=task.num_labels)
    elif args.new_classifier:
        model = model_class.from_pretrained(folder, new_head=True)
        model.renew_classifier(task.num_labels)
    else:
        model = model_class.from_pretrained(folder, num_labels=task.num_labels)
    if not task.is_regression and (args.from_scratch or args.new_classifier):
        model.config.set_labels(task.labels)
    model.config.other["finetuning_task"] = task.name  # as Hugging Face's run_glue
    note_task(model.config, task, labels)
    return model


class LabelLoss(nn.Module):
    """Cross-entropy against the labels; for regression the squared error."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, teacher: None) -> dict[str, Tensor]:
        logits = self.model(*model_inputs(batch), score_layers=())[0].float()
        if logits.shape[-1] == 1:
            return {"loss": F.mse_loss(logits.squeeze(-1), batch["labels"])}
        return {"loss": F.cross_entropy(logits, batch["labels"])}


def main(args: argparse.Namespace) -> None:
    # Settings
    task = task_of(args)
    if not task.is_glue and "max_seq_length" not in args.given:
        args.max_seq_length = task.max_seq_length
    device = get_device(args.no_cuda)
    folder = RunFolder.open(args, [args.bert_model])
    dtype = resolve_precision(args.precision, device)
    if folder.state == "finished":
        return
    splits = evaluation_splits(task, args.data_dir)
    set_seed(args.seed)

    # Data and model
    tokenizer, labels = read_settings(args, task)
    data = (tokenizer, args.max_seq_length, labels)
    train_rows = load_features(task, args.data_dir, "aug" if args.aug_train else "train", *data,
                               args.max_train_rows, cache=True)
    dev = {split: load_features(task, args.data_dir, split, *data, cache=True)
           for split in splits}
    model = load_model(args, task, labels, tokenizer).to(device)
    steps_per_epoch = -(-len(train_rows) // args.train_batch_size)
    total_steps = round(args.num_train_epochs * steps_per_epoch)
    loss = LabelLoss(model)
    optimizer = BertAdam(
        param_groups(model, args.weight_decay), lr=args.learning_rate,
        warmup=args.warmup_proportion, t_total=max(1, total_steps))
    compiled = compile_models(args.compile, device, loss)
    trainer = StudentTrainer(model, loss, optimizer, device, dtype)

    # Output
    check_training_disk([trainer], folder.paths, models_written=3)
    folder.start(log_start(
        args, device, dtype, compiled=compiled, task=task.name, rows=len(train_rows),
        parameters=parameter_count(model)))
    output = StudentOutput(trainer, folder.paths[0], tokenizer, Selection(task), task,
                           tensorboard=args.tensorboard)

    # Training: measured before the first step and after each pass; the best checkpoint stays
    multiple = padding_multiple(device)
    collate = padded_collate(train_rows, multiple, limit=args.max_seq_length)
    run = TrainingRun(
        [output], lambda first: shuffled_passes(
            collate, train_rows.lengths, args.train_batch_size, args.train_batch_size, args.seed,
            multiple, first),
        lambda epoch: steps_per_epoch, total_steps, report_every=steps_per_epoch,
        save_steps=args.save_steps, save_minutes=args.save_minutes,
        resume=folder.state == "resume")

    def evaluate(model: nn.Module) -> dict[str, dict[str, Any]]:
        return evaluate_splits(model, dev, task, device, args.eval_batch_size, dtype)

    if run.step == 0:
        run.report(evaluate)
    for _ in run.steps(no_teacher, task.name):
        if run.reports():
            run.report(evaluate)

    # Results
    output.finish({"task": task.name, "before": output.selection.first["dev"],
                   "rows": len(dev["dev"]), "train_rows": len(train_rows)})
    run.finish()


if __name__ == "__main__":
    run_script(main, get_args_parser())
