"""Teachers by their logits: classifiers of Hugging Face's library, other vocabularies, several."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    PIECES,
    REPO,
    SPECIAL,
    TaskSetup,
    error_line,
    make_glue,
    make_model,
    read_json,
    read_log,
    run,
    same_weights,
    weights,
    write_vocab,
)

import export_model
import task_distill
from transformer.evaluation import predict_logits
from transformer.features import encode_examples
from transformer.file_utils import write_json
from transformer.hugging_face import predict_examples
from transformer.tasks import get_task, load_examples
from transformer.teachers import Teacher, mean_logits

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 1}
SHAPES = {
    "mobilebert": {"embedding_size": 8, "intra_bottleneck_size": 16, "trigram_input": True},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                   "position_biased_input": False},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 0,
                   "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2},
    "fnet": {},
}
WORDS = ["<s>", "<pad>", "</s>", "<unk>", "we", "the", "a", "was", "of", "film", "book", "sad",
         "good", "great", "bad", "poor", "happy", ".", "saw"]  # others than the students'


def library_tokenizer():
    """A tokenizer that is not BERT's, in any of its numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", "<s> $A </s> </s> $B:1 </s>:1", [("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>", cls_token="<s>", sep_token="</s>", model_max_length=64)


def library_model(folder: Path, labels: tuple[str, ...], kind: str = "mobilebert", seed: int = 3):
    """Save a random classifier of Hugging Face's library; returns it and its tokenizer."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(
        kind, **TINY, **SHAPES[kind], vocab_size=len(WORDS), id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)})
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that rows differ in their logits
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer = library_tokenizer()
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@torch.no_grad()
def alone(model, tokenizer, examples, length: int = 64) -> torch.Tensor:
    """The logits of each row [rows, labels], computed by the library with no other row beside."""
    rows = [tokenizer(*filter(None, example[1:3]), truncation=True, max_length=length,
                      return_tensors="pt") for example in examples]
    return torch.cat([model(**row).logits for row in rows])


class LogitsSetup(TaskSetup):
    """A student with a classifier that learns nothing: the loss is that of known logits."""

    def __init__(self, root, name="SST-2", **glue):
        super().__init__(root, name, **glue)
        self.model = make_model(self.student, labels=self.task.labels or ("LABEL_0",), seed=1,
                                num_hidden_layers=2)
        self.examples = load_examples(self.task, self.data, "train")

    def loss(self, output: str, *more) -> float:
        """The loss of all rows, which are a multiple of the batch size."""
        folder = self.run(output, "--pred_distill", "--num_train_epochs", 1, "--learning_rate", 0,
                          "--max_seq_length", 64, *more)
        return read_log(folder)[-1]["cls_loss"]

    def own_logits(self, folder=None, model=None) -> torch.Tensor:
        """The logits of a model of ours, by default the student's."""
        tokenizer = write_vocab(self.root / "vocab")
        features = encode_examples(self.examples, tokenizer, 64, self.task.labels,
                                   self.task.is_regression)
        return predict_logits(model or self.model, features, "cpu")


def soft_loss(student, probabilities, temperature=1.0) -> float:
    log_student = F.log_softmax(student / temperature, dim=-1)
    return float(-(probabilities * log_student).sum(dim=-1).mean())


# ------------------------------------------------------------------ logits of the library


@pytest.mark.parametrize(("kind", "name", "length"), [
    ("mobilebert", "SST-2", 64), ("mobilebert", "RTE", 9), ("deberta-v2", "MNLI", 64),
    ("deberta-v2", "SST-2", 5), ("modernbert", "RTE", 12),
])
def test_the_librarys_logits_of_a_row_are_those_of_the_row_alone(tmp_path, kind, name, length):
    task = get_task(name)
    examples = load_examples(task, make_glue(tmp_path / "data", name, rows=30), "train")
    model, tokenizer = library_model(tmp_path / "teacher", task.labels, kind)
    expected = alone(model, tokenizer, examples, length)
    assert expected.std(dim=0).min() > 1e-2  # rows differ
    for dtype, tolerance in ((None, 1e-5), (torch.bfloat16, 0.1)):
        teacher = Teacher.read("teacher", tmp_path / "teacher", task, length)
        teacher.load(tmp_path / "teacher", task, torch.device("cpu"), dtype)
        found = predict_examples(teacher.model, teacher.tokenizer, iter(examples), len(examples),
                                 length, 4, torch.device("cpu"), "teacher")
        assert found.dtype == torch.float32 and not teacher.is_ours
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_rows_with_and_without_a_second_text_share_a_pass(tmp_path):
    task = get_task("RTE")
    examples = load_examples(task, make_glue(tmp_path / "data", "RTE", rows=9), "train")
    examples = [row._replace(text_b=row.text_b if place % 2 else None)
                for place, row in enumerate(examples)]
    model, tokenizer = library_model(tmp_path / "teacher", task.labels)
    found = predict_examples(model, tokenizer, examples, 9, 64, 4, torch.device("cpu"), "teacher")
    torch.testing.assert_close(found, alone(model, tokenizer, examples), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ the prediction stage


def test_a_teacher_of_another_vocabulary_teaches_by_logits_matched_by_name(tmp_path):
    setup = LogitsSetup(tmp_path, "MNLI", rows=16)
    order = ("NEUTRAL", "ENTAILMENT", "CONTRADICTION")
    teacher = library_model(setup.teacher, order)
    places = [order.index(label.upper()) for label in setup.task.labels]
    targets = alone(*teacher, setup.examples)[:, places].softmax(dim=-1)
    assert setup.loss("out") == pytest.approx(soft_loss(setup.own_logits(), targets), rel=1e-4)
    assert list(read_json(setup.root / "out" / "config.json")["id2label"].values()) == list(
        setup.task.labels)
    # The student keeps its own vocabulary.
    assert (setup.root / "out" / "vocab.txt").read_text().split() == PIECES


def test_a_student_without_named_labels_takes_the_teachers_order_and_names(tmp_path):
    setup = TaskSetup(tmp_path, "MNLI", rows=8)
    order = ("neutral", "entailment", "contradiction")
    library_model(setup.teacher, order)
    output = setup.run("out", "--pred_distill", "--num_train_epochs", 1, "--max_seq_length", 64)
    assert list(read_json(output / "config.json")["id2label"].values()) == list(order)
    run(task_distill, "--do_eval", "--student_model", output, "--data_dir", setup.data,
        "--task_name", "MNLI", "--output_dir", tmp_path / "eval", "--precision", "fp32")
    assert (read_json(tmp_path / "eval" / "eval_results.json")["metrics"]
            == read_json(output / "eval_results.json")["best"])


def test_a_teacher_that_names_no_labels_is_warned_of(tmp_path, caplog):
    setup = LogitsSetup(tmp_path, "MNLI", rows=8)
    library_model(setup.teacher, ("LABEL_0", "LABEL_1", "LABEL_2"))
    with caplog.at_level(logging.WARNING):
        setup.loss("out")
    assert "does not name its labels" in caplog.text


def test_a_student_without_tokenizer_takes_that_of_our_kind_beside_the_teacher(tmp_path):
    setup = TaskSetup(tmp_path, rows=8)
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (setup.student / name).unlink()
    output = setup.run("out", "--pred_distill", "--num_train_epochs", 1)
    assert (output / "vocab.txt").read_bytes() == (setup.teacher / "vocab.txt").read_bytes()


def test_a_bert_of_another_vocabulary_teaches_each_row_by_its_own_pieces(tmp_path):
    setup = LogitsSetup(tmp_path, rows=16)
    teacher = make_model(setup.teacher, labels=("0", "1"), vocab_size=len(PIECES) - 2)
    pieces = [*SPECIAL, *reversed(PIECES[7:])]
    tokenizer = write_vocab(setup.teacher, pieces)
    rows = encode_examples(setup.examples, tokenizer, 64, ("0", "1"))
    targets = predict_logits(teacher, rows, "cpu").softmax(dim=-1)
    assert setup.loss("out") == pytest.approx(soft_loss(setup.own_logits(), targets), rel=1e-5)


def test_a_bilstm_without_vocabulary_takes_the_tokenizer_json_beside_such_a_teacher(tmp_path):
    setup = TaskSetup(tmp_path, rows=8)
    library_model(setup.teacher, ("negative", "positive"))
    (tmp_path / "student" / "config.json").write_text(
        '{"model_type": "bilstm", "embedding_size": 6, "hidden_size": 8}')
    for path in tmp_path.glob("student/*[!g].*"):
        path.unlink()
    (tmp_path / "student" / "tokenizer_config.json").unlink()
    output = setup.run("out", "--pred_distill", "--num_train_epochs", 1, "--max_seq_length", 64)
    assert read_json(output / "config.json")["vocab_size"] == len(WORDS)
    assert (output / "tokenizer.json").read_bytes() == (
        setup.teacher / "tokenizer.json").read_bytes()
    run(task_distill, "--do_eval", "--student_model", output, "--data_dir", setup.data,
        "--task_name", "SST-2", "--output_dir", tmp_path / "eval", "--precision", "fp32")
    assert (read_json(tmp_path / "eval" / "eval_results.json")["metrics"]
            == read_json(output / "eval_results.json")["best"])


# ------------------------------------------------------------------ several teachers


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_several_teachers_of_different_kinds_average_their_probabilities(tmp_path, temperature):
    setup = LogitsSetup(tmp_path, "RTE", rows=16)
    ours = make_model(setup.teacher, labels=setup.task.labels, seed=5)
    theirs = library_model(tmp_path / "deberta", setup.task.labels[::-1], "deberta-v2")
    logits = [setup.own_logits(model=ours), alone(*theirs, setup.examples).flip(1)]
    loss = setup.loss("out", "--teacher_model", setup.teacher, tmp_path / "deberta",
                      "--teacher_weights", 3, 1, "--temperature", temperature)
    first, second = ((each / temperature).softmax(dim=-1) for each in logits)
    expected = soft_loss(setup.own_logits(), 0.75 * first + 0.25 * second, temperature)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_several_teachers_of_a_regression_average_their_scores(tmp_path):
    setup = LogitsSetup(tmp_path, "STS-B", rows=16)
    first = make_model(setup.teacher, labels=("LABEL_0",), seed=5)
    second = library_model(tmp_path / "second", ("LABEL_0",))
    targets = (setup.own_logits(model=first) + alone(*second, setup.examples)) / 2
    loss = setup.loss("out", "--teacher_model", setup.teacher, tmp_path / "second")
    assert loss == pytest.approx(float(F.mse_loss(setup.own_logits(), targets)), rel=1e-4)


def test_the_same_teacher_twice_teaches_as_once(tmp_path):
    setup = LogitsSetup(tmp_path, rows=16)
    once = setup.run("once", "--pred_distill", "--num_train_epochs", 1)
    twice = setup.run("twice", "--pred_distill", "--num_train_epochs", 1, "--teacher_model",
                      setup.teacher, setup.teacher)
    for name, tensor in weights(once).items():
        torch.testing.assert_close(weights(twice)[name], tensor, rtol=0, atol=1e-5)


def test_a_sweep_under_several_teachers_trains_each_setting_as_if_alone(tmp_path):
    setup = TaskSetup(tmp_path, rows=16)
    library_model(tmp_path / "second", ("positive", "negative"))
    more = ("--pred_distill", "--num_train_epochs", 1, "--max_seq_length", 64, "--temperature", 2,
            "--teacher_model", setup.teacher, tmp_path / "second")
    swept = setup.run("swept", *more, "--sweep", "--learning_rate", 1e-3, 1e-2)
    alone = setup.run("alone", *more, "--learning_rate", 1e-2)
    assert same_weights(weights(alone), weights(swept / "lr0.01_batch8"))
    assert read_json(alone / "args.json")["arguments"]["teacher_model"] == [
        str(setup.teacher), str(tmp_path / "second")]
    setup.run("alone", *more, "--learning_rate", 1e-2, "--resume")  # it has finished


def test_the_model_card_names_all_teachers(tmp_path):
    setup = TaskSetup(tmp_path, rows=8)
    make_model(tmp_path / "second", labels=setup.task.labels)
    student = setup.run("student_of_two", "--pred_distill", "--num_train_epochs", 1,
                        "--teacher_model", setup.teacher, tmp_path / "second",
                        "--teacher_weights", 3, 0.5)
    run(export_model, "--model", student, "--output_dir", tmp_path / "card")
    assert "teacher and second (the mean of their predictions, weights 3:0.5)" in (
        tmp_path / "card" / "README.md").read_text()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_mean_logits_give_the_mean_of_probabilities_at_the_losss_temperature(temperature):
    torch.manual_seed(0)
    logits = [20 * torch.randn(7, 3) for _ in range(3)]
    found = mean_logits(logits, [1, 2, 5], temperature)
    expected = sum(weight * (each / temperature).softmax(dim=-1)
                   for weight, each in zip((1, 2, 5), logits, strict=True)) / 8
    torch.testing.assert_close((found / temperature).softmax(dim=-1), expected)
    assert mean_logits(logits[:1], [2.0], temperature) is logits[0]


# ------------------------------------------------------------------ mistakes


@pytest.fixture
def library(tmp_path):
    """A teacher of the library and a student with vocabulary."""
    setup = TaskSetup(tmp_path, rows=4)
    library_model(setup.teacher, ("negative", "positive"))
    return setup


@pytest.mark.parametrize("flags", [(), ("--pred_distill", "--joint")])
def test_who_learns_from_layers_has_one_teacher_whose_layers_are_read(library, capsys, flags):
    library.expect_error(capsys, *flags, contains=["mobilebert", "by --pred_distill"])
    library.expect_error(capsys, *flags, "--teacher_model", library.student, library.student,
                         contains=["2 teachers", "--pred_distill without --joint"])


@pytest.mark.parametrize(("more", "contains"), [
    (("--teacher_weights", 1, 2), ["2 weights for 1 teachers"]),
    (("--teacher_weights", 0), ["--teacher_weights 0"]),
    (("--teacher_weights", "nan"), ["--teacher_weights nan"]),
    (("--do_lower_case",), ["--do_lower_case", "teacher"]),
    (("--max_seq_length", 65), ["--max_seq_length 65", "64 tokens"]),
    (("--copy_embeddings",), ["--copy_embeddings: of", "teacher only the logits are read"]),
])
def test_flags_that_do_not_fit_such_a_teacher_are_one_line(library, capsys, more, contains):
    library.expect_error(capsys, "--pred_distill", "--max_seq_length", 64, *more,
                         contains=contains)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_missing_file_of_such_a_teacher_is_one_line(library, capsys, name):
    (library.teacher / name).unlink()
    library.expect_error(capsys, "--pred_distill", contains=[str(library.teacher)])


def test_a_model_without_classifier_or_of_other_labels_does_not_teach(library, capsys):
    path = library.teacher / "config.json"
    config = read_json(path)
    write_json(path, config | {"architectures": ["MobileBertForMaskedLM"]})
    library.expect_error(capsys, "--pred_distill", contains=["MobileBertForMaskedLM"])
    write_json(path, config | {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}})
    library.expect_error(capsys, "--pred_distill", contains=["'a', 'b'", "sst-2"])
    write_json(path, config | {"num_hidden_layers": 3})
    library.expect_error(capsys, "--pred_distill", contains=["no trained classifier", "layer"])


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_never_run(library, capsys, name):
    path = library.teacher / name
    (library.teacher / "own.py").write_text("raise SystemExit('it was run')")
    write_json(path, read_json(path) | {"auto_map": {"AutoConfig": "own.Config",
                                                     "AutoTokenizer": ["own.Tokenizer", None]}})
    library.expect_error(capsys, "--pred_distill", contains=[name, "auto_map", "never run"])


def test_what_the_library_cannot_compute_is_one_line(library, capsys):
    library_model(library.teacher, ("negative", "positive"), "fnet")
    library.expect_error(capsys, "--pred_distill", "--precision", "bf16", "--max_seq_length", 64,
                         contains=["cannot compute its logits", "--precision fp32"])
    tokenizer = library.teacher / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('".": 17', '".": 99'))
    message = error_line(capsys, task_distill, *library.arguments(
        "out", "--pred_distill", "--max_seq_length", 64))
    assert "teacher: the package transformers cannot compute its logits" in message


def test_a_network_that_nobody_knows_is_one_line(library, capsys):
    path = library.teacher / "config.json"
    write_json(path, read_json(path) | {"model_type": "nobodys"})
    library.expect_error(capsys, "--pred_distill", contains=["nobodys", "transformers"])


def test_students_of_one_call_have_one_vocabulary(library, capsys):
    make_model(library.root / "other", num_hidden_layers=2)
    write_vocab(library.root / "other", [*SPECIAL, *reversed(PIECES[5:])])
    message = error_line(
        capsys, task_distill, *library.arguments("a", "--pred_distill", "--max_seq_length", 64,
                                                 "--student_model", library.student,
                                                 library.root / "other", "--output_dir",
                                                 library.root / "a", library.root / "b"))
    assert "other: its vocabulary has other pieces" in message


def test_a_student_of_other_pieces_is_refused_in_the_intermediate_stage(tmp_path, capsys):
    setup = TaskSetup(tmp_path, rows=4)
    write_vocab(setup.student, [*SPECIAL, *reversed(PIECES[5:])])
    setup.expect_error(capsys, contains=["other pieces", "--pred_distill"])


# ------------------------------------------------------------------ the package transformers


def test_without_the_package_transformers_one_line_says_what_to_install(
        library, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    library.expect_error(capsys, "--pred_distill", contains=["pip install transformers"])


def test_without_the_package_that_reads_its_vocabulary_one_line_says_what_to_install(
        library, capsys, monkeypatch):
    """DeBERTa-v3 as published has no other file of pieces."""
    for name in ("tokenizer.json", "vocab.txt"):
        (library.teacher / name).unlink(missing_ok=True)
    (library.teacher / "spm.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    library.expect_error(capsys, "--pred_distill",
                         contains=["spm.model: ", "pip install sentencepiece"])


def test_a_run_of_our_own_models_does_not_import_transformers(tmp_path):
    setup = TaskSetup(tmp_path, rows=4)
    arguments = setup.arguments("out", "--pred_distill", "--num_train_epochs", 1,
                                "--teacher_model", setup.teacher, setup.teacher)
    result = subprocess.run(
        [sys.executable, "-X", "importtime", REPO / "task_distill.py", *map(str, arguments)],
        capture_output=True, text=True, timeout=300, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    modules = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "torch" in modules and "transformers" not in modules
