"""Push and pull through the real client: what arrives is what was sent, or there is one line that says why not."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from excise.artifacts.checkpoints import read as checkpoints
from excise.artifacts.checkpoints.manifest import SUMS, verify_folder, write_manifest
from excise.artifacts.checkpoints.read import check_finite, open_checkpoint
from excise.artifacts.models.find import find_model
from excise.editing.edits.low_rank import Factors, LowRankUpdate
from excise.editing.errors import CheckpointError
from helpers import excise, in_fresh_process, publish, publish_small, started
from loopback_hub import Fault, Stored, client, folder_files
from loopback_hub import hub as running_hub

ID = "tester/edited"
KILLS = int(os.environ.get("EXCISE_KILLS", "3"))
"""Of push and of pull; 50 shows more and takes minutes."""
LOGITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = AutoTokenizer.from_pretrained(sys.argv[1])("The colour of", return_tensors="pt")
print(json.dumps(model(**ids).logits[0, -1].tolist()))
"""


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """A published checkpoint with a card and measurements, in small."""
    return publish_small(tmp_path_factory.mktemp("edited") / "checkpoint")


@pytest.fixture
def world(tmp_path):
    with running_hub() as known:
        yield known, client(known, tmp_path / "hf")


@pytest.fixture
def published(world, edited):
    known, environment = world
    files = folder_files(edited)
    known.add(ID, {**files, ".gitattributes": b"*.safetensors filter=lfs\n"})
    return known, environment, files


def test_what_is_pushed_comes_back_bit_for_bit_and_computes_the_same(world, edited, tmp_path):
    known, environment = world
    done = excise("push", edited, ID, "--json", **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["new_commit"] and known.repos[ID].private
    there = known.head(ID)
    there.pop(".gitattributes")
    assert there == folder_files(edited)
    pulled = excise("pull", ID, "--out", tmp_path / "pulled", "--json", **environment)
    assert pulled.returncode == 0, pulled.stderr
    assert json.loads(pulled.stdout)["made_by_excise"] and verify_folder(tmp_path / "pulled") > 4
    assert folder_files(tmp_path / "pulled") == folder_files(edited)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert in_fresh_process(LOGITS, tmp_path / "pulled") == in_fresh_process(LOGITS, edited)
    # The token goes to the Hub, never to the host that serves its files.
    assert ("127.0.0.1", True) in known.authorized and ("localhost", True) not in known.authorized


def test_pushing_again_sends_nothing(published, edited):
    known, environment, _ = published
    before = dict(known.repos[ID].heads)
    done = excise("push", edited, ID, "--json", **environment)
    assert done.returncode == 0 and not json.loads(done.stdout)["new_commit"], done.stderr
    assert known.repos[ID].heads == before and not any("commit/" in line for line in known.requests)


def test_a_newer_checkpoint_replaces_all_of_the_older_one(published, edited, tmp_path):
    known, environment, files = published
    known.add(ID, {**files, "model-00002-of-00002.safetensors": b"stale"})
    assert excise("push", edited, ID, **environment).returncode == 0
    assert "model-00002-of-00002.safetensors" not in known.head(ID)


def test_somebody_elses_repository_is_left_alone(world, edited):
    known, environment = world
    known.add(ID, {"README.md": b"mine", "weights.bin": b"mine"})
    done = excise("push", edited, ID, **environment)
    assert done.returncode == 2 and "holds 1 files of another model" in done.stderr
    assert known.head(ID) == {"README.md": b"mine", "weights.bin": b"mine"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["not-an-id"], "is no repository id"),
        ([ID, "--create-pr", "--revision", "other"], "leave out --revision"),
    ],
)
def test_a_wrong_push_is_one_line_and_asks_the_hub_nothing(world, edited, words, message):
    known, environment = world
    done = excise("push", edited, *words, **environment)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert known.requests == []


def test_a_changed_folder_is_not_pushed(world, edited, tmp_path):
    known, environment = world
    copy = tmp_path / "copy"
    shutil.copytree(edited, copy)
    (copy / "config.json").write_text("{}")
    done = excise("push", copy, ID, **environment)
    assert done.returncode == 1 and "config.json was changed" in done.stderr and known.requests == []


def test_what_was_not_measured_is_pushed_only_if_told_and_says_so_first(world, edited, tmp_path):
    known, environment = world
    copy = tmp_path / "copy"
    shutil.copytree(edited, copy)
    for name in ("README.md", "excise/eval.json", "excise/manifest.json", SUMS):
        (copy / name).unlink()
    write_manifest(
        copy, base=find_model("builtin:testbed").describe(), base_files={}, changes=(), untied=None, known={}, run={}
    )
    refused = excise("push", copy, ID, **environment)
    assert refused.returncode == 2 and "holds no measurements" in refused.stderr and known.requests == []
    done = excise("push", copy, ID, "--unmeasured", **environment)
    assert done.returncode == 0, done.stderr
    card = known.head(ID)["README.md"].decode()
    assert card.split("---\n")[2].startswith("**Nothing was measured on this model.**")
    assert not (copy / "README.md").exists()
    assert excise("pull", ID, "--out", tmp_path / "pulled", **environment).returncode == 0


def test_a_branch_is_pushed_to_and_pulled_from(world, edited, tmp_path):
    known, environment = world
    assert excise("push", edited, ID, "--revision", "trial", **environment).returncode == 0
    assert set(known.head(ID)) == {".gitattributes"}
    assert excise("pull", f"{ID}@trial", "--out", tmp_path / "pulled", **environment).returncode == 0
    assert verify_folder(tmp_path / "pulled") > 4


def test_without_a_token_there_is_one_line(world, edited):
    _, environment = world
    done = excise("push", edited, ID, **{**environment, "HF_TOKEN": ""})
    assert done.returncode != 0 and "log" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def _flip(files):
    data = bytearray(files["model.safetensors"])
    data[len(data) // 2] ^= 1
    return {**files, "model.safetensors": bytes(data)}


def _with_tensor(files, name, value):
    """Weights with one value replaced, and checksums made to agree: what a careless publisher could upload."""
    from safetensors.torch import load, save

    tensors = load(files["model.safetensors"])
    tensors[name].view(-1)[0] = value
    return _resummed({**files, "model.safetensors": save(tensors, {"format": "pt"})})


def _resummed(files):
    import hashlib

    manifest = json.loads(files["excise/manifest.json"])
    digests = {
        name: hashlib.sha256(data).hexdigest()
        for name, data in files.items()
        if name not in (SUMS, "excise/manifest.json")
    }
    for name, digest in digests.items():
        manifest["files"][name] = {"size": len(files[name]), "sha256": digest}
    text = (json.dumps(manifest, indent=2) + "\n").encode()
    digests["excise/manifest.json"] = hashlib.sha256(text).hexdigest()
    sums = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()
    return {**files, "excise/manifest.json": text, SUMS: sums}


def _header(files, change):
    data = files["model.safetensors"]
    size = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + size])
    return _resummed({**files, "model.safetensors": len(header).to_bytes(8, "little") + header + data[8 + size :]})


CORRUPT = {
    "flip": (_flip, "model.safetensors was changed"),
    "truncate": (lambda f: {**f, "tokenizer.json": f["tokenizer.json"][:-5]}, "tokenizer.json was changed"),
    "swap": (lambda f: {**f, "config.json": f["generation_config.json"]}, "config.json was changed"),
    "add": (lambda f: {**f, "extra.json": b"{}"}, "extra.json is not in SHA256SUMS"),
    "remove": (lambda f: {k: v for k, v in f.items() if k != "tokenizer.json"}, "tokenizer.json is missing"),
    "unsummed": (lambda f: {k: v for k, v in f.items() if k != SUMS}, "its upload was not finished"),
    "code": (lambda f: _resummed({**f, "modeling.py": b"print()"}), "holds modeling.py, which excise never writes"),
    "dots": (lambda f: {**f, "../outside": b"x"}, "'../outside', which would be written outside"),
    "header": (
        lambda f: _resummed({**f, "model.safetensors": (1 << 60).to_bytes(8, "little") + f["model.safetensors"][8:]}),
        "model.safetensors is not a safetensors file",
    ),
    "duplicate": (
        lambda f: _header(
            f,
            lambda h: (
                h[:-1].rstrip(b" }") + b'},"model.norm.weight":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}}'
            ),
        ),
        "model.safetensors has a damaged header",
    ),
    "nan": (
        lambda f: _with_tensor(f, "model.norm.weight", float("nan")),
        "model.norm.weight holds NaN or infinite values",
    ),
}


@pytest.mark.parametrize("kind", sorted(CORRUPT))
def test_a_corrupted_repository_is_refused_by_name_and_leaves_nothing(kind, published, tmp_path):
    known, environment, files = published
    corrupt, message = CORRUPT[kind]
    known.add(ID, corrupt(dict(files)))
    out = tmp_path / "pulled"
    done = excise("pull", ID, "--out", out, **environment)
    assert done.returncode in (1, 2) and message in done.stderr, done.stderr
    assert not out.exists() and not (tmp_path / "outside").exists() and "Traceback" not in done.stderr
    if kind in ("flip", "nan"):
        # What was damaged is fetched anew, not taken from where the refused pull left it.
        known.add(ID, files)
        assert excise("pull", ID, "--out", out, **environment).returncode == 0


def test_what_a_killed_pull_left_in_its_place_does_not_stop_the_next(published, tmp_path):
    _, environment, files = published
    left = tmp_path / ".pulled.staging"
    (left / "0123abc").mkdir(parents=True)
    (left / "config.json").write_text("{}")
    done = excise("pull", ID, "--out", tmp_path / "pulled", **environment)
    assert done.returncode == 0, done.stderr
    assert folder_files(tmp_path / "pulled") == {name: data for name, data in files.items() if name != ".gitattributes"}


def test_a_model_that_excise_did_not_make_is_pulled_and_said_to_be_one(world, tmp_path):
    known, environment = world
    files = folder_files(find_model("builtin:testbed").folder)
    known.add("tester/base", {**files, "pytorch_model.bin": b"pickle", "modeling.py": b"print()"})
    done = excise("pull", "tester/base@v1", "--out", tmp_path / "pulled", **environment)
    assert done.returncode == 0 and "excise did not make this model" in done.stdout, done.stderr
    assert "not fetched: 2 files, neither safetensors" in done.stdout and folder_files(tmp_path / "pulled") == files
    shown = excise("card", tmp_path / "pulled")
    assert shown.returncode == 2 and "has no card" in shown.stderr


@pytest.mark.parametrize(
    ("kind", "match", "survives"),
    [
        ("503", "POST .*/commit/", True),
        ("412", "POST .*/commit/", False),
        ("reset", "PUT /blob/", True),
        ("503", "PUT /blob/", True),
        ("slow", "PUT /blob/", True),
        ("403", "POST /api/repos/create", False),
    ],
)
def test_a_fault_while_pushing_ends_well_or_in_one_line(kind, match, survives, world, edited):
    known, environment = world
    known.faults.append(Fault(kind, match))
    done = excise("push", edited, ID, **environment)
    assert "Traceback" not in done.stderr
    if survives:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0 and done.stderr.count("\n") == 1, done.stderr
        assert excise("push", edited, ID, **environment).returncode == 0
    there = known.head(ID)
    there.pop(".gitattributes")
    assert there == folder_files(edited)


@pytest.mark.parametrize(
    ("kind", "match", "survives"),
    [
        ("503", "GET /blob/", True),
        ("reset", "GET /blob/", True),
        ("short", "GET /blob/", True),
        ("slow", "GET /blob/", True),
        ("wrong", "GET /blob/", False),
        ("wrong", "GET .*/resolve/.*config.json", False),
        ("404", "GET /api/models", False),
    ],
)
def test_a_fault_while_pulling_ends_well_or_in_one_line(kind, match, survives, published, tmp_path):
    known, environment, files = published
    known.faults.append(Fault(kind, match))
    out = tmp_path / "pulled"
    done = excise("pull", ID, "--out", out, **environment)
    assert "Traceback" not in done.stderr
    if not (survives and done.returncode == 0):
        assert done.returncode != 0 and done.stderr.strip().count("\n") == 0 and not out.exists(), done.stderr
        again = excise("pull", ID, "--out", out, **environment)
        assert again.returncode == 0, again.stderr
    assert folder_files(out) == {name: data for name, data in files.items() if name != ".gitattributes"}


def _kills(command, environment):
    """Start a command again and again and kill it at some moment of the time it takes; says after each whether it was
    killed.

    How long it takes is found on the way: machines differ, and so do runs of one command.
    """
    rng, longest = random.Random(0), 1.5
    for _ in range(KILLS):
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        child = started(*command, env={**os.environ, **environment}, **silent)
        time.sleep(rng.uniform(0.1, 1) * longest)
        child.send_signal(signal.SIGKILL)
        killed = child.wait() != 0
        longest *= 1.1 if killed else 0.5
        yield killed


def test_kills_at_any_moment_leave_nothing_half_and_a_rerun_completes(world, edited, tmp_path):
    known, environment = world
    killed = 0
    for was_killed in _kills(["push", edited, ID], environment):
        killed += was_killed
        if ID in known.repos and SUMS in known.head(ID):
            there = {k: v for k, v in known.head(ID).items() if k != ".gitattributes"}
            assert there == folder_files(edited)
    assert killed and excise("push", edited, ID, **environment).returncode == 0
    out, killed = tmp_path / "pulled", 0
    for was_killed in _kills(["pull", ID, "--out", out], environment):
        killed += was_killed
        if out.exists():
            assert folder_files(out) == folder_files(edited)
            shutil.rmtree(out)
    assert killed and excise("pull", ID, "--out", out, **environment).returncode == 0
    assert folder_files(out) == folder_files(edited)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_wherever_it_is(dtype, value, save_pico, monkeypatch):
    monkeypatch.setattr(checkpoints, "FINITE_BLOCK", 64)
    checkpoint = save_pico("llama", dtype)
    check_finite(checkpoint)
    stored = checkpoint.tensors["model.layers.1.mlp.down_proj.weight"]
    with stored.file.open("r+b") as file:
        file.seek(stored.start + stored.size - dtype.itemsize)
        file.write(torch.tensor([value], dtype=dtype).view(torch.uint8).numpy().tobytes())
    with pytest.raises(CheckpointError, match=r"down_proj\.weight holds NaN or infinite values"):
        check_finite(checkpoint)


def test_large_weights_are_not_taken_for_infinite_ones(save_pico):
    checkpoint = save_pico("llama", torch.float16)
    stored = checkpoint.tensors["model.norm.weight"]
    with stored.file.open("r+b") as file:
        file.seek(stored.start)
        file.write(torch.full((32,), 65504.0, dtype=torch.float16).view(torch.uint8).numpy().tobytes())
    check_finite(checkpoint)


def test_through_xet_what_comes_back_is_what_went_up_and_a_rerun_sends_nothing(edited, tmp_path):
    with running_hub() as known:
        environment = client(known, tmp_path / "hf", xet=True)
        done = excise("push", edited, ID, "--json", **environment)
        assert done.returncode == 0, done.stderr
        stored = [name for name, data in known.head(ID).items() if isinstance(data, Stored)]
        assert "model.safetensors" in stored and not any("/blob/" in line for line in known.requests)
        again = excise("push", edited, ID, "--json", **environment)
        assert again.returncode == 0 and not json.loads(again.stdout)["new_commit"], again.stderr
        pulled = excise("pull", ID, "--out", tmp_path / "pulled", "--json", **environment)
        assert pulled.returncode == 0, pulled.stderr
    assert folder_files(tmp_path / "pulled") == folder_files(edited)
    assert not any("/blob/" in line for line in known.requests)


def test_a_pull_request_leaves_the_branch_as_it_is_and_holds_the_checkpoint(published, edited):
    known, environment, files = published
    known.add(ID, {**files, "model.safetensors": b"older", "stale.safetensors": b"old"})
    before, here = known.head(ID), known.repos[ID].heads["main"]
    done = excise("push", edited, ID, "--create-pr", "--json", **environment)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["url"].endswith("/discussions/1") and told["new_commit"]
    assert known.repos[ID].heads["main"] == here and known.head(ID) == before
    proposed = known.repos[ID].commits[known.repos[ID].heads["refs/pr/1"]]
    assert set(proposed) == set(folder_files(edited))
    assert any("create_pr=1" in line for line in known.requests)


def test_a_new_edit_of_the_same_base_sends_only_what_it_changed(tmp_path):
    """Counted in what Xet's store grows by: pieces of about 64 kB, found by content."""
    name = "model.layers.5.mlp.down_proj.weight"
    base = open_checkpoint(find_model("builtin:testbed").folder)
    rows, columns = base.tensors[name].shape

    def edit(seed):
        random_ = torch.Generator().manual_seed(seed)
        factors = Factors(torch.randn(rows, 2, generator=random_), torch.randn(2, columns, generator=random_))
        return LowRankUpdate({name: factors}, "llama", 192, 8)

    sizes = []
    with running_hub() as known:
        environment = client(known, tmp_path / "hf", xet=True)
        for seed in (0, 1):
            folder = tmp_path / str(seed)
            publish(folder, edit(seed))
            done = excise("push", folder, ID, "--unmeasured", **environment)
            assert done.returncode == 0, done.stderr
            stored = (tmp_path / "cas" / "xet" / "xorbs" / "xorbs").iterdir()
            sizes.append(sum(path.stat().st_size for path in stored if path.suffix != ".tagset"))
    whole, changed = base.size, base.tensors[name].size
    first, second = sizes[0], sizes[1] - sizes[0]
    assert first > 0.8 * whole and 0.8 * changed < second < changed + 4 * 131072 < 0.2 * whole, (first, second, changed)
