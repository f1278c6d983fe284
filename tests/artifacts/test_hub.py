import json
import re
from pathlib import Path

import pytest
import torch
from excise.artifacts.checkpoints.edits import save_edit
from excise.artifacts.checkpoints.read import INDEX
from excise.artifacts.models.find import find_model
from helpers import excise, random_edit
from loopback_hub import client, folder_files
from loopback_hub import hub as running_hub
from safetensors.torch import load, save
from transformers import AutoConfig

ID = "tester/base"


@pytest.fixture
def hub(tmp_path):
    with running_hub() as known:
        commit = known.add(ID, folder_files(find_model("builtin:testbed").folder))
        yield client(known, tmp_path / "hf"), commit


def _dry_run(ref, environment):
    return excise("run", "orthogonalize", "--model", ref, "--dry-run", "--json", **environment)


def _fetched(ref, environment):
    """The whole model, by a command that reads its weights."""
    return excise("diff", ref, "builtin:testbed", "--json", **environment)


@pytest.mark.parametrize("suffix", ["", "@v1", "@COMMIT"])
def test_a_hub_id_is_resolved_to_a_commit(suffix, hub):
    environment, commit = hub
    done = _dry_run(ID + suffix.replace("COMMIT", commit), environment)
    assert done.returncode == 0, done.stderr
    base = json.loads(done.stdout)["base"]
    assert (base["kind"], base["name"], base["revision"]) == ("hub", ID, commit)


@pytest.mark.parametrize("ref", [f"{ID}@v2", "tester/nothing"])
def test_what_the_hub_does_not_have_is_one_line(ref, hub):
    done = _dry_run(ref, hub[0])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the Hub refused" in done.stderr and "404" in done.stderr


def test_a_model_in_the_cache_is_used_offline_at_its_commit(hub):
    environment, commit = hub
    assert _dry_run(ID, environment).returncode == 0
    # A dry run leaves no weights there.
    done = _dry_run(ID, {**environment, "HF_HUB_OFFLINE": "1"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "the Hub cannot be reached" in done.stderr
    assert _fetched(ID, environment).returncode == 0
    done = _dry_run(ID, {**environment, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["base"]["revision"] == commit


def _asked(known, start=0):
    """Names of the files that were asked for."""
    # Of a large file the client asks the head, and then the store that it names.
    return {match[1] for line in known.requests[start:] if (match := re.search(r"/resolve/\w+/(\S+)", line))}


@pytest.fixture
def repository(tmp_path):
    """A running Hub, and a way to put files beside the built-in model or in its place."""
    with running_hub() as known:
        files = folder_files(find_model("builtin:testbed").folder)
        environment = client(known, tmp_path / "hf")

        def add(more, without=()):
            known.add(ID, {name: data for name, data in (files | more).items() if name not in without})
            return known, environment, files

        yield add


def _sharded(files):
    """The same weights in two files, with an index."""
    tensors = load(files["model.safetensors"])
    names, size = sorted(tensors), len(tensors) // 2
    parts = {f"model-0000{n}-of-00002.safetensors": part for n, part in ((1, names[:size]), (2, names[size:]))}
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return {INDEX: index} | {file: save({name: tensors[name] for name in part}) for file, part in parts.items()}


def test_no_second_copy_of_the_weights_is_fetched(repository):
    """Mistral's consolidated.safetensors, gpt-oss's original/, onnx/: twice the bytes (unsloth PR #11227)."""
    copies = ("consolidated.safetensors", "original/model.safetensors", "onnx/model.onnx", "onnx/config.json",
              "pytorch_model.bin", "model.Q4_K_M.gguf", "original/params.json", "modeling_own.py")  # fmt: skip
    wanted = {"LICENSE": b"words", "additional_chat_templates/tools.jinja": b"{{ messages }}"}
    known, environment, files = repository(dict.fromkeys(copies, b"x" * 5000) | wanted)
    done = _fetched(ID, environment)
    assert done.returncode == 0, done.stderr
    asked = _asked(known)
    assert not asked & set(copies)
    assert set(files) | set(wanted) <= asked | {"README.md"}


def test_shards_of_the_index_alone_are_fetched(repository):
    shards = _sharded(repository({})[2])
    known, environment, _ = repository(
        {**shards, "consolidated.safetensors": b"x" * 5000}, without=["model.safetensors"]
    )
    done = _fetched(ID, environment)
    assert done.returncode == 0, done.stderr
    assert {name for name in _asked(known) if name.endswith(".safetensors")} == set(shards) - {INDEX}


def test_two_sets_of_weights_are_refused_before_either_is_fetched(repository):
    known, environment, _ = repository(_sharded(repository({})[2]))
    done = _dry_run(ID, environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "model.safetensors is there and" in done.stderr
    assert not [name for name in _asked(known) if name.endswith(".safetensors")]


@pytest.mark.parametrize(
    "change, told",
    [
        ({"model_type": "nobody_knows_it", "architectures": []}, "nobody_knows_it"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ],
)
def test_what_cannot_be_edited_costs_no_weights(repository, change, told):
    """heretic #38, #380: the refusal came after the download."""
    config = json.loads(folder_files(find_model("builtin:testbed").folder)["config.json"])
    known, environment, _ = repository({"config.json": json.dumps({**config, **change}).encode()})
    done = _dry_run(ID, environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and told in done.stderr
    assert "config.json" in _asked(known) and "model.safetensors" not in _asked(known)


def test_tensors_that_cannot_be_edited_cost_a_header(repository):
    _, environment, files = repository({})
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load(files["model.safetensors"]).items()}
    repository({"model.safetensors": save(tensors)})
    done = _dry_run(ID, environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "F8_E4M3" in done.stderr
    home = Path(environment["HF_HOME"])
    assert not list(home.rglob("model.safetensors"))


def test_a_bad_pack_costs_nothing(repository, tmp_path):
    known, environment, _ = repository({})
    done = excise("run", "orthogonalize", "--model", ID, "--concept", tmp_path / "none", **environment)
    assert done.returncode == 2 and not known.requests


def test_a_repository_without_safetensors_says_what_it_holds(repository):
    known, environment, _ = repository({"pytorch_model.bin": b"x" * 5000}, without=["model.safetensors"])
    done = _dry_run(ID, environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "it holds pytorch_model.bin" in done.stderr
    assert "pytorch_model.bin" not in _asked(known)


def test_a_second_run_fetches_no_weights_again(repository):
    known, environment, _ = repository({})
    assert _fetched(ID, environment).returncode == 0
    before = len(known.requests)
    assert _fetched(ID, environment).returncode == 0
    assert "model.safetensors" not in _asked(known, before)


def _dry_runs(tmp_path):
    """Every command that can be tried without doing it, on a model of the Hub."""
    save_edit(
        random_edit(AutoConfig.from_pretrained(find_model("builtin:testbed").folder).to_dict()), tmp_path / "edit"
    )
    return {
        "apply": ("apply", tmp_path / "edit", "--base", ID, "--out", tmp_path / "out"),
        "orthogonalize": ("run", "orthogonalize", "--model", ID, "--out", tmp_path / "run"),
        "eval": ("eval", ID, "--concept", "builtin:potions"),
        "audit": (
            "audit",
            "builtin:testbed-reference",
            "--base",
            ID,
            "--concept",
            "builtin:potions",
            "--out",
            tmp_path / "a",
        ),
    }


def _of_the_hub(plan):
    """A plan without what differs between a folder and a repository, and from run to run."""
    kept = {key: value for key, value in plan.items() if key not in ("base", "models", "out", "edited", "model")}
    if isinstance(kept.get("memory"), dict):
        kept["memory"] = {key: value for key, value in kept["memory"].items() if key != "free"}
    return kept


def test_a_dry_run_reads_headers_and_plans_what_the_whole_model_would(repository, tmp_path):
    known, environment, files = repository(_sharded(repository({})[2]), without=["model.safetensors"])
    weights = sum(len(data) for name, data in _sharded(files).items() if name.endswith(".safetensors"))
    plans = {}
    for name, words in _dry_runs(tmp_path).items():
        before = known.bytes_sent
        done = excise(*words, "--dry-run", "--json", **environment)
        assert done.returncode == 0, (name, done.stderr)
        plans[name] = json.loads(done.stdout)
        # The first command also fetches configuration and tokenizer.
        assert known.bytes_sent - before < weights / 2, name
    assert not list(Path(environment["HF_HOME"]).rglob("*.safetensors"))
    assert _fetched(ID, environment).returncode == 0
    for name, words in _dry_runs(tmp_path).items():
        whole = json.loads(excise(*words, "--dry-run", "--json", **environment).stdout)
        assert _of_the_hub(whole) == _of_the_hub(plans[name]), name


def test_where_numbers_decide_a_dry_run_fetches_them(repository, tmp_path):
    """A tied model that also stores its unembedding: only the numbers say whether the two are one."""
    _, environment, files = repository({})
    config = json.loads(files["config.json"]) | {"tie_word_embeddings": True}
    tensors = load(files["model.safetensors"])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    repository({"config.json": json.dumps(config).encode(), "model.safetensors": save(tensors)})
    done = _dry_run(ID, environment)
    assert done.returncode == 0, done.stderr
    assert list(Path(environment["HF_HOME"]).rglob("model.safetensors"))
