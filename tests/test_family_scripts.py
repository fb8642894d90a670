"""Relatives of BERT in the scripts: each takes them without new flags, or refuses in one line."""

from pathlib import Path

import pytest
import torch
import transformers
from helpers import (
    REPO,
    config_folder,
    error_line,
    kprune_script,
    make_glue,
    make_model,
    make_pregenerated,
    predicted,
    random_batch,
    read_json,
    run,
    tiny_config,
    write_vocab,
)
from relatives import published, their_config, their_model

import export_model
import finetune_teacher
import general_distill
import pretrain_bert
import quantize
import task_distill
import tinybert_6_from_bert
from transformer.config import BertConfig
from transformer.inference import load_classifier
from transformer.modeling import (
    BertModel,
    PackedLinear,
    TinyBertForPreTraining,
    TinyBertForSequenceClassification,
    can_pack,
    freeze,
)

kprune_main = kprune_script()

FAMILIES = ["roberta", "electra, narrow embeddings", "albert", "distilbert"]
OWN_LAYERS = [shape for shape in FAMILIES if shape != "albert"]
TEXTS = ["a good film .", "the story was AWFUL, sad and ugly", "we saw it"]
each_family = pytest.mark.parametrize("shape", FAMILIES)
each_with_own_layers = pytest.mark.parametrize("shape", OWN_LAYERS)


def teacher(folder: Path, shape: str, kind: str = "SequenceClassification", **changes):
    """Save a relative of BERT with our word pieces, and with positions for 128 of them."""
    values = {"max_position_embeddings": 140, "pad_token_id": 0, "id2label": {0: "0", 1: "1"},
              "label2id": {"0": 0, "1": 1}, **changes}
    return their_model(folder, shape, kind, **values)


def architecture(folder: Path) -> str:
    """Return the class of a folder for Hugging Face, which must find every weight, and no more."""
    config = transformers.AutoConfig.from_pretrained(folder)
    name, = config.architectures
    _, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return name


def pipeline_probabilities(folder: Path, rows: list[tuple[str, ...]]) -> list[dict[str, float]]:
    """What the pipeline of Hugging Face's library says of each row."""
    classify = transformers.pipeline("text-classification", model=str(folder), device="cpu",
                                     top_k=None)
    given = [dict(zip(("text", "text_pair"), row, strict=False)) for row in rows]
    return [{label["label"]: label["score"] for label in classify([row])[0]} for row in given]


def compare(folder: Path, rows: list[tuple[str, ...]]) -> None:
    found, expected = predicted(folder, rows), pipeline_probabilities(folder, rows)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert len({round(max(row.values()), 3) for row in found}) > 1  # or the test could not fail


# ------------------------------------------------------------------ fine-tuning and export


@each_family
def test_a_fine_tuned_relative_stays_what_it_is_for_everybody(tmp_path, shape):
    published(tmp_path / "base", shape, "MaskedLM" if shape != "albert" else "PreTraining")
    data = make_glue(tmp_path / "data", "RTE")
    run(finetune_teacher, "--task_name", "RTE", "--data_dir", data, "--bert_model",
        tmp_path / "base", "--new_classifier", "--output_dir", tmp_path / "tuned",
        "--learning_rate", 1e-2, "--num_train_epochs", 2, "--train_batch_size", 8, "--no_cuda",
        "--precision", "fp32", "--max_seq_length", 64)
    expected = type(their_model(tmp_path / "x", shape)).__name__
    assert architecture(tmp_path / "tuned") == expected
    run(export_model, "--model", tmp_path / "tuned", "--output_dir", tmp_path / "out",
        *([] if shape == "albert" else ["--onnx"]))
    assert architecture(tmp_path / "out") == expected
    rows = [*zip(TEXTS, reversed(TEXTS), strict=True)]
    labels = {"0": "entailment", "1": "not_entailment"}
    assert read_json(tmp_path / "out" / "config.json")["id2label"] == labels
    found = [predicted(tmp_path / name, rows) for name in ("tuned", "out")]
    for row in zip(*found, pipeline_probabilities(tmp_path / "out", rows), strict=True):
        assert row[0] == pytest.approx(row[1], abs=1e-6)
        assert row[0] == pytest.approx(row[2], abs=1e-5)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"- {BertConfig.from_json_file(tmp_path / 'out' / 'config.json').family}\n" in card
    assert "library_name: transformers" in card


@each_family
def test_a_pair_of_texts_is_judged_as_hugging_face_judges_it(tmp_path, shape):
    """A pair's segments do not reach a model that has none."""
    published(tmp_path / "model", shape)
    compare(tmp_path / "model", [*zip(TEXTS, reversed(TEXTS), strict=True)])
    compare(tmp_path / "model", [(text,) for text in TEXTS])


@each_with_own_layers
@pytest.mark.parametrize("method", ["fp32", "int8-dynamic"])
@torch.no_grad()
def test_a_relative_as_onnx_gives_the_logits_of_pytorch(tmp_path, shape, method):
    teacher(tmp_path / "model", shape)
    run(quantize, "--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--method",
        method, "--format", "onnx")
    before, made = load_classifier(tmp_path / "model").eval(), load_classifier(tmp_path / "out")
    inputs = random_batch(16, 11)  # whose segments only some models read
    expected = before(*inputs).logits
    difference = (made(*inputs).logits - expected).abs().max() / expected.std()
    assert difference < (1e-5 if method == "fp32" else 0.2)
    assert made.parameter_total == before.parameter_total
    family = before.config.family
    assert read_json(tmp_path / "out" / "config.json")["model_type"] == family
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("a film")["input_ids"]


@each_family
def test_half_precision_is_written_under_the_familys_names(tmp_path, shape):
    model = teacher(tmp_path / "model", shape)
    run(quantize, "--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--method",
        "bf16", "--format", "torch")
    assert architecture(tmp_path / "out") == type(model).__name__
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"


@torch.no_grad()
def test_layers_that_share_weights_are_packed_once(tmp_path):
    if not can_pack():
        pytest.skip("this torch has no packed layers")
    teacher(tmp_path, "albert", hidden_size=64, intermediate_size=128)
    model = TinyBertForSequenceClassification.from_pretrained(tmp_path)
    inputs = random_batch()
    expected = model.eval()(*inputs).logits
    packed = freeze(model, torch.bfloat16, torch.device("cpu"))
    layer, = packed.bert.encoder.layer
    assert isinstance(layer.output.dense, PackedLinear)
    assert isinstance(packed.bert.embeddings.project, PackedLinear)
    assert (packed(*inputs).logits - expected).abs().max() < 0.1 * expected.std()


# ------------------------------------------------------------------ smaller ones


@each_with_own_layers
@pytest.mark.parametrize("kind", ["SequenceClassification", ""])
@torch.no_grad()
def test_a_copy_of_some_layers_stays_of_its_family(tmp_path, shape, kind):
    theirs = teacher(tmp_path / "model", shape, kind, num_hidden_layers=4)
    run(tinybert_6_from_bert, "--bert_model", tmp_path / "model", "--output_dir",
        tmp_path / "out", "--num_layers", 2)
    assert architecture(tmp_path / "out") == type(theirs).__name__
    whole, copy = (BertModel.from_pretrained(tmp_path / name).eval() for name in ("model", "out"))
    inputs = random_batch()
    assert torch.equal(copy(*inputs).hidden_states[0], whole(*inputs).hidden_states[0])
    for mine, place in ((0, 1), (1, 3)):
        for a, b in zip(copy.encoder.layer[mine].parameters(),
                        whole.encoder.layer[place].parameters(), strict=True):
            assert torch.equal(a, b)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    ids, _, mask = inputs
    hidden = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(copy(ids, None, mask).hidden_states[-1][mask.bool()],
                               hidden[mask.bool()], atol=1e-5, rtol=0)


@each_with_own_layers
@torch.no_grad()
def test_a_pruned_relative_is_a_model_directory_and_filled_up_what_it_was(tmp_path, shape):
    model = teacher(tmp_path / "model", shape)
    make_glue(tmp_path / "glue")
    run(kprune_main, "--model_name", tmp_path / "model", "--ckpt_dir", tmp_path / "model",
        "--task_name", "sst2", "--data_dir", tmp_path / "glue", "--output_dir", tmp_path / "out",
        "--constraint", 0.3, "--num_tokens", 150, "--no_cuda", "--sublayerwise_tuning")
    pruned = load_classifier(tmp_path / "out").eval()
    assert pruned.config.model_type == "pruned_bert"
    assert sum(pruned.config.heads) < 8 or sum(pruned.config.neurons) < 96
    run(task_distill, "--do_eval", "--student_model", tmp_path / "out", "--data_dir",
        tmp_path / "glue", "--task_name", "SST-2", "--output_dir", tmp_path / "eval",
        "--precision", "fp32", "--no_cuda")
    assert read_json(tmp_path / "eval" / "eval_results.json")["metrics"] == pytest.approx(
        read_json(tmp_path / "out" / "kprune.json")["after"]["metrics"])
    run(quantize, "--model", tmp_path / "out", "--output_dir", tmp_path / "onnx", "--method",
        "fp32")
    inputs = random_batch()
    expected = pruned(*inputs).logits
    made = load_classifier(tmp_path / "onnx")
    torch.testing.assert_close(made(*inputs).logits, expected, atol=1e-5, rtol=0)
    assert made.parameter_total == pruned.parameter_total
    run(export_model, "--model", tmp_path / "out", "--padded", "--output_dir", tmp_path / "full")
    assert architecture(tmp_path / "full") == type(model).__name__
    torch.testing.assert_close(load_classifier(tmp_path / "full").eval()(*inputs).logits,
                               expected, atol=1e-5, rtol=0)


def test_the_published_name_of_another_kind_is_refused(tmp_path, capsys):
    teacher(tmp_path / "model", "distilbert")
    make_glue(tmp_path / "glue")
    for name, fits in (("distilbert-base-uncased", True), ("roberta-base", False),
                       ("bert-base-uncased", False)):
        arguments = ("--model_name", name, "--ckpt_dir", tmp_path / "model", "--task_name", "sst2",
                     "--data_dir", tmp_path / "glue", "--output_dir", tmp_path / "out",
                     "--constraint", 0.3, "--num_tokens", 150, "--no_cuda")
        if fits:
            run(kprune_main, *arguments, "--overwrite_output_dir")
        else:
            assert f"--model_name {name}: neither" in error_line(
                capsys, kprune_main, *arguments, "--overwrite_output_dir")


def test_where_layers_share_weights_none_can_be_taken_out(tmp_path, capsys):
    teacher(tmp_path / "model", "albert")
    make_glue(tmp_path / "glue")
    model, out = tmp_path / "model", ("--output_dir", tmp_path / "out")
    shared = f"{model}/config.json: num_hidden_groups is 1: its layers share their weights; "
    assert shared + "pruning one would prune all" in error_line(
        capsys, kprune_main, "--model_name", model, "--ckpt_dir", model, "--task_name", "sst2",
        "--data_dir", tmp_path / "glue", *out, "--constraint", 0.3)
    assert shared + "there is none to choose" in error_line(
        capsys, tinybert_6_from_bert, "--bert_model", model, *out, "--num_layers", 2)
    assert shared + "expected --method fp16 or bf16 with --format torch" in error_line(
        capsys, quantize, "--model", model, *out, "--method", "int8-dynamic")
    assert shared + "leave out --onnx and --int8" in error_line(
        capsys, export_model, "--model", model, *out, "--int8")
    assert not (tmp_path / "out").exists()


def test_where_a_masked_lm_head_is_needed_a_relative_is_refused(tmp_path, capsys):
    teacher(tmp_path / "model", "roberta", "MaskedLM")
    (tmp_path / "text.txt").write_text("a good film .\n", encoding="utf-8")
    told = "config.json: model_type is 'roberta', whose masked-LM head is not computed here"
    for start in ("--bert_model", "--config"):
        assert told in error_line(
            capsys, pretrain_bert, start, tmp_path / "model", "--train_corpus",
            tmp_path / "text.txt", "--output_dir", tmp_path / "out", "--no_cuda")


# ------------------------------------------------------------------ students


def test_a_general_student_takes_its_teachers_vocabulary(tmp_path, caplog):
    caplog.set_level("INFO")
    pieces = [f"word{number}" for number in range(200)]
    teacher(tmp_path / "teacher", "roberta", "", vocab_size=231, pad_token_id=3)
    write_vocab(tmp_path / "teacher", [*write_vocab(tmp_path / "own").vocab, *pieces])
    config_folder(tmp_path / "student", num_hidden_layers=2, hidden_size=12)
    corpus = make_pregenerated(tmp_path / "corpus")
    run(general_distill, "--pregenerated_data", corpus, "--teacher_model", tmp_path / "teacher",
        "--student_model", tmp_path / "student", "--output_dir", tmp_path / "out",
        "--train_batch_size", 4, "--precision", "fp32", "--no_cuda")
    config = BertConfig.from_json_file(tmp_path / "out" / "config.json")
    assert (config.vocab_size, config.pad_token_id, config.type_vocab_size) == (231, 0, 1)
    assert config.model_type == "bert" and config.max_position_embeddings == 128
    assert "vocab_size is 31; the model takes the vocabulary's, 231 (pad_token_id 0" in caplog.text


@each_family
def test_a_student_may_be_of_any_family(tmp_path, shape):
    """ALBERT's config.json makes the student whose layers share their weights."""
    teacher(tmp_path / "teacher", "roberta", type_vocab_size=2)
    their_config(shape, num_hidden_layers=2, max_position_embeddings=140).save_pretrained(
        tmp_path / "student")
    corpus = make_pregenerated(tmp_path / "corpus")
    run(general_distill, "--pregenerated_data", corpus, "--teacher_model", tmp_path / "teacher",
        "--student_model", tmp_path / "student", "--output_dir", tmp_path / "general",
        "--train_batch_size", 4, "--precision", "fp32", "--no_cuda")
    family = TinyBertForPreTraining.from_pretrained(tmp_path / "general").config.family
    assert family == shape.partition(",")[0]
    data, source = make_glue(tmp_path / "data"), tmp_path / "general"
    for output, *flags in (("first",), ("second", "--pred_distill")):
        run(task_distill, "--teacher_model", tmp_path / "teacher", "--student_model", source,
            "--data_dir", data, "--task_name", "SST-2", "--output_dir", tmp_path / output,
            "--num_train_epochs", 1, "--train_batch_size", 8, "--precision", "fp32", "--no_cuda",
            *flags)
        source = tmp_path / output
    assert architecture(source).endswith("ForSequenceClassification")
    compare(source, [(text,) for text in TEXTS])
    if shape == "albert":
        assert len(load_classifier(source).bert.encoder.layer) == 1


def test_the_example_of_a_shared_layer_student_is_an_albert_of_tinybert4s_shape():
    path = REPO / "profiles" / "albert_4l_config" / "config.json"
    config = BertConfig.from_json_file(path)
    tiny = BertConfig.from_json_file(REPO / "tinybert_4l_config" / "config.json")
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    assert [getattr(config, name) for name in names] == [getattr(tiny, name) for name in names]
    student = TinyBertForSequenceClassification(config)
    theirs = transformers.AutoModelForSequenceClassification.from_config(
        transformers.AutoConfig.from_pretrained(path.parent))
    assert student.parameter_total == theirs.num_parameters()
    total = TinyBertForSequenceClassification(tiny).parameter_total
    told = (REPO / "docs" / "teachers.md").read_text(encoding="utf-8")
    assert f"{student.parameter_total / 1e6:.1f} million parameters instead of {total / 1e6:.1f}" \
        in " ".join(told.split())


def test_a_bert_of_shared_layers_is_not_exported(tmp_path, capsys):
    make_model(tmp_path / "model", num_hidden_groups=1)
    assert "its layers share their weights; what others read of such a kind is an ALBERT" in \
        error_line(capsys, export_model, "--model", tmp_path / "model", "--output_dir",
                   tmp_path / "out")


def test_berts_own_config_has_no_field_of_its_relatives():
    assert not {"family", "embedding_size", "num_hidden_groups"} & tiny_config().to_dict().keys()
