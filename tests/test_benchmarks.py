"""The benchmarks: the baseline does the same work as this project, and the tables are whole."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    GOLDEN,
    NEUTRAL,
    error_line,
    make_glue,
    random_batch,
    read_json,
    run,
    tiny_config,
)

from benchmarks import plain
from benchmarks import run as benchmark
from benchmarks.flops import distillation_flops, forward_flops
from benchmarks.measure import ROOT
from benchmarks.stages import STAGES, Setup, spread
from transformer.distillation import intermediate_losses, soft_cross_entropy
from transformer.file_utils import UserError
from transformer.modeling import (
    BertConfig,
    TinyBertForPreTraining,
    TinyBertForSequenceClassification,
)
from transformer.optimization import BertAdam, param_groups
from transformer.tokenization import BertTokenizer

# ------------------------------------------------------------------ the same models

PLAIN_NAMES = {  # in this order
    "embeddings.word_embeddings": "words", "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "segments", "embeddings.LayerNorm": "norm",
    "encoder.layer": "layers", "attention.self.": "", "attention.output.dense": "output",
    "attention.output.LayerNorm": "output_norm", "intermediate.dense": "up",
    "output.dense": "down", "output.LayerNorm": "down_norm", "pooler.dense": "pooler",
    "fit_dense": "bert.fit", "cls.predictions.transform.dense": "transform",
    "cls.predictions.transform.LayerNorm": "norm", "cls.predictions.bias": "bias",
}


def copy_weights(ours: torch.nn.Module, baseline: torch.nn.Module) -> None:
    """Load our weights into a plain model; every one of its parameters must be among them."""
    state = {}
    for name, tensor in ours.state_dict().items():
        for old, new in PLAIN_NAMES.items():
            name = name.replace(old, new)
        if "decoder" not in name:  # the word embeddings once more
            state[name] = tensor
    if isinstance(baseline, plain.PlainBert):
        state = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
    baseline.load_state_dict(state)


def classifiers(layers: int, width: int, teacher_width: int):
    """Return our classifier and the plain one, with the same weights."""
    torch.manual_seed(width)
    config = tiny_config(
        num_hidden_layers=layers, hidden_size=width, num_labels=3, classifier_relu=True)
    ours = TinyBertForSequenceClassification(config, fit_size=teacher_width)
    baseline = plain.PlainClassifier(config, 3, teacher_width)
    copy_weights(ours, baseline)
    return ours, baseline


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    names = ("input_ids", "token_type_ids", "attention_mask")
    tensors = dict(zip(names, random_batch(rows=5, length=12), strict=True))
    return {**tensors, "labels": torch.tensor([0, 2, 1, 1, 0])}


def test_plain_task_losses_are_ours_with_match_original(batch):
    inputs = plain.inputs_of(batch)
    student, plain_student = classifiers(2, 16, 24)
    teacher, plain_teacher = classifiers(4, 24, 24)
    plain_teacher.bert.fit = None  # only a student's hidden states are mapped
    logits, scores, hidden = student(*inputs, is_student=True)
    teacher_logits, teacher_scores, teacher_hidden = teacher(*inputs)
    ours = intermediate_losses(scores, hidden, teacher_scores, teacher_hidden,
                               batch["attention_mask"], match_original=True)
    prediction = soft_cross_entropy(logits, teacher_logits, match_original=True)
    optimizer = plain.PlainAdam(plain_student, rate=0.0)
    losses = [loss for stage in (False, True) for loss in plain.task_step(
        plain_student, plain_teacher, optimizer, batch, prediction=stage)]
    expected = [ours["att_loss"].item(), ours["rep_loss"].item(), prediction.item()]
    assert losses == pytest.approx(expected, abs=1e-5) and min(expected) > 0.01


def test_plain_general_steps_move_the_weights_as_ours_do(batch):
    inputs = plain.inputs_of(batch)
    teacher, plain_teacher = classifiers(4, 24, 24)
    plain_teacher.bert.fit = None
    torch.manual_seed(3)
    ours = TinyBertForPreTraining(tiny_config(num_hidden_layers=2), fit_size=24)
    baseline = plain.PlainBert(ours.config, 24)
    copy_weights(ours, baseline)
    optimizer = BertAdam(param_groups(ours, 0.01), lr=1e-2, schedule="none")
    plain_optimizer = plain.PlainAdam(baseline, rate=1e-2)
    for _ in range(3):
        scores, hidden = ours(*inputs)
        with torch.no_grad():
            _, teacher_scores, teacher_hidden = teacher(*inputs)
        losses = intermediate_losses(scores, hidden, teacher_scores, teacher_hidden,
                                     batch["attention_mask"], match_original=True)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        plain_losses = plain.general_step(baseline, plain_teacher.bert, plain_optimizer, batch)
        assert plain_losses == pytest.approx([loss.item() for loss in losses.values()], abs=1e-4)
    found = [parameter.clone() for parameter in baseline.parameters()]
    copy_weights(ours, baseline)
    for one, other in zip(found, baseline.parameters(), strict=True):
        assert (one - other).abs().max() < 1e-4


def test_plain_evaluation_and_fine_tuning_use_every_row(batch):
    ours, baseline = classifiers(2, 16, 16)
    rows = {name: values.repeat(9, *[1] * (values.dim() - 1)) for name, values in batch.items()}
    logits = plain.evaluate(baseline, rows)  # 45 rows: a full batch and a part of one
    with torch.no_grad():
        assert (logits - ours(*plain.inputs_of(rows))[0]).abs().max() < 1e-5
    losses = torch.nn.functional.cross_entropy(logits, rows["labels"])
    optimizer = plain.PlainAdam(baseline, rate=1e-3)
    assert plain.finetune_step(baseline, optimizer, rows) == pytest.approx([losses.item()])
    assert plain.finetune_step(baseline, optimizer, rows)[0] < losses


VOCAB = GOLDEN / "bert_base_uncased_vocab.txt"


def write_corpus(path: Path) -> None:
    """Write 12 documents of 30 sentences."""
    rng = random.Random(0)
    documents = [[" ".join(rng.choices(NEUTRAL, k=rng.randint(2, 9))) for _ in range(30)]
                 for _ in range(12)]
    path.write_text("\n\n".join("\n".join(lines) for lines in documents), encoding="utf-8")


def test_plain_tokens_are_ours():
    tokenizer = BertTokenizer(VOCAB)
    texts = [row["text"] for row in read_json(GOLDEN / "tokenization.json")]
    plain_text = [text for text in texts if text.isprintable() and "[" not in text]
    assert len(plain_text) > 50
    chinese = ["\u5f88\u597d\u5403\uff0c iPhone\u768416\u5143\u3002", "\u304c\u304f caf\u00e9-x"]
    for text in [*plain_text, *chinese]:
        assert plain.tokenize(text, tokenizer.vocab) == tokenizer.encode_batch([text])[0], text


# ------------------------------------------------------------------ operations and projection

TEACHER = BertConfig()
STUDENTS = [BertConfig.from_json_file(ROOT / name / "config.json")
            for name in ("tinybert_4l_config", "tinybert_6l_config")]


def test_operations_of_128_word_pieces_are_those_of_the_cost_model():
    assert forward_flops(TEACHER, [128]) == pytest.approx(22.35e9, rel=1e-3)
    for student, training in zip(STUDENTS, (4.66e9, 36.69e9), strict=True):
        both = distillation_flops(TEACHER, [student], [128])
        assert both - forward_flops(TEACHER, [128]) == pytest.approx(training, rel=1e-3)
    alone = sum(distillation_flops(TEACHER, [student], [40, 128]) for student in STUDENTS)
    saved = alone - distillation_flops(TEACHER, STUDENTS, [40, 128])
    assert saved == pytest.approx(forward_flops(TEACHER, [40, 128]))


def test_general_distillation_of_both_students_is_the_documented_operations():
    rows = 3 * 50_000_000  # Wikipedia's instances, of 111 word pieces
    assert rows * distillation_flops(TEACHER, STUDENTS, [111]) == pytest.approx(
        8.2558e18, rel=1e-4)


# ------------------------------------------------------------------ stages and tables


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """The arguments that name the inputs of run.py; a vocabulary is among them."""
    root = tmp_path_factory.mktemp("benchmarks")
    for task in ("SST-2", "RTE"):
        make_glue(root / "glue" / task, task, rows=40, dev_rows=20)
    write_corpus(root / "corpus.txt")
    return ["--quick", "--glue_dir", str(root / "glue"), "--corpus", str(root / "corpus.txt"),
            "--vocab", str(VOCAB)]


@pytest.fixture(scope="module")
def setup(inputs, tmp_path_factory) -> Setup:
    """What run.py prepares for all stages."""
    folder = tmp_path_factory.mktemp("setup")
    args = benchmark.get_args_parser().parse_args(inputs)
    benchmark.check_arguments(args)
    facts = benchmark.prepare(args, folder)
    assert facts["rows"] == "40 of SST-2 train, 20 of SST-2 dev, 40 of RTE train"
    return Setup(folder, **read_json(folder / "setup.json"))


def test_without_quick_the_models_are_bert_base_and_its_students():
    args = benchmark.get_args_parser().parse_args([])
    benchmark.check_arguments(args)
    setup = Setup(ROOT, **benchmark.make_setup(args))
    configs = [setup.teacher_config(), *setup.student_configs(2)]
    assert [(c.num_hidden_layers, c.hidden_size) for c in configs] == [
        (12, 768), (4, 312), (6, 768)]


@pytest.mark.parametrize("side", ["plain", "ours"])
@pytest.mark.parametrize("name", STAGES)
def test_each_side_of_each_stage_runs(setup, name, side):
    stage = STAGES[name]
    if getattr(stage, side) is None:
        return
    job = stage.set_up(side, setup)
    job.run()
    job.run()
    assert job.amount > 0
    if stage.flops:
        assert stage.flops(setup, job.lengths) > 0


def test_a_run_measures_both_sides_and_what_was_not_measured_says_so(inputs, tmp_path, capsys):
    run(benchmark, *inputs, "--repeats", 1, "--stages", "evaluation",
        "--output_dir", tmp_path / "out")
    content = read_json(tmp_path / "out" / "benchmarks.json")
    result = content["stages"]["evaluation"]
    for side in ("plain", "ours"):
        assert result[side]["rate"] > 0 and result[side]["peak_memory"] > 5e7
        assert 0 < result[side]["share_of_peak"] < 1
    assert {"device", "commit", "command", "rows", "corpus", "fp32 matrix peak", "our precision",
            } <= content["machine"].keys()
    page = (tmp_path / "out" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.strip() == capsys.readouterr().out.strip()
    assert all(f"\n| {name} |" in page for name in STAGES)
    assert page.count(benchmark.NOT_MEASURED) == len(STAGES) - 1


@pytest.mark.parametrize("other", ["plain", "against"])
def test_the_sides_take_turns_and_the_median_counts(monkeypatch, other):
    turns = []

    def take_turn(name, side, tree, folder):
        turns.append(side)
        return {"amount": 12, "seconds": len(turns), "flops": 24, "peak_memory": 1}

    monkeypatch.setattr(benchmark, "take_turn", take_turn)
    result = benchmark.measure_stage(
        "general", ROOT, {other: ROOT, "ours": ROOT}, 3, {"plain": 2.0, "ours": 4.0})
    assert turns == [other, "ours"] * 3
    assert result["ours"]["seconds"] == [2, 4, 6] and result["ours"]["rate"] == 3.0
    assert result["ratio"] == 3.0 / result[other]["rate"] == 0.75
    assert result[other]["share_of_peak"] == (4.0 if other == "plain" else 2.0)


def test_a_side_that_fails_is_named_in_one_line(tmp_path):
    with pytest.raises(UserError, match="evaluation, plain: ended with code 2: ") as error:
        benchmark.take_turn("evaluation", "plain", ROOT, tmp_path)
    assert "\n" not in str(error.value)


def test_a_corpus_that_is_cut_keeps_its_whole_documents_and_a_small_one_is_repeated(tmp_path):
    (tmp_path / "text.txt").write_text("a b\nc\n\nd\n\ne f", encoding="utf-8")
    for size, repeats in ((11, 1), (30, 3)):
        benchmark.write_corpus(tmp_path / "text.txt", tmp_path, size)
        text = (tmp_path / "corpus.txt").read_text()
        assert text == "\n\n".join(["a b\nc\n\nd"] * repeats)


def test_the_sample_is_even_over_the_lengths():
    sizes = [5, 1, 4, 2, 3, 8, 7, 6]
    for rows, expected in ((8, range(1, 9)), (4, [2, 4, 6, 8]), (16, sorted(sizes * 2))):
        assert sorted(np.array(sizes)[spread(sizes, rows)]) == list(expected)


@pytest.mark.parametrize("arguments, message", [
    ("--corpus nowhere.txt", "--corpus nowhere.txt: no such file"),
    ("--against nowhere", "--against nowhere: has no benchmarks/stages.py"),
    pytest.param("--device cuda", "--device cuda: torch sees no GPU here",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
])
def test_arguments_that_make_no_sense_are_refused(
        inputs, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_line(
        capsys, benchmark, *inputs, "--output_dir", tmp_path / "out", *arguments.split())
