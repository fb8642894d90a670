"""Fine-tuning on a task: never worse than before, heads and names kept, mistakes named."""


import pytest
import torch
from helpers import (
    ALL_TASKS,
    FinetuneSetup,
    config_folder,
    error_line,
    make_model,
    read_json,
    read_log,
    run,
    same_weights,
    weights,
    write_vocab,
)
from tiny_tokenizers import byte_bpe
from transformers import AutoModelForSequenceClassification

import finetune_teacher
from transformer.modeling import (
    BertForMaskedLM,
    TinyBertForPreTraining,
    TinyBertForSequenceClassification,
)
from transformer.tokenization import load_tokenizer


@pytest.fixture
def sst2(tmp_path):
    return FinetuneSetup(tmp_path, rows=48, dev_rows=20)


@pytest.mark.parametrize("name", ALL_TASKS)
def test_every_task_is_trained_and_named(tmp_path, name):
    setup = FinetuneSetup(tmp_path, name, rows=11, dev_rows=8)
    output = setup.run("out", "--num_train_epochs", 2)
    assert {p.name for p in output.iterdir()} == {
        "config.json", "pytorch_model.bin", "vocab.txt", "tokenizer.json", "tokenizer_config.json",
        "args.json", "eval_results.txt", "eval_results.json", "log.jsonl"}
    result = read_json(output / "eval_results.json")
    assert result["task"] == name and set(result["metrics"]) == set(setup.task.metrics)
    config = read_json(output / "config.json")
    assert tuple(config["id2label"].values()) == (setup.task.labels or ("LABEL_0",))
    assert config["finetuning_task"] == name
    log = read_log(output)
    assert [line["epoch"] for line in log] == [0, 1, 2]
    assert set(log[0]["all_metrics"]) == set(setup.task.dev_files)


def test_a_task_that_can_be_learned_is_learned(sst2):
    output = sst2.run("out", "--num_train_epochs", 25, "--learning_rate", 5e-3)
    result = read_json(output / "eval_results.json")
    assert result["metrics"]["acc"] >= 0.9
    assert read_log(output)[-1]["loss"] < 0.3


def test_regression_is_learned(tmp_path):
    setup = FinetuneSetup(tmp_path, "STS-B", rows=24)
    output = setup.run("out", "--num_train_epochs", 40, "--learning_rate", 5e-3)
    log = read_log(output)
    assert log[-1]["loss"] < 0.5 * log[1]["loss"]


def test_the_result_is_never_worse_than_before(sst2):
    good = sst2.run("good", "--num_train_epochs", 25, "--learning_rate", 5e-3)
    score = read_json(good / "eval_results.json")["metrics"]
    sst2.model = good
    # A rate that ruins the model: nothing of it may be kept.
    again = sst2.run("again", "--num_train_epochs", 3, "--learning_rate", 5.0)
    result = read_json(again / "eval_results.json")
    assert result["before"] == score == result["metrics"] == result["best"]
    assert result["last"]["acc"] < score["acc"]
    assert same_weights(weights(good), weights(again))


def test_without_epochs_it_only_measures_and_copies(sst2):
    output = sst2.run("out", "--num_train_epochs", 0)
    assert same_weights(weights(sst2.model), weights(output))
    result = read_json(output / "eval_results.json")
    assert result["selection"].startswith("best of 1 dev evaluation")


def test_the_labels_of_the_model_stay_in_its_own_order(tmp_path):
    setup = FinetuneSetup(tmp_path, "RTE")
    make_model(setup.model, labels=("not_entailment", "entailment"), num_hidden_layers=2)
    output = setup.run("out", "--num_train_epochs", 1)
    assert list(read_json(output / "config.json")["id2label"].values()) == [
        "not_entailment", "entailment"]


def test_the_result_gives_the_same_logits_in_hugging_face(sst2):
    output = sst2.run("out", "--num_train_epochs", 1)
    ids = torch.randint(5, 25, (3, 7))
    ours = TinyBertForSequenceClassification.from_pretrained(output).eval()(ids)[0]
    theirs = AutoModelForSequenceClassification.from_pretrained(output).eval()(ids).logits
    torch.testing.assert_close(ours, theirs)


def test_a_base_model_needs_the_word_for_a_new_classifier(sst2, capsys):
    make_model(sst2.model, BertForMaskedLM, num_hidden_layers=2)
    message = error_line(capsys, finetune_teacher, *sst2.arguments("out"))
    assert "classifier.weight" in message and "--new_classifier" in message
    assert not (sst2.root / "out").exists()
    output = sst2.run("out", "--new_classifier", "--num_train_epochs", 1)
    assert list(read_json(output / "config.json")["id2label"].values()) == ["0", "1"]
    TinyBertForSequenceClassification.from_pretrained(output)


def test_a_new_classifier_replaces_one_of_another_task(sst2):
    model = make_model(sst2.model, labels=("a", "b", "c"), num_hidden_layers=2)
    output = sst2.run("three", "--new_classifier", "--num_train_epochs", 0)
    assert weights(output)["classifier.weight"].shape == (2, 16)
    model = make_model(sst2.model, labels=("equivalent", "not_equivalent"), num_hidden_layers=2)
    output = sst2.run("two", "--new_classifier", "--num_train_epochs", 0)
    assert not torch.equal(weights(output)["classifier.weight"], model.classifier.weight)
    assert torch.equal(weights(output)["bert.pooler.dense.weight"], model.bert.pooler.dense.weight)


def test_random_weights_in_a_given_shape_need_only_config_and_vocabulary(sst2):
    shape = config_folder(sst2.root / "shape", num_hidden_layers=1, hidden_size=12,
                          vocab_size=21128)  # the vocabulary's size wins
    write_vocab(sst2.root / "words")
    sst2.model = shape
    output = sst2.run("out", "--from_scratch", "--vocab_dir", sst2.root / "words",
                      "--num_train_epochs", 1)
    assert weights(output)["classifier.weight"].shape == (2, 12)
    words = (sst2.root / "words" / "vocab.txt").read_text().splitlines()
    assert weights(output)["bert.embeddings.word_embeddings.weight"].shape == (len(words), 12)
    assert (output / "vocab.txt").read_text() == (sst2.root / "words" / "vocab.txt").read_text()


@pytest.mark.parametrize("stated", [{}, {"vocab_size": 360}])
def test_random_weights_train_the_first_token_of_any_tokenizer(sst2, stated):
    """RoBERTa's padding has the id 1, and id 0 is <s>, which a BERT's padding_idx would freeze."""
    sst2.model = config_folder(sst2.root / "shape", num_hidden_layers=1, hidden_size=12, **stated)
    words = byte_bpe(sst2.root / "words")
    output = sst2.run("out", "--from_scratch", "--vocab_dir", words, "--num_train_epochs", 0)
    model = TinyBertForSequenceClassification.from_pretrained(output)
    assert (model.config.pad_token_id, model.config.type_vocab_size) == (1, 1)
    model(torch.tensor([[0, 7, 2, 1]]))[0][0, 0].backward()
    gradient = model.bert.embeddings.word_embeddings.weight.grad
    assert gradient[0].any() and len(gradient) == len(load_tokenizer(words))


def test_a_general_student_can_be_trained_without_distillation(sst2):
    make_model(sst2.model, TinyBertForPreTraining, num_hidden_layers=2, hidden_size=12,
               model_arguments={"fit_size": 16})
    output = sst2.run("out", "--new_classifier", "--num_train_epochs", 1)
    assert weights(output)["classifier.weight"].shape == (2, 12)


def test_the_task_may_be_named_by_its_folder_or_is_what_the_folder_shows(sst2):
    arguments = sst2.arguments("out", "--num_train_epochs", 0)[2:]
    run(finetune_teacher, *arguments)
    assert read_json(sst2.root / "out" / "eval_results.json")["task"] == "sst-2"
    assert not (sst2.root / "out" / "task.json").exists()
    sst2.data.rename(sst2.root / "mine")
    arguments[1] = sst2.root / "mine"
    run(finetune_teacher, *arguments, "--overwrite_output_dir")
    assert read_json(sst2.root / "out" / "eval_results.json")["task"] == "mine"
    assert read_json(sst2.root / "out" / "task.json")["labels"] == ["0", "1"]


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(("more", "contains"), [
    (("--task_name", "nope"), ["nope", *ALL_TASKS]),
    (("--bert_model", "no/such"), ["no/such"]),
    (("--data_dir", "no/such"), ["no/such"]),
    (("--vocab_dir", "no/such"), ["no/such"]),
])
def test_a_mistake_is_one_line_and_nothing_is_written(sst2, capsys, more, contains):
    sst2.expect_error(capsys, *more, contains=contains)


def test_a_vocabulary_that_does_not_fit_is_named(sst2, capsys):
    write_vocab(sst2.root / "words", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
                                      *(f"w{i}" for i in range(90))])
    sst2.expect_error(capsys, "--vocab_dir", sst2.root / "words", contains=["95 word pieces"])
