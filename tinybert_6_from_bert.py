"""Make a student out of a BERT by copying every second layer (smart initialisation).

The student keeps the teacher's width, so embeddings, pooler and heads are copied as well. By
default the layers are those that distillation will aim at: 2, 4, ..., 12 of 12 layers for a
student of 6.

Examples:
    python tinybert_6_from_bert.py
    python tinybert_6_from_bert.py --bert_model models/final_rte_teacher \
        --output_dir models/tinybert_6l_smart_init_direct_rte
"""

import argparse
import logging
import re
from pathlib import Path

import torch

from transformer import families
from transformer.checkpoint import (
    dtype_name,
    load_state,
    load_weights,
    stored_state,
    write_tensors,
)
from transformer.config import BertConfig, find_config
from transformer.distillation import map_layers
from transformer.file_utils import CONFIG_NAME, WEIGHTS_NAME, UserError, atomic_path, write_json
from transformer.hub import fetch_model
from transformer.modeling import BertModel
from transformer.run_folder import prepare_output_dir
from transformer.runtime import run_script
from transformer.tokenization import load_tokenizer

logger = logging.getLogger(__name__)

# The models of the full reproduction: which BERT becomes which student.
STUDENT_OF = {
    "bert-base-uncased": "tinybert_6l_smart_init_direct_base",
    "final_rte_teacher": "tinybert_6l_smart_init_direct_rte",
    "final_cola_teacher": "tinybert_6l_smart_init_direct_cola",
    "final_sst2_teacher": "tinybert_6l_smart_init_direct_sst2",
    "final_mrpc_teacher": "tinybert_6l_smart_init_direct_mrpc",
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "tinybert_6_from_bert.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--bert_model", default=None,
                        help="model to copy from: folder, URL or hub id; without it, the base model"
                             " and the four teachers of the full run, in models_dir")
    parser.add_argument("--output_dir", default=None, help="folder to write the student to")
    parser.add_argument("--models_dir", default="models",
                        help="where the full run's models are, without --bert_model")
    parser.add_argument("--num_layers", type=int, default=6, help="layers of the student")
    parser.add_argument("--keep_layers", default=None,
                        help="numbers of the layers to copy, from 1, such as 1,3,5,7,9,11;"
                             " without it, those that distillation aims at")
    parser.add_argument("--overwrite_output_dir", action="store_true",
                        help="write into an output folder that is not empty")
    return parser


def layers_to_keep(keep_layers: str | None, teacher_layers: int, num_layers: int) -> list[int]:
    """Return which of the teacher's layers, counted from 1, become the student's."""
    if keep_layers is None:
        return [index + 1 for index in map_layers(teacher_layers, num_layers)[0]]
    try:
        kept = [int(number) for number in keep_layers.split(",")]
    except ValueError:
        raise UserError(f"--keep_layers {keep_layers!r}; expected numbers such as 2,4,6") from None
    if not all(1 <= number <= teacher_layers for number in kept):
        raise UserError(f"--keep_layers {keep_layers}; the model has layers 1 to {teacher_layers}")
    return kept


def copy_layers(state: dict[str, torch.Tensor], kept: list[int]) -> dict[str, torch.Tensor]:
    """Return the weights of a student whose layers are those in `kept`, counted from 1."""
    student = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"bert\.encoder\.layer\.(\d+)\.(.+)", key)
        if match is None:
            student[key] = tensor
            continue
        for place, number in enumerate(kept):
            if int(match[1]) == number - 1:
                student[f"bert.encoder.layer.{place}.{match[2]}"] = tensor.clone()
    return student


def make_student(bert_model: Path, output_dir: Path, num_layers: int, keep_layers: str | None,
                 overwrite: bool) -> None:
    """Write the student of one model: weights, config, vocabulary."""
    config = BertConfig.from_json_file(find_config(bert_model))
    config.check_own_layers(bert_model, "there is none to choose")
    kept = layers_to_keep(keep_layers, config.num_hidden_layers, num_layers)
    state = load_state(bert_model)
    # Strictly, so that nothing is missing and nothing left over.
    load_weights(BertModel(config, **BertModel.stored_sizes(state)), state, bert_model)
    tokenizer = load_tokenizer(bert_model)
    output_dir = prepare_output_dir(output_dir, overwrite, [bert_model])
    config.keep_layers([number - 1 for number in kept])
    architecture = ("BertForSequenceClassification" if "classifier.weight" in state
                    else "BertForMaskedLM" if "cls.predictions.bias" in state else "BertModel")
    write_json(output_dir / CONFIG_NAME, {
        "architectures": [families.architecture(config.model_type, architecture)],
        **config.to_dict(),
        "dtype": dtype_name(next(iter(state.values())))})
    tokenizer.save_vocabulary(output_dir, config.max_position_embeddings)
    with atomic_path(output_dir / WEIGHTS_NAME) as temporary:
        write_tensors(stored_state(copy_layers(state, kept), config), temporary)
    logger.info("%s: layers %s of %s", output_dir, ", ".join(map(str, kept)), bert_model)


def check_args(args: argparse.Namespace) -> None:
    """Raise a `UserError` for flags that do not go together."""
    if (args.bert_model is None) != (args.output_dir is None):
        raise UserError("--bert_model and --output_dir belong together; one of them is missing")
    kept = args.keep_layers and len(args.keep_layers.split(","))
    if kept and "num_layers" in args.given and kept != args.num_layers:
        raise UserError(f"--keep_layers {args.keep_layers} and --num_layers {args.num_layers}"
                        " contradict each other; one of them is enough")


def main(args: argparse.Namespace) -> None:
    check_args(args)
    if args.bert_model is None:
        models = Path(args.models_dir)
        pairs = [(models / source, models / target) for source, target in STUDENT_OF.items()]
        absent = [str(source) for source, _ in pairs if not source.is_dir()]
        if absent:
            raise UserError(f"{', '.join(absent)}: no such folder; expected the models of the"
                            " full run (or give --bert_model)")
    else:
        pairs = [(fetch_model(args.bert_model), Path(args.output_dir))]
    for source, target in pairs:
        make_student(source, target, args.num_layers, args.keep_layers, args.overwrite_output_dir)


if __name__ == "__main__":
    run_script(main, get_args_parser())
