"""General distillation from a pregenerated folder to a student that the next stage reads."""

import gzip
import json
import random
import weakref
from pathlib import Path

import pytest
import torch
from helpers import (
    BAD,
    GOLDEN,
    GOOD,
    NEUTRAL,
    PIECES,
    GeneralSetup,
    config_folder,
    error_line,
    make_glue,
    make_model,
    make_pregenerated,
    read_json,
    read_log,
    run,
    same_weights,
    weights,
    write_vocab,
)
from kill import Process, script, torchrun
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
    output = setup.run("hidden", "--do_eval", "--no_attention_loss")
    assert read_json(output / "eval_results.json")["losses"] == {
        "rep_loss": pytest.approx(results[0]["rep_loss"], rel=1e-4)}


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
    (("--pregenerated_data", __file__), ["a file; expected what", "--train_corpus"]),
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


# ------------------------------------------------------------------ from plain text


class TextSetup(GeneralSetup):
    """A text file, one sentence a line, in place of the pregenerated corpus; a cache of its own."""

    def __init__(self, root, monkeypatch):
        super().__init__(root)
        self.cache = root / "cache"
        monkeypatch.setenv("TINYBERT_CACHE", str(self.cache))
        rng = random.Random(0)
        self.text = root / "sentences.txt"
        self.text.write_text("".join(
            " ".join(rng.choices(NEUTRAL + GOOD, k=rng.randint(1, 20)))
            + ("\tthe film ." if row % 5 == 0 else "") + "\n" for row in range(60)))

    def arguments(self, output, *more):
        return ["--train_corpus", self.text, *super().arguments(output, *more)[2:]]

    def made(self) -> list[Path]:
        """The folders of instances in the cache."""
        return [path for path in (self.cache / "instances").glob("*") if path.name[0] != "."]


@pytest.fixture
def text_setup(tmp_path, monkeypatch):
    return TextSetup(tmp_path, monkeypatch)


def test_one_command_distils_from_sentences_and_a_second_one_finds_the_instances(
    text_setup, caplog
):
    caplog.set_level("INFO")
    more = ("--num_train_epochs", 2, "--max_seq_length", 16)
    first = text_setup.run("first", *more)
    assert read_json(first / "eval_results.json")["rows"] == 60
    assert len(text_setup.made()) == 1 and "made by an earlier call" not in caplog.text
    again = text_setup.run("again", *more, "--reduce_memory", "--num_workers", 2)
    assert len(text_setup.made()) == 1 and "made by an earlier call" in caplog.text
    run(pregenerate_training_data, "--train_corpus", text_setup.text, "--instances", "lines",
        "--bert_model", text_setup.teacher, "--max_seq_len", 16, "--output_dir",
        text_setup.root / "data")
    text_setup.corpus = text_setup.root / "data"
    two_commands = GeneralSetup.arguments(text_setup, "two", *more)
    run(general_distill, *two_commands)
    for other in (again, text_setup.root / "two"):
        assert same_weights(weights(first), weights(other))


def test_a_chinese_bert_and_sentences_give_a_student_of_its_vocabulary(text_setup):
    golden = read_json(GOLDEN / "chinese_fork_data.json")
    make_model(text_setup.teacher, BertModel, vocab_size=len(golden["vocab"]))
    write_vocab(text_setup.teacher, golden["vocab"])
    config_folder(text_setup.student, num_hidden_layers=2, hidden_size=12, vocab_size=21128)
    text_setup.text.write_text("\n".join(golden["corpus_lines"]), encoding="utf-8")
    output = text_setup.run("out", "--num_train_epochs", 2, "--long_lines", "split",
                            "--max_seq_length", 64)
    results = read_json(output / "eval_results.json")
    # 14 lines that are not blank; the longest, of 150 word pieces, fills three instances.
    assert results["rows"] == 16
    student = TinyBertForPreTraining.from_pretrained(output)
    assert student.config.vocab_size == len(golden["vocab"])
    assert (output / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1] == golden["vocab"]


def test_the_instances_are_kept_by_content(text_setup):
    more = ("--num_train_epochs", 2, "--eval_step", 99)
    text_setup.run("a", *more)
    copied = text_setup.root / "elsewhere" / "b.txt.gz"
    copied.parent.mkdir()
    copied.write_bytes(gzip.compress(b"the film .\n"))
    same = text_setup.root / "elsewhere" / "same.txt"
    same.write_bytes(text_setup.text.read_bytes())
    # Elsewhere, for other passes and another seed: lines do not depend on them.
    run(general_distill, "--train_file_path", same, *text_setup.arguments(
        "b", "--num_train_epochs", 1, "--seed", 7)[2:])
    assert len(text_setup.made()) == 1
    changes = [("--max_seq_length", 16), ("--long_lines", "split"), ("--instances", "packed"),
               ("--instances", "packed", "--seed", 7),
               ("--instances", "packed", "--num_train_epochs", 3),
               ("--train_corpus", text_setup.text, copied)]
    for number, change in enumerate(changes):
        text_setup.run(f"c{number}", *more, *change)
        assert len(text_setup.made()) == 2 + number
    epochs = sorted(len([*folder.glob("epoch_*_metrics.json")]) for folder in text_setup.made())
    assert epochs == [1, 1, 1, 1, 2, 2, 3]
    text_setup.text.write_text(text_setup.text.read_text() + "a book .\n")
    text_setup.run("d", *more)
    assert len(text_setup.made()) == 2 + len(changes)


def test_damaged_instances_are_made_again(text_setup, caplog):
    first = text_setup.run("first", "--num_train_epochs", 1)
    [folder] = text_setup.made()
    for name, damage in (("corpus.bin", lambda data: data[:-2]), ("instances.json", lambda _: b"["),
                         ("epoch_0.bin", None)):
        if damage:
            (folder / name).write_bytes(damage((folder / name).read_bytes()))
        else:
            (folder / name).unlink()
        again = text_setup.run(name, "--num_train_epochs", 1)
        assert f"{folder}: damaged" in caplog.text and text_setup.made() == [folder]
        assert same_weights(weights(first), weights(again))
        caplog.clear()


def test_of_two_calls_at_once_one_makes_the_instances_and_a_killed_one_leaves_nothing(text_setup):
    line = text_setup.text.read_text() * 10
    text_setup.text.write_text(line * 200)
    commands = [script("general_distill.py", *text_setup.arguments(name, "--num_train_epochs",
                                                                   0.0001))
                for name in ("one", "two")]
    process = Process(commands[0])
    assert process.wait_until(lambda log: [*text_setup.cache.glob("instances/.*/*/corpus.bin")])
    process.kill()
    assert not text_setup.made()
    processes = [Process(command) for command in commands]
    assert [process.end() for process in processes] == [0, 0]
    waited = ["made by an earlier call" in process.output() for process in processes]
    assert sorted(waited) == [False, True]
    assert not [path for path in text_setup.cache.glob("instances/.*") if path.is_dir()]


def test_processes_of_one_run_share_the_instances(text_setup):
    arguments = text_setup.arguments("out", "--num_train_epochs", 2)
    process = Process(torchrun(2, "general_distill.py", *arguments))
    assert process.end() == 0, process.output()
    assert len(text_setup.made()) == 1
    assert read_json(text_setup.root / "out" / "eval_results.json")["rows"] == 60


def test_a_run_is_not_resumed_on_another_text(text_setup, capsys):
    more = ("--num_train_epochs", 1)
    output = text_setup.run("out", *more)
    (output / "eval_results.json").unlink()  # as of a run that was stopped
    text_setup.run("out", *more, "--resume")
    (output / "eval_results.json").unlink()
    text_setup.text.write_text("another text .\n" * 20)
    message = error_line(capsys, general_distill, *text_setup.arguments("out", *more, "--resume"))
    assert "--resume: --train_corpus or the vocabulary is no longer what" in message
    assert len(text_setup.made()) == 1


@pytest.mark.parametrize(("content", "contains"), [
    (b"", ["no line of text", "one sentence a line"]),
    ("\n \u3000\n\t\n".encode(), ["no line of text"]),
    (b"PAR1\x15", ["Parquet", "prepare_data.py"]),
    ("今天天气很好\n".encode("gb18030"), ["line 1", "UTF-8"]),
    (None, ["no such file or folder"]),
])
def test_a_text_that_gives_no_instances_is_refused_before_a_model_is_loaded(
    text_setup, capsys, content, contains
):
    (text_setup.teacher / "pytorch_model.bin").write_bytes(b"not read")
    text_setup.text.unlink()
    if content is not None:
        text_setup.text.write_bytes(content)
    with pytest.raises(SystemExit):
        text_setup.run("out")
    *_, message = capsys.readouterr().err.splitlines()  # below a progress bar
    assert all(part in message for part in ("error: ", "sentences.txt", *contains))
    assert not text_setup.made() and not (text_setup.root / "out").exists()


def test_data_comes_from_one_place_and_its_flags_belong_to_text(setup, capsys):
    (setup.root / "text.txt").write_text("a film .\n")
    for more in (["--train_corpus", setup.root / "text.txt"], []):
        arguments = setup.arguments("out", *more)
        with pytest.raises(SystemExit):
            run(general_distill, *(arguments if more else arguments[2:]))
        message = capsys.readouterr().err
        assert "--pregenerated_data" in message and "--train_corpus" in message
    for flags in (("--instances", "lines"), ("--num_workers", 2)):
        setup.expect_error(capsys, *flags, contains=[flags[0], "--train_corpus"])


# ------------------------------------------------------------------ the student's vocabulary


@pytest.mark.parametrize("size", [None, 30522, 7])
def test_a_student_from_scratch_takes_the_teachers_vocabulary_size(setup, caplog, size):
    caplog.set_level("INFO")
    path = setup.student / "config.json"
    config = {name: value for name, value in read_json(path).items() if name != "vocab_size"}
    path.write_text(json.dumps(config | ({"vocab_size": size} if size else {})))
    output = setup.run("out", "--num_train_epochs", 1)
    pieces = len(read_json(setup.teacher / "tokenizer.json")["model"]["vocab"])
    assert read_json(output / "config.json")["vocab_size"] == pieces
    assert f"{path}: vocab_size is {size or 'missing'}" in caplog.text
    TinyBertForPreTraining.from_pretrained(output)


@pytest.mark.parametrize("flags", [[], ["--continue_train"]])
def test_a_student_with_weights_of_another_vocabulary_is_named(setup, capsys, flags):
    make_model(setup.student, TinyBertForPreTraining, num_hidden_layers=2, hidden_size=12,
               vocab_size=400)
    setup.expect_error(capsys, *flags, contains=[
        f"{setup.student}/config.json: vocab_size is 400; expected ", str(setup.teacher)])


def test_a_trained_student_of_other_pieces_is_named_though_they_are_as_many(setup, capsys):
    make_model(setup.student, TinyBertForPreTraining, num_hidden_layers=2, hidden_size=12)
    write_vocab(setup.student, [*PIECES[:-1], ";"])
    setup.expect_error(capsys, "--continue_train", contains=[
        f"{setup.student}: its vocabulary has other pieces than that of {setup.teacher}"])
