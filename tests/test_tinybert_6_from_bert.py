"""Smart initialisation: the right layers, bit for bit, heads and names kept."""

import pytest
import torch
from helpers import (
    error_line,
    make_glue,
    make_model,
    random_batch,
    read_json,
    run,
    run_process,
    weights,
)
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

import task_distill
import tinybert_6_from_bert
from transformer.modeling import (
    BertForMaskedLM,
    BertModel,
    TinyBertForSequenceClassification,
)

LAYER = "bert.encoder.layer."


def layer_weights(folder, number: int) -> dict[str, torch.Tensor]:
    """The tensors of one layer, counted from 1."""
    prefix = f"{LAYER}{number - 1}."
    return {k.removeprefix(prefix): v for k, v in weights(folder).items() if k.startswith(prefix)}


def check_layers(source, target, kept) -> None:
    """The student's layers are the teacher's `kept` bit for bit, everything else unchanged."""
    for place, number in enumerate(kept, start=1):
        ours, theirs = layer_weights(target, place), layer_weights(source, number)
        assert len(ours) == 16 and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    rest = {k: v for k, v in weights(source).items() if not k.startswith(LAYER)}
    student = weights(target)
    assert {k for k in student if not k.startswith(LAYER)} == rest.keys()
    assert all(torch.equal(student[k], v) for k, v in rest.items())
    assert read_json(target / "config.json")["num_hidden_layers"] == len(kept)


def copy(source, target, *more):
    run(tinybert_6_from_bert, "--bert_model", source, "--output_dir", target, *more)
    return target


def test_the_layers_that_distillation_aims_at_are_copied_bit_for_bit(tmp_path):
    make_model(tmp_path / "m", num_hidden_layers=12, labels=("no", "yes"))
    copy(tmp_path / "m", tmp_path / "s")
    check_layers(tmp_path / "m", tmp_path / "s", [2, 4, 6, 8, 10, 12])
    assert (tmp_path / "s" / "vocab.txt").read_bytes() == (
        tmp_path / "m" / "vocab.txt").read_bytes()


def test_another_process_writes_the_same_bytes(tmp_path):
    make_model(tmp_path / "m", num_hidden_layers=4)
    copy(tmp_path / "m", tmp_path / "here", "--num_layers", 2)
    result = run_process("tinybert_6_from_bert.py", "--bert_model", tmp_path / "m",
                         "--output_dir", tmp_path / "there", "--num_layers", 2)
    assert result.returncode == 0, result.stderr
    for path in (tmp_path / "here").iterdir():
        assert (tmp_path / "there" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("layers", "flags", "kept"), [
    (6, ("--num_layers", 3), [2, 4, 6]),
    (2, ("--num_layers", 2), [1, 2]),
    (6, ("--num_layers", 4), [2, 4, 5, 6]),
    (12, ("--keep_layers", "1,3,5,7,9,11"), [1, 3, 5, 7, 9, 11]),
    (12, ("--keep_layers", "12,1"), [12, 1]),
])
def test_any_depth_works_and_other_layers_can_be_chosen(
    tmp_path, layers, flags, kept
):
    make_model(tmp_path / "m", num_hidden_layers=layers)
    copy(tmp_path / "m", tmp_path / "s", *flags)
    check_layers(tmp_path / "m", tmp_path / "s", kept)


def test_the_classifier_and_its_names_are_kept(tmp_path):
    teacher = make_model(tmp_path / "m", num_hidden_layers=4, labels=("entailment", "no"))
    copy(tmp_path / "m", tmp_path / "s", "--num_layers", 2)
    student = TinyBertForSequenceClassification.from_pretrained(tmp_path / "s").eval()
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)
    assert student.config.id2label == {0: "entailment", 1: "no"}
    ids, segments, mask = random_batch()
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "s").eval()
    torch.testing.assert_close(
        theirs(ids, token_type_ids=segments, attention_mask=mask).logits,
        student(ids, segments, mask)[0])


def test_the_masked_lm_head_is_kept(tmp_path):
    make_model(tmp_path / "m", BertForMaskedLM, num_hidden_layers=4)
    copy(tmp_path / "m", tmp_path / "s", "--num_layers", 2)
    check_layers(tmp_path / "m", tmp_path / "s", [2, 4])
    student = BertForMaskedLM.from_pretrained(tmp_path / "s").eval()
    ids, segments, mask = random_batch()
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "s").eval()
    torch.testing.assert_close(
        theirs(ids, token_type_ids=segments, attention_mask=mask).logits[mask.bool()],
        student(ids, segments, mask).logits[mask.bool()])


def test_a_base_model_without_prefix_works(tmp_path):
    make_model(tmp_path / "m", BertModel, num_hidden_layers=4)
    assert "encoder.layer.0.attention.self.query.weight" in weights(tmp_path / "m")
    copy(tmp_path / "m", tmp_path / "s", "--num_layers", 2)
    expected = BertModel.from_pretrained(tmp_path / "m").encoder.layer[3]
    found = BertModel.from_pretrained(tmp_path / "s").encoder.layer[1]
    assert torch.equal(found.output.dense.weight, expected.output.dense.weight)


def test_the_result_starts_both_stages_of_task_distillation(tmp_path):
    make_model(tmp_path / "m", labels=("0", "1"))
    copy(tmp_path / "m", tmp_path / "s", "--num_layers", 2)
    data = make_glue(tmp_path / "SST-2")
    for flags in ((), ("--pred_distill",)):
        run(task_distill, "--teacher_model", tmp_path / "m", "--student_model", tmp_path / "s",
            "--data_dir", data, "--task_name", "sst-2", "--num_train_epochs", 1,
            "--precision", "fp32", "--output_dir", tmp_path / f"out{len(flags)}", *flags)


def test_without_flags_it_makes_the_five_students_of_the_full_run(tmp_path):
    models = tmp_path / "models"
    for name in ("rte", "cola", "sst2", "mrpc"):
        make_model(models / f"final_{name}_teacher", num_hidden_layers=6)
    make_model(models / "bert-base-uncased", BertForMaskedLM, num_hidden_layers=6)
    run(tinybert_6_from_bert, "--models_dir", models)
    for name in ("rte", "cola", "sst2", "mrpc"):
        TinyBertForSequenceClassification.from_pretrained(
            models / f"tinybert_6l_smart_init_direct_{name}")
    BertForMaskedLM.from_pretrained(models / "tinybert_6l_smart_init_direct_base")


def test_a_missing_model_of_the_full_run_is_named_and_nothing_is_written(tmp_path, capsys):
    make_model(tmp_path / "bert-base-uncased", num_hidden_layers=6)
    message = error_line(capsys, tinybert_6_from_bert, "--models_dir", tmp_path)
    assert "final_rte_teacher" in message
    assert [p.name for p in tmp_path.iterdir()] == ["bert-base-uncased"]


# ------------------------------------------------------------------ mistakes


@pytest.fixture
def source(tmp_path):
    make_model(tmp_path / "m", num_hidden_layers=4)
    return tmp_path / "m"


@pytest.mark.parametrize(("more", "contains"), [
    ((), ["4 layers", "6"]),
    (("--num_layers", 0), ["--num_layers 0"]),
    (("--keep_layers", "2,5"), ["2,5", "1 to 4"]),
    (("--keep_layers", "0,1"), ["0,1", "1 to 4"]),
    (("--keep_layers", "two"), ["two", "numbers"]),
    (("--keep_layers", "1,2", "--num_layers", 3), ["1,2", "--num_layers 3"]),
    (("--bert_model", "no/such"), ["no/such"]),
])
def test_a_mistake_is_one_line_and_nothing_is_written(source, tmp_path, capsys, more, contains):
    message = error_line(capsys, tinybert_6_from_bert, "--bert_model", source,
                         "--output_dir", tmp_path / "s", *more)
    for text in contains:
        assert text in message
    assert not (tmp_path / "s").exists()


def test_model_and_output_belong_together(source, capsys):
    message = error_line(capsys, tinybert_6_from_bert, "--bert_model", source)
    assert "--output_dir" in message


def test_a_checkpoint_with_other_layers_than_its_config_is_refused(source, tmp_path, capsys):
    state = weights(source)
    for part in ("layer.3.", "layer.1.output"):
        torch.save({k: v for k, v in state.items() if part not in k},
                   source / "pytorch_model.bin")
        message = error_line(capsys, tinybert_6_from_bert, "--bert_model", source,
                             "--output_dir", tmp_path / "s", "--num_layers", 2)
        assert "layer" in message
        assert not (tmp_path / "s").exists()
