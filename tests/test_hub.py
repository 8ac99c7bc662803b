"""The hub's own paths, as far as they go offline: models and data sets out of its caches, and what absent ones say.

The libraries read where their caches are when they are imported, so each scenario runs in a process of its own; a
process takes seconds to import them, so two serve all tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headcount.model.fingerprint import fingerprint

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
import builtins, json
from headcount.errors import HeadcountError
from headcount.measure.tasks import get_tasks
from headcount.model.load import load

def told(name, **options):
    loaded = load(name, device="cpu", **options)
    return {"fingerprint": loaded.fingerprint, "heads": loaded.anatomy.heads_per_layer,
            "ids": loaded.tokenizer("the dog")["input_ids"], **loaded.provenance}

def refusal(what, *args, **options):
    try:
        what(*args, **options)
    except HeadcountError as error:
        return {"kind": type(error).__name__, "message": str(error),
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


def outcome(script: str, folder: Path, home: Path) -> dict[str, Any]:
    # Whatever places the caches elsewhere than below HF_HOME is left out.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_"))}
    env = kept | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
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
