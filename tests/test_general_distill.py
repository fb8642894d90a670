"""General distillation from a pregenerated folder to a student that the next stage reads."""

import random
import weakref

import pytest
import torch
from helpers import (
    BAD,
    GOOD,
    NEUTRAL,
    GeneralSetup,
    config_folder,
    make_glue,
    make_model,
    make_pregenerated,
    read_json,
    read_log,
    run,
    same_weights,
    weights,
)
from torch.utils._python_dispatch import TorchDispatchMode

import general_distill
import pregenerate_training_data
import task_distill
from transformer import optimization
from transformer.modeling import (
    BertModel,
    TinyBertForPreTraining,
    TinyBertForSequenceClassification,
)


@pytest.fixture
def setup(tmp_path):
    return GeneralSetup(tmp_path)


# ------------------------------------------------------------------ from end to end


def test_from_a_corpus_to_a_task_student_without_copying_anything(setup):
    rng = random.Random(0)
    lines = [" ".join(rng.choices(NEUTRAL + GOOD + BAD, k=8)) + " ." for _ in range(60)]
    documents = ["\n".join(lines[start : start + 10]) for start in range(0, 60, 10)]
    (setup.root / "corpus.txt").write_text("\n\n".join(documents) + "\n")
    run(pregenerate_training_data, "--train_corpus", setup.root / "corpus.txt", "--bert_model",
        setup.teacher, "--do_lower_case", "--epochs_to_generate", 2, "--max_seq_len", 32,
        "--output_dir", setup.root / "json")
    setup.corpus = setup.root / "json"
    output = setup.run("general", "--num_train_epochs", 2, "--max_seq_length", 32)
    TinyBertForPreTraining.from_pretrained(output)
    data = make_glue(setup.root / "SST-2")
    make_model(setup.root / "task_teacher", labels=("0", "1"))
    run(task_distill, "--teacher_model", setup.root / "task_teacher", "--student_model", output,
        "--data_dir", data, "--task_name", "sst-2", "--output_dir", setup.root / "task",
        "--num_train_epochs", 1, "--precision", "fp32")
    TinyBertForSequenceClassification.from_pretrained(setup.root / "task")


def test_the_output_is_a_model_folder_with_a_checkpoint_every_eval_step(setup):
    output = setup.run("out", "--num_train_epochs", 2, "--eval_step", 2)
    assert {p.name for p in output.iterdir()} == {
        "config.json", "pytorch_model.bin", "vocab.txt", "tokenizer.json", "tokenizer_config.json",
        "args.json", "eval_results.txt", "eval_results.json", "log.jsonl",
        *(f"step_{n}_pytorch_model.bin" for n in (2, 4, 6))}
    last = torch.load(output / "step_6_pytorch_model.bin", weights_only=True)
    assert same_weights(last, weights(output))
    log = read_log(output)
    assert [line["step"] for line in log] == [2, 4, 6]
    assert [line["epoch"] for line in log] == [0.667, 1.333, 2.0]
    assert log[-1]["lr"] == 0.0
    assert weights(output)["fit_dense.weight"].shape == (16, 12)


def test_both_losses_fall(setup):
    output = setup.run("out", "--num_train_epochs", 30, "--learning_rate", 3e-3, "--eval_step", 9)
    log = read_log(output)
    for name in ("att_loss", "rep_loss"):
        assert log[-1][name] < 0.9 * log[0][name]


def test_reduce_memory_changes_nothing(setup):
    plain = setup.run("plain", "--num_train_epochs", 1)
    reduced = setup.run("reduced", "--num_train_epochs", 1, "--reduce_memory")
    assert same_weights(weights(plain), weights(reduced))


def test_students_with_other_batch_sizes_end_as_if_each_had_been_trained_alone(tmp_path):
    setup = GeneralSetup(tmp_path, rows=300)
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config_folder(setup.student, num_hidden_layers=2, hidden_size=12, **dropout)
    more = ("--num_train_epochs", 2, "--learning_rate", 1e-3)
    small = setup.run("small", *more, "--train_batch_size", 64)
    large = setup.run("large", *more, "--train_batch_size", 128,
                      "--gradient_accumulation_steps", 2)
    setup.run("both_small", *more, "--student_model", setup.student, setup.student,
              "--output_dir", tmp_path / "both_small", tmp_path / "both_large",
              "--train_batch_size", 64, 128)
    assert same_weights(weights(small), weights(tmp_path / "both_small"))
    assert same_weights(weights(large), weights(tmp_path / "both_large"))
    assert not same_weights(weights(small), weights(large))


def test_the_last_step_of_large_batches_is_taken_where_the_run_ends(tmp_path):
    setup = GeneralSetup(tmp_path, rows=300)
    more = ("--learning_rate", 1e-3, "--weight_decay", 1.0, "--warmup_proportion", 0)
    for epochs in (0.2, 0.9):  # 1 and 4 of 5 small steps
        outputs = [tmp_path / f"{size}_{epochs}" for size in (64, 256)]
        setup.run("unused", *more, "--student_model", setup.student, setup.student, "--output_dir",
                  *outputs, "--train_batch_size", 64, 256, "--num_train_epochs", epochs)
        torch.manual_seed(42)
        start = TinyBertForPreTraining.from_scratch(setup.student, fit_size=16).state_dict()
        assert not same_weights(weights(outputs[1]), start)


class ScalarReads(TorchDispatchMode):
    """Counts the numbers that are read from tensors: each makes a GPU's queue run empty."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **keywords or {})


def test_no_step_reads_a_number_from_the_device(setup, monkeypatch):
    # On a CPU, where it costs nothing, the optimizer reads what to scale each gradient by.
    monkeypatch.setattr(optimization, "clip_each", lambda gradients, max_norm: None)
    counts, steps = [], []
    for batch_size in (4, 1):
        with ScalarReads() as reads:
            output = setup.run(f"out_{batch_size}", "--num_train_epochs", 1,
                               "--train_batch_size", batch_size, "--eval_step", 1000)
        counts.append(reads.count)
        steps.append(read_log(output)[-1]["step"])
    assert steps[1] >= 3 * steps[0]
    assert counts[0] == counts[1] > 0  # the log line and the check of the weights


def test_each_epoch_is_read_once_and_one_at_a_time(tmp_path, monkeypatch):
    setup = GeneralSetup(tmp_path, epochs=3)
    alive, read = weakref.WeakSet(), []

    class Watched(general_distill.PregeneratedDataset):
        def __init__(self, folder, epoch, *more):
            assert not alive, "the epoch before is still held"
            super().__init__(folder, epoch, *more)
            alive.add(self)
            read.append(epoch)

    monkeypatch.setattr(general_distill, "PregeneratedDataset", Watched)
    setup.run("out", "--num_train_epochs", 3)
    assert read == [0, 1, 2]


def test_match_original_counts_padding(setup):
    plain = [read_log(setup.run(f"p{n}", "--num_train_epochs", 1, "--max_seq_length", n))[0]
             for n in (24, 48)]
    original = [read_log(setup.run(f"m{n}", "--num_train_epochs", 1, "--max_seq_length", n,
                                   "--match_original"))[0] for n in (24, 48)]
    assert plain[0]["att_loss"] == plain[1]["att_loss"]
    assert original[0]["att_loss"] > 1.5 * original[1]["att_loss"]


def test_every_pass_reads_the_next_epoch_and_then_the_first_again(tmp_path):
    setup = GeneralSetup(tmp_path, epochs=2, rows=4)
    # Two generated epochs of different size tell which one a pass read.
    make_pregenerated(setup.root / "more", rows=9, epochs=1)
    for old, new in (("epoch_0.json", "epoch_1.json"),
                     ("epoch_0_metrics.json", "epoch_1_metrics.json")):
        (setup.corpus / new).write_bytes((setup.root / "more" / old).read_bytes())
    output = setup.run("out", "--num_train_epochs", 3, "--eval_step", 1)
    assert [line["epoch"] for line in read_log(output)] == [1.0, 1.333, 1.667, 2.0, 3.0]


# ------------------------------------------------------------------ starting from a student


def test_continue_train_starts_from_the_given_weights(setup):
    first = setup.run("first", "--num_train_epochs", 1)
    setup.student = first
    second = setup.run("second", "--continue_train", "--learning_rate", 0, "--num_train_epochs", 1)
    assert same_weights(weights(first), weights(second))
    fresh = setup.run("fresh", "--learning_rate", 0, "--num_train_epochs", 1)
    assert not same_weights(weights(first), weights(fresh))


def test_continue_train_is_strict(setup, capsys):
    setup.expect_error(capsys, "--continue_train", contains=["student", "no weights"])
    make_model(setup.student, BertModel, num_hidden_layers=2, hidden_size=12)
    state = weights(setup.student)
    torch.save({k: v for k, v in state.items() if "layer.1." not in k},
               setup.student / "pytorch_model.bin")
    setup.expect_error(capsys, "--continue_train", contains=["encoder.layer.1."])


def test_do_eval_measures_the_losses_and_trains_nothing(setup):
    first = setup.run("first", "--num_train_epochs", 1)
    setup.student = first
    results = []
    for size in (1, 3):
        output = setup.run(f"eval{size}", "--do_eval", "--eval_batch_size", size)
        assert {p.name for p in output.iterdir()} == {
            "args.json", "eval_results.txt", "eval_results.json"}
        results.append(read_json(output / "eval_results.json")["losses"])
    assert set(results[0]) == {"att_loss", "rep_loss"}
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_a_student_equal_to_its_teacher_has_no_loss(setup):
    setup.student = setup.teacher
    output = setup.run("eval", "--do_eval")
    assert all(v < 1e-9 for v in read_json(output / "eval_results.json")["losses"].values())


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(("more", "contains"), [
    (("--student_model", "a", "b", "--output_dir", "out", "x", "--train_batch_size", 64, 96),
     ["--train_batch_size 64 96", "multiples"]),
    (("--student_model", "a", "b"), ["--output_dir: 1 folders for 2 students"]),
    (("--student_model", "a", "b", "--output_dir", "out", "./out"), ["a folder of its own"]),
    (("--learning_rate", 1e-3, 1e-4), ["--learning_rate: 2 values for 1 students"]),
    (("--precision", "fp16"), ["float16 needs a GPU"]),
    (("--pregenerated_data", "no/such"), ["no/such"]),
    (("--teacher_model", "no/such"), ["no/such"]),
    (("--student_model", "no/such"), ["no/such"]),
    (("--max_seq_length", 8), ["16 tokens", "8"]),
])
def test_a_mistake_is_one_line_and_nothing_is_written(setup, capsys, more, contains):
    setup.expect_error(capsys, *more, contains=contains)


def test_a_truncated_corpus_is_refused_before_anything_is_written(setup, capsys):
    path = setup.corpus / "epoch_0.json"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))
    setup.expect_error(capsys, contains=["epoch_0.json", "8 rows", "10"])
    path.write_text("".join(lines)[:-30])
    setup.expect_error(capsys, contains=["epoch_0.json", "line 10"])
    path.write_text("")
    setup.expect_error(capsys, contains=["epoch_0.json"])


def test_a_corpus_of_another_vocabulary_is_refused(setup, capsys):
    path = setup.corpus / "epoch_0.json"
    path.write_text(path.read_text().replace('"film"', '"tractor"'))
    setup.expect_error(capsys, contains=["epoch_0.json, line", "tractor"])


