"""get_bert_models.py and fix_teacher_layers.py on tiny models, in folders and on a local hub."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import REPO, error_line, make_glue, read_json, run, same_weights, weights
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from server import COMMIT, FileServer, publish

import finetune_teacher
import fix_teacher_layers
import get_bert_models
from transformer.checkpoint import load_state
from transformer.file_utils import UserError
from transformer.hub import fetch_model
from transformer.modeling import BertForMaskedLM, TinyBertForSequenceClassification
from transformer.tokenization import BertTokenizer

transformers = pytest.importorskip("transformers", reason="transformers makes the tiny models")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", "dog", "ran"]
SHAPE = {
    "vocab_size": len(WORDS), "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 1000,  # weights of several network packets
    "max_position_embeddings": 16,
}
IDS = torch.tensor([[2, 5, 6, 7, 3], [2, 9, 10, 3, 0]])
MASK = (IDS != 0).long()


def save_hub_model(folder: Path, kind: str, *labels: str, **config) -> torch.nn.Module:
    """Save a tiny random model of class `kind` as the hub has them, and return it."""
    torch.manual_seed(len(str(folder)))
    if labels:
        config = {"id2label": dict(enumerate(labels)),
                  "label2id": {label: number for number, label in enumerate(labels)}}
    model = getattr(transformers, kind)(transformers.BertConfig(**SHAPE, **config)).eval()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    return model


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """Model folders by hub id; one teacher has only the old kind of weights file."""
    root = tmp_path_factory.mktemp("hub")
    classifier = "BertForSequenceClassification"
    save_hub_model(root / "org" / "base", "BertForPreTraining")
    save_hub_model(root / "org" / "bare", "BertModel")
    save_hub_model(root / "me" / "base-rte", classifier, "entailment", "not_entailment")
    save_hub_model(root / "me" / "base-stsb", classifier, num_labels=1)
    old = save_hub_model(root / "me" / "base-sst2", classifier, "negative", "positive")
    torch.save(old.state_dict(), root / "me" / "base-sst2" / "pytorch_model.bin")
    (root / "me" / "base-sst2" / "model.safetensors").unlink()
    return root


def get(output_dir: Path, *flags: str | Path) -> None:
    argv = ["--output_dir", str(output_dir), *map(str, flags)]
    get_bert_models.main(get_bert_models.get_args_parser().parse_args(argv))


def from_folders(hub: Path, tasks: str = "rte,sst2") -> list[str]:
    return ["--base_model", str(hub / "org" / "base"), "--tasks", tasks,
            "--teachers", str(hub / "me" / "base-{task}")]


def files(folder: Path) -> list[str]:
    """The names in `folder`, save those of locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


MODELS = {  # what it is made from, its class in Hugging Face's library, and ours
    "bert-base-uncased": ("org/base", "BertForMaskedLM", BertForMaskedLM),
    **{f"bert-base-uncased-{task}": (f"me/base-{task}", "BertForSequenceClassification",
                                     TinyBertForSequenceClassification)
       for task in ("rte", "sst2", "stsb")},
}


def test_base_and_teachers_keep_heads_and_label_names_and_are_left_alone_from_then_on(
    hub, tmp_path, caplog
):
    get(tmp_path, *from_folders(hub, "rte,sst2,stsb"))
    assert files(tmp_path) == list(MODELS)
    for name, (origin, kind, our_class) in MODELS.items():
        folder = tmp_path / name
        assert files(folder) == ["config.json", "pytorch_model.bin", "tokenizer.json",
                                 "tokenizer_config.json", "vocab.txt"]
        assert BertTokenizer.from_pretrained(folder).do_lower_case
        load = getattr(transformers, kind).from_pretrained
        source, saved = load(hub / origin), load(folder)
        models = (source, saved, our_class.from_pretrained(folder))
        with torch.no_grad():
            logits = [model.eval()(IDS, attention_mask=MASK).logits for model in models]
        assert all(torch.allclose(found, logits[0], atol=1e-5) for found in logits)
        assert saved.config.id2label == source.config.id2label
        heads = ("bert.", "cls." if kind == "BertForMaskedLM" else "classifier.")
        assert all(key.startswith(heads) for key in load_state(folder))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with caplog.at_level("INFO"):
        get(tmp_path, "--base_model", "no/such", "--teachers", "no/{task}", "--tasks",
            "RTE,SST-2,STS-B")
        fix_teacher_layers.repair(tmp_path / "bert-base-uncased-rte")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert caplog.text.count("skipped") == 4 and "sound, nothing to do" in caplog.text


@pytest.mark.parametrize(("flags", "message"), [
    (["--base_model", "org/bare"], "not fit BertForMaskedLM. Missing .*cls.predictions"),
    (["--teachers", "rte=org/bare"], r"Missing from it: \[classifier.bias"),
    (["--teachers", "mnli=me/base-rte"], "2 labels; expected 3"),
    (["--base_model", "./absent"], "./absent: no such folder"),
    (["--base_model", "two/slashes/here"], "here: no such folder"),
    (["--base_model", "package:no_package"], "no_package: .*pip install no-package")])
def test_a_model_that_is_missing_or_of_another_kind_is_an_error(
    hub, tmp_path, monkeypatch, flags, message
):
    monkeypatch.chdir(hub)
    with pytest.raises(UserError, match=message):
        get(tmp_path, *from_folders(hub), *flags)
    assert files(tmp_path) == (["bert-base-uncased"] if "--teachers" in flags else [])


def test_the_body_of_a_model_inside_a_package_is_found_and_saved(hub, tmp_path, monkeypatch):
    shutil.copytree(hub / "org" / "bare", tmp_path / "site" / "packed_model" / "data")
    (tmp_path / "site" / "packed_model" / "__init__.py").write_text("raise ImportError('read')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    get(tmp_path, "--base_model", "package:packed_model", "--base_only", "--no_mlm_head",
        "--base_name", "small")
    assert same_weights(load_state(tmp_path / "small"), load_state(hub / "org" / "bare"))


@pytest.mark.parametrize("damaged", ["pytorch_model.bin", "vocab.txt"])
def test_an_incomplete_folder_is_neither_skipped_nor_overwritten(hub, tmp_path, damaged):
    flags = [*from_folders(hub), "--base_only"]
    get(tmp_path, *flags)
    path = tmp_path / "bert-base-uncased" / damaged
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"delete {path.parent} or give --overwrite_output_dir"):
        get(tmp_path, *flags)
    assert path.read_bytes() == content[: len(content) // 2]
    get(tmp_path, *flags, "--overwrite_output_dir")
    assert path.read_bytes() == content and files(tmp_path) == ["bert-base-uncased"]


def test_a_vocabulary_is_read_from_tokenizer_json_and_must_fit_the_model(tmp_path):
    source = tmp_path / "source"
    save_hub_model(source, "BertForMaskedLM")
    vocabulary = source / "vocab.txt"
    transformers.BertTokenizerFast(vocab=str(vocabulary)).backend_tokenizer.save(
        str(source / "tokenizer.json"))
    vocabulary.unlink()
    get(tmp_path, "--base_model", source, "--base_only", "--base_name", "good")
    assert list(BertTokenizer.from_pretrained(tmp_path / "good").vocab) == WORDS
    vocabulary.write_text("".join(f"{word}\n" for word in [*WORDS, "more"]))
    with pytest.raises(UserError, match="vocab.txt and .*tokenizer.json hold different"):
        get(tmp_path, "--base_model", source, "--base_only", "--base_name", "bad")
    assert files(tmp_path) == ["good", "source"]


def test_teachers_are_given_by_pattern_or_list():
    parse = get_bert_models.parse_teachers
    assert parse("x/{task}", "rte, SST-2,sts-b") == {"rte": "x/rte", "sst2": "x/sst2",
                                                     "stsb": "x/stsb"}
    assert parse("RTE=a/b@v1, sst-2=c", "mrpc") == {"rte": "a/b@v1", "sst2": "c"}
    for teachers in ("a/model", "rte=,sst2=a", "snli=a"):
        with pytest.raises(UserError, match="expected|unknown task"):
            parse(teachers, "rte")


# ------------------------------------------------------------------ a hub on this machine

BASE = ["--base_model", "org/base", "--base_only"]


@pytest.fixture
def hub_server(hub, server, tmp_path, monkeypatch) -> FileServer:
    """A stand-in of the hub; its library's cache is this test's own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    publish(server, hub / "org" / "base", "org/base")
    publish(server, hub / "org" / "base", "org/base", "v1")
    publish(server, hub / "me" / "base-sst2", "me/base-sst2")
    return server


def run_online(output_dir: Path, hub_server: FileServer, *flags: str) -> None:
    get(output_dir, "--base_url", hub_server.url, "--retry_delay", "0.01", "--attempts", "2",
        "--timeout", "5", *flags)


def test_models_come_from_a_troubled_hub_and_then_from_its_cache(
    hub, hub_server, tmp_path, monkeypatch
):
    weights_path = f"/org/base/resolve/{COMMIT}/model.safetensors"
    hub_server.troubles[weights_path] = [{"status": 503}, {"sent": 50_000}]
    flags = ["--base_model", "org/base@v1", "--teachers", "me/base-{task}", "--tasks", "sst2"]
    run_online(tmp_path / "models", hub_server, *flags)
    assert hub_server.paths().count(weights_path) == 3
    assert sorted({path for path in hub_server.paths() if "/resolve/" in path}) == [
        *(f"/me/base-sst2/resolve/{COMMIT}/{name}" for name in (
            "config.json", "pytorch_model.bin", "tokenizer_config.json", "vocab.txt")),
        *(f"/org/base/resolve/{COMMIT}/{name}" for name in (
            "config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt")),
    ]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_server.requests.clear()
    run_online(tmp_path / "again", hub_server, *flags)
    assert hub_server.requests == []
    get(tmp_path / "folder", *from_folders(hub, "sst2"))
    for name in ("bert-base-uncased", "bert-base-uncased-sst2"):
        saved = [weights(tmp_path / run / name) for run in ("models", "again", "folder")]
        assert same_weights(saved[0], saved[1]) and same_weights(saved[0], saved[2])


@pytest.mark.parametrize(("model", "status", "code"), [
    ("org/absent", 404, "RepoNotFound"), ("org/base@v9", 404, "RevisionNotFound"),
    ("org/gated", 403, "GatedRepo")])
def test_a_model_that_the_hub_lacks_or_keeps_to_itself_is_named(
    hub_server, tmp_path, model, status, code
):
    name, _, revision = model.partition("@")
    path = f"/api/models/{name}/revision/{revision or 'main'}"
    hub_server.troubles[path] = [{"status": status, "headers": {"X-Error-Code": code}}]
    message = f"{name} .*no such model, revision {revision or 'main'}, or it needs a login"
    with pytest.raises(UserError, match=message):
        run_online(tmp_path, hub_server, "--base_model", model, "--base_only")


def test_the_fallback_may_be_an_address_and_is_taken_when_the_hub_does_not_answer(
    hub, hub_server, tmp_path, caplog
):
    hub_server.troubles["/api/models/org/base/revision/main"] = [{"status": 503}] * 4
    with pytest.raises(UserError, match="org/base .*cannot be reached"):
        run_online(tmp_path, hub_server, *BASE)
    for path in (hub / "org" / "base").iterdir():
        hub_server.files[f"/copies/base/{path.name}"] = path.read_bytes()
    fallback = f"{hub_server.url}/copies/base"
    run_online(tmp_path, hub_server, *BASE, "--fallback_model", fallback)
    assert f"taking --fallback_model {fallback} instead" in caplog.text
    assert BertForMaskedLM.from_pretrained(tmp_path / "bert-base-uncased")


def test_the_command_obeys_the_variables_of_the_hub_and_two_at_once_write_a_model_once(
    hub_server, tmp_path
):
    environment = {**os.environ, "HF_ENDPOINT": hub_server.url, "HF_HOME": str(tmp_path / "home"),
                   "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}
    command = [sys.executable, "get_bert_models.py", *BASE, "--output_dir", tmp_path / "models"]
    processes = [subprocess.Popen(command, env=environment, cwd=REPO, stderr=subprocess.PIPE,
                                  text=True) for _ in range(2)]
    messages = "".join(process.communicate(timeout=120)[1] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], messages
    assert messages.count("written from") == messages.count("skipped") == 1
    path = f"/org/base/resolve/{COMMIT}/model.safetensors"
    sent = [headers for place, headers in hub_server.requests if place == path]
    assert len(sent) == 1 and {**sent[0]}.get("authorization") == "Bearer hf_secret"
    assert (tmp_path / "home" / "hub" / "models--org--base").is_dir()


def test_shards_come_from_the_hub_and_from_an_address_and_the_tokenizer_alone_if_wanted(
    hub_server, tmp_path
):
    source = tmp_path / "source"
    model = save_hub_model(source, "BertModel")
    model.save_pretrained(source, max_shard_size="50KB")
    (source / "model.safetensors").unlink()
    publish(hub_server, source, "org/sharded")
    for path in source.iterdir():
        hub_server.files[f"/copy/{path.name}"] = path.read_bytes()
    assert len([*source.glob("model-*")]) > 1
    tokenizer = fetch_model("org/sharded", base_url=hub_server.url, weights=False)
    assert files(tokenizer) == ["config.json", "tokenizer_config.json", "vocab.txt"]
    for folder in (fetch_model("org/sharded", base_url=hub_server.url),
                   fetch_model(f"{hub_server.url}/copy", tmp_path / "cache")):
        assert files(folder) == files(source)
        assert same_weights(load_state(folder), load_state(source))
    count = len(hub_server.requests)
    fetch_model(f"{hub_server.url}/copy", tmp_path / "cache")
    assert len(hub_server.requests) == count


@pytest.mark.parametrize("name", ["", "./x", "/x", "~/x", "a/b/c", "x/", "models/absent"])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(hub_server, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "corpus.txt").write_text("the cat sat")
    for model, what in ((name, "no such folder"), ("corpus.txt", "is a file")):
        with pytest.raises(UserError, match=f"^{model}: {what}; expected .* URL or hub id"):
            fetch_model(model, base_url=hub_server.url)
    assert hub_server.requests == []


CALLS = {
    "predict": "--model {}", "quantize": "--method fp16 --model {}",
    "task_distill": "--task_name SST-2 --data_dir glue --student_model s --teacher_model {}",
    "task_distill ": "--task_name SST-2 --data_dir glue --do_eval --student_model {}",
    "general_distill": "--pregenerated_data d --student_model s --teacher_model {}",
    "finetune_teacher": "--task_name SST-2 --data_dir glue --bert_model {}",
    "finetune_teacher ": "--task_name SST-2 --data_dir glue --from_scratch --bert_model {}",
    "data_augmentation": "--glue_dir d --task_name x --compose_vectors t --glove_embs v "
                         "--pretrained_bert_model {}",
    "pregenerate_training_data": "--train_corpus corpus.txt --bert_model {}",
    "tinybert_6_from_bert": "--bert_model {}", "pretrain_bert": "--train_corpus c --bert_model {}",
    "pretrain_bert ": "--train_corpus c --config {}", "export_model": "--model {}",
    "main": "--task_name sst2 --constraint 0.1 --model_name m --ckpt_dir {}",
    "inference": "--models a={}", "get_bert_models": "--attempts 1 --base_model {}",
}


@pytest.mark.parametrize("script", CALLS)
def test_every_script_takes_a_hub_id_for_a_model(hub_server, tmp_path, monkeypatch, capsys, script):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for folder in ("K-prune/src", "benchmarks"):
        monkeypatch.syspath_prepend(REPO / folder)
    (tmp_path / "corpus.txt").write_text("a cat\n")
    make_glue(tmp_path / "glue")
    flags = CALLS[script].format("me/absent@v1").split()
    output = [] if script in ("data_augmentation", "predict") else ["--output_dir", "out"]
    module = importlib.import_module(script.strip())
    assert "me/absent (no folder here, so an id on the" in error_line(
        capsys, module, *flags, *output)
    assert not [path for path in tmp_path.glob("out/*") if path.suffix != ".lock"]


def test_a_model_of_the_hub_is_trained_from_and_recorded_by_its_id(hub, hub_server, tmp_path,
                                                                  monkeypatch):
    fetch_model("me/base-sst2", base_url=hub_server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    run(finetune_teacher, "--task_name", "SST-2", "--data_dir", make_glue(tmp_path / "data"),
        "--bert_model", "me/base-sst2", "--output_dir", tmp_path / "out", "--num_train_epochs", 0,
        "--max_seq_length", 16, "--no_cuda", "--precision", "fp32")
    assert read_json(tmp_path / "out" / "args.json")["student"] == "me/base-sst2"
    assert same_weights(load_state(tmp_path / "out"), load_state(hub / "me" / "base-sst2"))


# ------------------------------------------------------------------ fix_teacher_layers.py


def old_dump(folder: Path, kind: str, gamma: bool = False, safe: bool = False) -> torch.nn.Module:
    """Save a model as the old script did: no `bert.` prefix, and a buffer among the weights."""
    model = save_hub_model(folder, kind)
    state = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        key = key.removeprefix("bert.")
        if gamma and "LayerNorm" in key:
            key = key.replace("weight", "gamma").replace("bias", "beta")
        state[key] = tensor
    state["embeddings.position_ids"] = torch.arange(16)[None]
    (folder / "model.safetensors").unlink()
    if safe:
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    return model


def fix(*arguments: Path | str) -> None:
    fix_teacher_layers.main(fix_teacher_layers.get_args_parser().parse_args(
        ["--models", *map(str, arguments)]))


@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_names_are_repaired_once_so_that_other_programs_load_the_model(
    tmp_path, gamma, safe, caplog
):
    model = old_dump(tmp_path / "m", "BertForSequenceClassification", gamma, safe)
    path = tmp_path / "m" / ("model.safetensors" if safe else "pytorch_model.bin")
    with caplog.at_level("INFO"):
        fix(tmp_path / "m")
        written = path.stat().st_mtime_ns
        fix(tmp_path / "m")
    assert "renamed" in caplog.text and "sound, nothing to do" in caplog.text
    assert "dropped 1 (such as embeddings.position_ids)" in caplog.text
    assert path.stat().st_mtime_ns == written
    stored = load_file(path) if safe else weights(tmp_path / "m")
    assert same_weights(stored, model.state_dict())
    assert files(tmp_path / "m") == sorted(
        ["config.json", "tokenizer_config.json", "vocab.txt", path.name])


def test_the_default_folders_are_those_that_get_bert_models_makes():
    arguments = get_bert_models.get_args_parser().parse_args([])
    names = get_bert_models.parse_teachers(arguments.teachers, arguments.tasks)
    base = arguments.output_dir / arguments.base_name
    made = [str(base), *(f"{base}-{task}" for task in names)]
    assert fix_teacher_layers.get_args_parser().parse_args([]).models == made


def test_a_lost_head_is_reported_and_not_invented(tmp_path, caplog):
    old_dump(tmp_path / "bare", "BertModel")
    old_dump(tmp_path / "good", "BertForMaskedLM")
    with pytest.raises(UserError, match="bare: no masked-LM head and no classifier") as error:
        fix(tmp_path / "bare", tmp_path / "good")
    assert "good" not in str(error.value)
    state = weights(tmp_path / "bare")
    assert all(key.startswith("bert.") for key in state) and "bert.pooler.dense.weight" in state
    fix(tmp_path / "bare", "--allow_missing_head")
    assert "bare: no masked-LM head" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "missing layer", "strange key", "two values"])
def test_a_model_that_cannot_be_repaired_is_named_and_left_alone(tmp_path, damage):
    old_dump(tmp_path / "m", "BertForMaskedLM")
    path = tmp_path / "m" / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    if damage == "missing layer":
        state = {key: tensor for key, tensor in state.items() if "layer.1." not in key}
    elif damage == "strange key":
        state["decoder.layer.weight"] = torch.zeros(2)
    elif damage == "two values":
        key = "embeddings.word_embeddings.weight"
        state[f"bert.{key}"] = state[key] + 1
    torch.save(state, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:3000])
    before = path.read_bytes()
    with pytest.raises(UserError, match=str(tmp_path / "m")):
        fix(tmp_path / "m")
    assert path.read_bytes() == before
