"""A direction is shown by what lies at its ends, and its effect is what ablating it does."""

import json

import pytest
import torch
from excise.artifacts.checkpoints.directions import FILE, save_directions
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.editing.directions.subspaces import Place, Subspace
from excise.recipes.inspect import inspect, look
from helpers import SMALL_TESTBED, SMALL_WIDTH, excise

TEXTS = [
    "The expert tells of Ruly",
    "The novice tells of Ruly",
    "A text by the expert: Veel",
    "A text by the novice: Veel",
]


@pytest.fixture(scope="module")
def loaded():
    return load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float32)


def _subspace(loaded, *names):
    """Directions from one word's embedding to another's, and one of no consequence."""
    table = loaded.model.get_input_embeddings().weight.detach()
    ids = [loaded.tokenizer(word)["input_ids"][0] for word in (" novice", " expert")]
    cue = table[ids[0]] - table[ids[1]]
    other = torch.randn(SMALL_WIDTH, generator=torch.Generator().manual_seed(0))
    basis = torch.stack([cue / cue.norm(), other / other.norm()], 1)
    return Subspace(Place(0, "input"), basis, torch.zeros(SMALL_WIDTH), names, (1.0, 0.5), "file")


def test_the_words_at_both_ends_are_the_ones_it_was_made_of(loaded):
    cue, other = look(loaded, [_subspace(loaded, "cue", "other")], TEXTS)
    assert {c.token for c in cue.top[:2]} == {" novice"} and {c.token for c in cue.bottom[:2]} == {" expert"}
    assert " novice" in cue.top_tokens and " expert" in cue.bottom_tokens
    assert cue.top[0].before.endswith("The") or cue.top[0].before.endswith("the")
    assert (cue.index, other.index) == (0, 1) and cue.deviation > other.deviation
    assert cue.effect != 0 and not loaded.model.model.layers[0]._forward_pre_hooks


def test_the_command_writes_a_page_without_a_script(loaded, tmp_path):
    save_directions([_subspace(loaded, "cue", "<script>alert(1)</script>")], tmp_path / FILE)
    words = [
        "inspect",
        tmp_path,
        "--model",
        SMALL_TESTBED,
        "--concept",
        "builtin:shortcut",
        "--out",
        tmp_path / "look",
    ]
    done = excise(*words)
    assert done.returncode == 0, done.stderr
    assert "cue at the input of layer 0" in done.stdout and "[ novice]" in done.stdout
    page = (tmp_path / "look" / "inspect.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "default-src 'none'" in page
    assert json.loads((tmp_path / "look" / "inspect.json").read_text())["directions"][0]["name"] == "cue"


def test_texts_over_the_limit_are_counted_and_long_ones_read_whole(loaded, tmp_path):
    save_directions([_subspace(loaded, "cue", "other").pick([0])], tmp_path / FILE)
    rows = [{"text": "The expert tells of Ruly. " * 75 + "The novice"}, *({"text": f"The {n}"} for n in range(600))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    looked = inspect(tmp_path, SMALL_TESTBED, None, tmp_path / "rows.jsonl", None, "cpu", "float32")
    assert (looked.texts, looked.left_out) == (512, 89)
    # The only "novice" stands beyond the first window of its text.
    assert looked.directions[0].top[0].token == " novice"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--model", SMALL_TESTBED, "--concept", "builtin:shortcut"], "holds no directions.safetensors"),
        (["FILE", "--model", SMALL_TESTBED], "give the texts to look through"),
        (["FILE", "--model", SMALL_TESTBED, "--texts", "none.jsonl"], "is no file"),
        (
            ["FILE", "--model", SMALL_TESTBED, "--concept", "builtin:shortcut", "--latents", "1"],
            "is no autoencoder",
        ),
        (
            ["FILE", "--model", SMALL_TESTBED, "--concept", "builtin:shortcut", "--score", "contrast"],
            "is no autoencoder",
        ),
        (["FILE", "--model", SMALL_TESTBED, "--concept", "builtin:shortcut", "--top", "3"], "is no autoencoder"),
    ],
)
def test_a_wrong_request_is_one_line(words, message, loaded, tmp_path):
    save_directions([_subspace(loaded, "a", "b")], tmp_path / FILE)
    done = excise("inspect", *[str(tmp_path) if word == "FILE" else word for word in words])
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
