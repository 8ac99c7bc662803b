"""The hub's own paths, as far as they go offline: models and data sets out of its caches, and what absent ones say.

The libraries read where their caches are when they are imported, so each scenario runs in a process of its own; a
process takes seconds to import them, so two serve all tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import httpx
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headcount.model.fingerprint import fingerprint
from headcount.tasks import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
COPA = [
    {"premise": "The kettle whistled.", "choice1": "The water boiled.", "choice2": "The cup broke.",
     "question": "cause", "idx": 0, "label": 0},
    {"premise": "The lamp went out.", "choice1": "The sun rose.", "choice2": "The room turned dark.",
     "question": "effect", "idx": 1, "label": 1},
    {"premise": "The dog barked.", "choice1": "The tree grew.", "choice2": "The bell rang.",
     "question": "cause", "idx": 2, "label": 1},
]
TRAINING, VALIDATION = COPA[:2], COPA[2:]

# In two files, of which one imports the other, as such checkpoints come; each notes that it has run.
CONFIGURATION = """
import builtins
from transformers import LlamaConfig

builtins.own_code_ran = True

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""

# A process prints one JSON object as its last line.
PROLOGUE = """
import builtins, dataclasses, json
from headcount.errors import HeadcountError
from headcount.tasks.load import get_tasks
from headcount.model.load import load

def told(name, **options):
    loaded = load(name, device="cpu", **options)
    return {"fingerprint": loaded.fingerprint, "heads": loaded.anatomy.heads_per_layer,
            "ids": loaded.tokenizer("the dog")["input_ids"], **loaded.provenance}

def refusal(what, *args, **options):
    try:
        what(*args, **options)
    except HeadcountError as error:
        return {"kind": type(error).__name__, "message": error.on_command_line(),
                "own_code_ran": hasattr(builtins, "own_code_ran")}
"""
CACHED = PROLOGUE + f"""
task = get_tasks(["copa"])["copa"]
print(json.dumps({{
    "model": told("org/tiny"),
    "revised": told("org/tiny", revision="{COMMIT}"),
    "revision": refusal(load, "org/tiny", revision="v2"),
    "sizes": task.split_sizes,
    "notes": task.notes,
    "examples": [p.doc for p in task.prompts("examples")],
    "evaluation": [{{"pairs": p.pairs, "gold": p.gold}} for p in task.prompts("evaluation")],
    "other_config": refusal(get_tasks, ["wic"]),
    "refusal": refusal(load, "org/own"),
    "own": told("org/own", trust_remote_code=True),
    "own_again": told("org/own", trust_remote_code=True),
    "refusal_again": refusal(load, "org/own"),
}}))
"""
EMPTY = PROLOGUE + """
print(json.dumps({
    "task": refusal(get_tasks, ["copa"]),
    "model": refusal(load, "org/absent"),
    "refusal": refusal(load, "own"),
    "own": told("own", trust_remote_code=True),
}))
"""

# No name can be looked up, and the look-ups are counted: those of the hub's host.
NO_NETWORK = """
import socket
asked = []

def nowhere(host, *args, **kwargs):
    asked.append(host)
    raise socket.gaierror(-2, "Name or service not known")

socket.getaddrinfo = nowhere
"""
DEAD = NO_NETWORK + PROLOGUE + """
from headcount.tasks.load import describe
names = ["wic", "hellaswag", "copa", "piqa", "arc_easy"]
rows = [dataclasses.asdict(describe(name)) for name in names]
print(json.dumps({"rows": rows, "model": told("org/tiny"), "absent": refusal(load, "org/absent"), "asked": asked}))
"""
# A hub that is there and knows no such name.
UNKNOWN = """
import http.server, os, threading
asked = []

class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        asked.append(self.path)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
""" + PROLOGUE + """
from huggingface_hub import constants
told = [refusal(get_tasks, ["wic"]), refusal(get_tasks, ["hellaswag"])]
print(json.dumps({"told": told, "asked": asked, "offline": constants.is_offline_mode()}))
"""


class Copa(datasets.GeneratorBasedBuilder):
    """Writes documents into datasets' cache where a download of aps/super_glue would have put them."""

    def _info(self) -> datasets.DatasetInfo:
        text = dict.fromkeys(("premise", "choice1", "choice2", "question"), datasets.Value("string"))
        label = datasets.ClassLabel(names=["choice1", "choice2"])
        return datasets.DatasetInfo(features=datasets.Features({**text, "idx": datasets.Value("int32"),
                                                                "label": label}))

    def _split_generators(self, dl_manager: object) -> list[datasets.SplitGenerator]:
        splits = {"train": TRAINING, "validation": VALIDATION}
        return [datasets.SplitGenerator(name=name, gen_kwargs={"docs": docs}) for name, docs in splits.items()]

    def _generate_examples(self, docs: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(docs)


def write_copa(home: Path) -> None:
    builder = Copa(cache_dir=str(home / "datasets"), repo_id="aps/super_glue", dataset_name="super_glue",
                   config_name="copa", hash=COMMIT)
    builder.download_and_prepare()


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                        intermediate_size=48, max_position_embeddings=64))


def write_checkpoint(folder: Path) -> Path:
    tiny().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"?": 0, "the": 1, "dog": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return folder


def write_own_code(folder: Path) -> Path:
    config = write_checkpoint(folder) / "config.json"
    own = {"model_type": "own", "architectures": ["OwnForCausalLM"],
           "auto_map": {"AutoConfig": "configuration_own.OwnConfig",
                        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **own}))
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    return folder


def put_into_cache(home: Path, name: str, folder: Path) -> None:
    """Lay a folder out as a download leaves it: files named by their hash, and links to them in the snapshot."""
    repo = home / "hub" / f"models--{name.replace('/', '--')}"
    for part in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (repo / part).mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for file in folder.iterdir():
        blob = sha256(file.read_bytes()).hexdigest()
        file.replace(repo / "blobs" / blob)
        (repo / "snapshots" / COMMIT / file.name).symlink_to(f"../../blobs/{blob}")


def outcome(script: str, folder: Path, home: Path, *, offline: bool = True) -> dict[str, Any]:
    # Whatever places the caches elsewhere than below HF_HOME is left out, and so are proxies.
    kept = {k: v for k, v in os.environ.items()
            if not k.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_")) and not k.lower().endswith("_proxy")}
    chosen = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if offline else {}
    env = kept | {"HF_HOME": str(home)} | chosen
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=folder, capture_output=True, text=True,
                          check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process reports whose caches hold the data set and both models."""
    folder = tmp_path_factory.mktemp("cached")
    home = folder / "home"
    put_into_cache(home, "org/tiny", write_checkpoint(folder / "a"))
    put_into_cache(home, "org/own", write_own_code(folder / "b"))
    write_copa(home)
    return outcome(CACHED, folder, home)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process reports whose caches are empty; a checkpoint with its own code lies in a folder."""
    folder = tmp_path_factory.mktemp("empty")
    write_own_code(folder / "own")
    return outcome(EMPTY, folder, folder / "home")


def assert_refused(told: dict[str, Any], kind: str, *parts: str) -> None:
    assert told["kind"] == kind
    assert "\n" not in told["message"]
    assert all(part in told["message"] for part in parts), told["message"]


def test_a_cached_model_is_loaded_by_its_hub_id(cached: dict[str, Any]) -> None:
    for told in (cached["model"], cached["revised"]):
        assert told["fingerprint"] == fingerprint(tiny())
        assert told["heads"] == [4, 4]
        assert told["ids"] == [1, 2]
        assert (told["name"], told["source"]) == ("org/tiny", "org/tiny")
        assert told["trust_remote_code"] is False
    assert cached["model"]["revision"] is None
    assert cached["revised"]["revision"] == COMMIT


@pytest.mark.parametrize("which", ["model", "revised", "own"])
def test_the_provenance_names_the_commit(cached: dict[str, Any], which: str) -> None:
    assert cached[which]["commit"] == COMMIT


def test_a_revision_that_is_not_cached_is_not_replaced_by_another(cached: dict[str, Any]) -> None:
    assert_refused(cached["revision"], "ModelError", "org/tiny")


def test_a_cached_data_set_is_found(cached: dict[str, Any]) -> None:
    assert cached["sizes"] == {"train": 2, "validation": 1}
    assert cached["notes"] == []
    assert cached["examples"] == TRAINING
    # Spaces and small letters are lm-eval's.
    pairs = [["The dog barked because", "  the tree grew."], ["The dog barked because", "  the bell rang."]]
    assert cached["evaluation"] == [{"pairs": pairs, "gold": 1}]


def test_a_data_set_that_is_not_cached_asks_for_data(empty: dict[str, Any]) -> None:
    assert_refused(empty["task"], "UnavailableError", "'copa'", "--data")


def test_a_configuration_that_is_not_cached_asks_for_data(cached: dict[str, Any]) -> None:
    # WiC is another configuration of the data set that COPA is in; datasets then raises another error.
    assert_refused(cached["other_config"], "UnavailableError", "'wic'", "--data")


def test_a_model_that_is_not_cached_is_told_so(empty: dict[str, Any]) -> None:
    assert_refused(empty["model"], "ModelError", "org/absent is no local folder", "local folder, a GGUF file")


@pytest.mark.parametrize(("process", "name"), [("cached", "org/own"), ("empty", "own")])
def test_own_code_is_run_when_it_is_trusted(request: pytest.FixtureRequest, process: str, name: str) -> None:
    told = request.getfixturevalue(process)
    assert_refused(told["refusal"], "ModelError", name, "--trust-remote-code")
    assert told["refusal"]["own_code_ran"] is False
    assert told["own"]["trust_remote_code"] is True
    assert (told["own"]["class"], told["own"]["model_type"]) == ("OwnForCausalLM", "own")
    assert told["own"]["heads"] == [4, 4]


def test_trust_is_not_remembered(cached: dict[str, Any]) -> None:
    assert cached["own_again"] == cached["own"]
    assert_refused(cached["refusal_again"], "ModelError", "org/own", "--trust-remote-code")


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process that has not been told to be offline, nor asked the hub; as it was again afterwards."""
    for place, name in ((constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE"),
                        (datasets.config, "HF_DATASETS_OFFLINE")):
        monkeypatch.setattr(place, name, False)
    hub.answers.cache_clear()
    yield monkeypatch
    hub.answers.cache_clear()


class Hub:
    """Stands for the hub's client: fails, is silent or answers with an error, as it is told, and counts."""

    def __init__(self, *behaviour: str) -> None:
        self.behaviour, self.asked = list(behaviour), 0

    def __call__(self) -> Hub:
        return self

    def head(self, url: str, **_: Any) -> httpx.Response:
        self.asked += 1
        does = self.behaviour.pop(0)
        if does == "fails":
            raise httpx.ConnectError("Name or service not known")
        if does == "times out":
            raise httpx.ConnectTimeout("timed out")
        if does == "is silent":
            threading.Event().wait()
        return httpx.Response(404)


def is_offline() -> set[bool]:
    return {constants.is_offline_mode(), datasets.config.HF_HUB_OFFLINE, datasets.config.HF_DATASETS_OFFLINE}


@pytest.mark.parametrize("does", ["fails", "times out", "is silent"])
def test_a_hub_that_does_not_answer_is_asked_once(does: str, online: pytest.MonkeyPatch) -> None:
    online.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    online.setattr(hub, "get_session", asked := Hub(does))
    assert [hub.answers() for _ in range(3)] == [False] * 3
    assert asked.asked == 1
    assert is_offline() == {True}
    assert hub.reason(ConnectionError("LocalEntryNotFoundError")) == f"{constants.ENDPOINT} does not answer"
    assert asked.asked == 1


def test_an_error_is_an_answer(online: pytest.MonkeyPatch) -> None:
    online.setattr(hub, "get_session", asked := Hub("answers"))
    assert hub.answers() is True
    assert is_offline() == {False}
    assert hub.reason(FileNotFoundError("no such name")) == "no such name"
    assert asked.asked == 1, "an unknown name is no reason to ask again"


def test_a_network_that_goes_away_is_noticed(online: pytest.MonkeyPatch) -> None:
    online.setattr(hub, "get_session", asked := Hub("answers", "answers", "fails"))
    assert hub.answers() is True
    assert hub.reason(ConnectionError("a file's host is away")) == "a file's host is away"
    assert is_offline() == {False}
    assert hub.reason(ConnectionError("away")) == f"{constants.ENDPOINT} does not answer"
    assert is_offline() == {True}
    assert asked.asked == 3


def test_who_is_offline_by_choice_is_not_asked_for(online: pytest.MonkeyPatch) -> None:
    online.setattr(constants, "HF_HUB_OFFLINE", True)
    online.setattr(hub, "get_session", asked := Hub())
    assert hub.answers() is None
    assert hub.reason(ConnectionError("offline mode")) == "offline mode"
    assert asked.asked == 0


def test_without_a_network_many_tasks_ask_once_and_what_is_cached_is_found(tmp_path: Path) -> None:
    write_copa(tmp_path / "home")
    put_into_cache(tmp_path / "home", "org/tiny", write_checkpoint(tmp_path / "a"))
    told = outcome(DEAD, tmp_path, tmp_path / "home", offline=False)
    assert told["asked"] == ["huggingface.co"]
    absent = {row["name"]: row["absent"] for row in told["rows"] if row["absent"]}
    assert list(absent) == ["wic", "hellaswag", "piqa", "arc_easy"]
    for message in list(absent.values())[1:]:
        assert "https://huggingface.co does not answer" in message
        assert "--data" in message
    (copa,) = (row for row in told["rows"] if not row["absent"])
    assert copa["sizes"] == {"train": 2, "validation": 1}
    assert told["model"]["commit"] == COMMIT
    assert_refused(told["absent"], "ModelError", "org/absent is no local folder")


def test_an_unknown_name_is_no_dead_network(tmp_path: Path) -> None:
    told = outcome(UNKNOWN, tmp_path, tmp_path / "home", offline=False)
    assert told["offline"] is False
    for refused, name in zip(told["told"], ("wic", "hellaswag"), strict=True):
        assert_refused(refused, "UnavailableError", name, "--data")
    for path in ("super_glue", "hellaswag"):
        assert any(path in url for url in told["asked"]), "every task's documents are asked for"
