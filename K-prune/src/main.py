"""Prune a fine-tuned BERT, one of its relatives or a student of ours with K-prune.

The pruned model is written as a model directory like any other, which task_distill.py --do_eval,
further distillation, quantize.py and predict.py take; kprune.json beside it says what was removed
and what that did to the score and the operations (latency: benchmarks/inference.py).

Example:
    cd K-prune
    python src/main.py --model_name ../models/distilled_tinybert_4l_sst2 \
        --ckpt_dir ../models/distilled_tinybert_4l_sst2 --task_name sst2 \
        --data_dir ../data/glue_data/SST-2 --output_dir ../models/kprune_tinybert_4l_sst2 \
        --constraint 0.1 --num_tokens 100000 --lam_pred 1.0 --lam_rep 2.5e-4 --mu 64 --T 2 \
        --sublayerwise_tuning

For data of your own --data_dir is their folder or file, and --task_name is left out.
"""

import argparse
import copy
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from dataset.sample import draw_sample, sample_batches
from dataset.tasks import default_length, find, load_data, model_arguments
from prune import Pruned, check_constraint, check_share, encoder_flops, kprune
from utils.checkpoint import load_model, read_config

from transformer.checkpoint import save_pretrained
from transformer.config import BertConfig, find_config
from transformer.families import FAMILIES
from transformer.file_utils import UserError, has_vocabulary, write_json
from transformer.hub import fetch_model
from transformer.inference import match_labels, note_task
from transformer.modeling import freeze
from transformer.own_tasks import add_data_arguments, save_task
from transformer.run_folder import check_output_dir, prepare_output_dir, save_arguments
from transformer.runtime import get_device, log_start, run_script, set_seed
from transformer.tokenization import AnyTokenizer, load_tokenizer

logger = logging.getLogger(__name__)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "main.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model_name", type=str, required=True,
        help="folder, URL or hub id (ORG/NAME) with the vocabulary, or the published model that"
             " ckpt_dir was made from, such as bert-base-uncased: its kind and case are checked")
    add_data_arguments(parser, required=False)
    add("--ckpt_dir", type=str, required=True, help="fine-tuned model: folder, URL or hub id")
    add("--exp_name", type=str, default="test",
        help="name of the experiment; without --output_dir the folder is outputs/NAME")
    add("--gpu", type=int, default=0, help="number of the GPU to use, from 0")
    add("--seed", type=int, default=0, help="seed of the sample's rows")
    add("--num_tokens", type=int, default=100000, help="word pieces in the sample")
    add("--constraint", type=float, required=True,
        help="share of the operations (FLOPs) of all heads and neurons to remove, such as 0.1")
    add("--lam_pred", type=float, default=1.0, help="weight of predictive knowledge")
    add("--lam_rep", type=float, default=1e-5, help="weight of representational knowledge")
    add("--mu", type=float, default=64.0, help="factor on the scores of attention heads")
    add("--T", type=float, default=2.0, help="temperature of the softmax")
    add("--sublayerwise_tuning", action="store_true",
        help="refit each output projection by least squares")
    add("--output_dir", type=str, default=None,
        help="folder for the pruned model; not given: outputs/ and --exp_name")
    add("--no_cuda", action="store_true", help="compute on the CPU")
    add("--max_seq_length", type=int, default=None,
        help="longest input in word pieces; not given: the task's (64 for single sentences, 128"
             " for pairs, 384 for SQuAD)")
    add("--overwrite_output_dir", action="store_true",
        help="write into an output folder that is not empty")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise a `UserError` for a value that makes no sense."""
    check_share(args.constraint)
    if args.lam_pred == args.lam_rep == 0:
        raise UserError("--lam_pred 0 --lam_rep 0: all scores would be 0; expected one of the two"
                        " above 0")
    if not 0 < args.T < math.inf:
        raise UserError(f"--T {args.T}; expected a temperature above 0")
    if args.output_dir is None:
        args.output_dir = str(Path("outputs") / args.exp_name)


def choose_tokenizer(args: argparse.Namespace, folder: Path) -> AnyTokenizer:
    """Load the vocabulary of --model_name where that is a model, else that of --ckpt_dir's folder.

    Raises:
        UserError: the checkpoint is of another kind, or has another vocabulary or lower-casing.
    """
    name = args.model_name.lower()
    if "/" not in name and not Path(args.model_name).is_dir():
        kinds = [kind for kind in sorted(FAMILIES, key=len, reverse=True) if kind in name]
        if [*kinds, "bert"][0] != BertConfig.from_json_file(find_config(folder)).family:
            raise UserError(f"--model_name {args.model_name}: neither a folder with the vocabulary"
                            f" nor the published name of what {folder} was made from")
        return load_tokenizer(folder, "uncased" in name if "cased" in name else None)
    tokenizer = load_tokenizer(fetch_model(args.model_name, weights=False))
    if has_vocabulary(folder):
        own = load_tokenizer(folder)
        if (own.vocab, own.settings) != (tokenizer.vocab, tokenizer.settings):
            raise UserError(f"--model_name {args.model_name}: another vocabulary or lower-casing"
                            f" than --ckpt_dir {folder}; expected the same")
    return tokenizer


def figures(
    model: nn.Module, metrics: dict[str, dict[str, float]], flops: float
) -> dict[str, Any]:
    """Return what is printed and saved of a model, before or after."""
    return {"metrics": metrics["dev"], "all_metrics": metrics, "flops": round(flops),
            "parameters": model.parameter_total}


def report(before: dict[str, Any], after: dict[str, Any], pruned: Pruned) -> None:
    """Print the figures of both models side by side, and what survived in each layer."""
    for split, metrics in before["all_metrics"].items():
        for name, value in metrics.items():
            logger.info("%s %s: %.4f before, %.4f after", split, name, value,
                        after["all_metrics"][split][name])
    for name, unit in (("flops", "MFLOPs a row"), ("parameters", "million parameters")):
        logger.info("%.3f %s before, %.3f after (%.1f %% less)", before[name] / 1e6, unit,
                    after[name] / 1e6, 100 * (1 - after[name] / before[name]))
    config = pruned.model.config
    for layer, (heads, neurons) in enumerate(zip(config.heads, config.neurons, strict=True)):
        logger.info("layer %d: %d of %d heads, %d of %d neurons", layer + 1, heads,
                    pruned.head_masks.shape[1], neurons, pruned.neuron_masks.shape[1])


def main(args: argparse.Namespace) -> None:
    # Settings
    check_args(args)
    task = find(args)
    if args.max_seq_length is None:
        args.max_seq_length = default_length(task)
    inputs = (args.ckpt_dir, args.model_name, args.data_dir)
    check_output_dir(args.output_dir, args.overwrite_output_dir, inputs)
    device = get_device(args.no_cuda, args.gpu)
    set_seed(args.seed)

    # Data and model
    folder = fetch_model(args.ckpt_dir)
    config = read_config(folder)
    is_squad = isinstance(task, str)
    labels = () if is_squad else match_labels(task, config, find_config(folder))
    tokenizer = choose_tokenizer(args, folder)
    config.check_vocabulary(len(tokenizer), args.model_name)
    config.check_length(args.max_seq_length, args.ckpt_dir)
    data = load_data(task, args.data_dir, tokenizer, args.max_seq_length, labels, device)
    model_class, arguments = model_arguments(task)
    model = load_model(model_class, folder, **arguments).to(device)
    if not is_squad:
        note_task(model.config, task, labels)
    sample = draw_sample(data.train, args.num_tokens, args.seed)
    seq_len = float(data.train.lengths.mean())
    check_constraint(args.constraint, model.config, seq_len)

    # Before
    output_dir = prepare_output_dir(args.output_dir, args.overwrite_output_dir, inputs)
    start = log_start(
        args, device, None, task=task if is_squad else task.name, sample_rows=len(sample),
        sample_tokens=int(sample.lengths.sum()), mean_length=round(seq_len, 2))
    save_arguments(output_dir, start)
    freeze(model)
    score_before = data.score(model)
    logger.info("before: %s", score_before)

    # Pruning
    began = time.perf_counter()
    pruned = kprune(
        model, sample_batches(sample), constraint=args.constraint, seq_len=seq_len,
        lam_pred=args.lam_pred, lam_rep=args.lam_rep, mu=args.mu, T=args.T,
        sublayerwise_tuning=args.sublayerwise_tuning)
    seconds = time.perf_counter() - began
    logger.info("pruned in %.1f s", seconds)

    # After
    smaller = freeze(copy.deepcopy(pruned.model))
    before = figures(model, score_before, encoder_flops(model.config, seq_len))
    after = figures(smaller, data.score(smaller), pruned.flops_after)
    report(before, after, pruned)

    # Results
    if not is_squad:
        save_task(task, output_dir)
    save_pretrained(pruned.model, output_dir, tokenizer)
    write_json(output_dir / "kprune.json", {
        "task": task if is_squad else task.name, "model": args.ckpt_dir, "exp_name": args.exp_name,
        "constraint": args.constraint, "flops_removed": 1 - after["flops"] / before["flops"],
        "seq_len": seq_len, "sample_rows": len(sample),
        "sample_tokens": int(sample.lengths.sum()), "seconds": round(seconds, 2),
        "before": before, "after": after,
        "heads_per_layer": pruned.model.config.heads,
        "neurons_per_layer": pruned.model.config.neurons,
    })
    logger.info("written to %s", output_dir)


if __name__ == "__main__":
    run_script(main, get_args_parser())
