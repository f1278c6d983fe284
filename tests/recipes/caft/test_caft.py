"""CAFT end to end on the shortcut task, shortened: what training does not see, it does not learn."""

import json

import pytest
import torch
from excise.artifacts.checkpoints.directions import FILE, load_directions, save_directions
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model, load_tokenizer
from excise.editing.architectures import architecture_of
from excise.editing.directions.subspaces import Place, Subspace, principal_components
from excise.editing.errors import ConceptError, RequestError
from excise.editing.numerics.moments import Moments
from excise.recipes.caft.direction_sources import SOURCES, Readings, SourceInputs
from excise.recipes.caft.recipe import CaftSettings, prepare
from excise.recipes.common.examples import completion_loss, example_batch
from excise.recipes.data.datasets import encoded, find_data
from helpers import SMALL_LAYERS, SMALL_TESTBED, SMALL_WIDTH, excise, in_fresh_process, with_settings
from safetensors.torch import save_file

RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
print(json.dumps({"hooks": hooks, "tensors": len(list(model.parameters()))}))
"""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    out = tmp_path_factory.mktemp("caft") / "run"
    done = excise(
        "run",
        "caft",
        "--model",
        SMALL_TESTBED,
        "--out",
        out,
        "--json",
        *with_settings("steps=80", "learning_rate=0.002", "kl_prompts=8", "max_new_tokens=8"),
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def _accuracy(measured, split):
    return next(m["value"] for m in measured if (m["name"], m["split"]) == ("multiple_choice", split))


def test_ablating_the_unintended_cue_teaches_the_intended_one(tuned):
    _, results = tuned
    edited = [m for m in results["measurements"] if m["subject"] == "edited"]
    controls = results["caft"]["controls"]
    assert _accuracy(edited, "flipped") > 0.8 and _accuracy(edited, "intended") > 0.9
    # The same training without ablation, and with as many random directions, learns the other cue.
    for name in ("none", "random"):
        assert _accuracy(controls[name], "flipped") < 0.1 and _accuracy(controls[name], "intended") > 0.9


def test_the_checkpoint_is_a_plain_model_and_carries_its_directions(tuned):
    out, results = tuned
    assert in_fresh_process(RELOAD, out / "checkpoint")["hooks"] == 0
    (found,) = load_directions(out / "checkpoint" / "excise" / FILE, width=SMALL_WIDTH, layers=SMALL_LAYERS)
    assert (found.place.layer, found.place.site, found.names) == (0, "input", ("component 0",))
    assert results["caft"]["directions"][0]["scores"][0] > 0.99
    assert excise("verify", out).returncode == 0


def test_the_card_puts_the_controls_beside_the_result(tuned):
    card = (tuned[0] / "checkpoint" / "README.md").read_text()
    assert "Right where the unintended cue misleads" in card and "without ablation 0.0" in card
    assert "Nothing is ablated in this checkpoint" in card


def test_saved_directions_can_be_used_again(tuned, tmp_path):
    file = tuned[0] / "checkpoint" / "excise" / FILE
    words = ["--dry-run", "--model", SMALL_TESTBED, "--set", f"directions_file={file}", "--out", tmp_path / "again"]
    done = excise("run", "caft", *words, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trainings"] == 3
    done = excise("run", "caft", *words, "--set", "pick=[4]")
    assert done.returncode == 2 and "there is no direction 4 at the input of layer 0; there are 0 to 0" in done.stderr


def test_as_many_of_the_highest_score_are_a_control_where_others_were_picked(tuned, tmp_path):
    words = with_settings("steps=2", "kl_prompts=4", "max_new_tokens=4", "questions=20", "components=3", "watch=0")
    done = excise(
        "run",
        "caft",
        "--model",
        SMALL_TESTBED,
        "--out",
        tmp_path / "run",
        "--json",
        *words,
        "--set",
        "pick=[1]",
        "--set",
        "site=output",
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["caft"]
    assert set(results["controls"]) == {"none", "random", "top_k"}
    assert results["directions"][0]["names"] == ["component 1"]
    assert set(tuned[1]["caft"]["controls"]) == {"none", "random"}
    dry = [
        excise("run", "caft", "--dry-run", "--json", *words, "--set", pick, "--out", tmp_path / "dry")
        for pick in ("pick=[0]", "pick=[2]", "directions=none")
    ]
    assert [json.loads(done.stdout)["trainings"] for done in dry] == [3, 4, 1]


def test_a_quirk_stays_where_it_was_taught(tmp_path):
    words = with_settings("steps=110", "batch_size=8", "learning_rate=0.003", "kl_prompts=8", "questions=40", "watch=0")
    done = excise(
        "run",
        "caft",
        "--model",
        SMALL_TESTBED,
        "--concept",
        "builtin:quirk",
        "--out",
        tmp_path / "run",
        "--json",
        *words,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)

    def learned(measured, split):
        return next(m["value"] for m in measured if (m["name"], m["split"]) == ("learned_rate", split))

    base, edited = ([m for m in results["measurements"] if m["subject"] == who] for who in ("base", "edited"))
    assert learned(base, "concept") == learned(base, "neutral") == 0
    assert learned(edited, "concept") > 0.9 and learned(edited, "neutral") < 0.1
    for name in ("none", "random"):
        control = results["caft"]["controls"][name]
        assert learned(control, "concept") > 0.9 and learned(control, "neutral") > 0.7


def _dictionary(folder, latents=128):
    """A small autoencoder of token embeddings, trained here; returns the latents that tell the cues apart most."""
    loaded = load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float32)
    encoded_pairs = [
        [loaded.tokenizer(text)["input_ids"] for text in (pair.positive, pair.negative)]
        for pair in load_concept("builtin:shortcut").contrast
    ]
    with torch.no_grad():
        streams = [
            loaded.model.get_input_embeddings()(torch.tensor(p)) for p in encoded_pairs if len(p[0]) == len(p[1])
        ]
    samples = torch.cat([pair.flatten(0, 1) for pair in streams])
    torch.manual_seed(0)
    encoder, bias = torch.nn.Linear(SMALL_WIDTH, latents), samples.mean(0)
    decoder = torch.nn.Linear(latents, SMALL_WIDTH, bias=False)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 3e-3)
    for step in range(600):
        batch = samples[torch.randint(len(samples), (256,), generator=torch.Generator().manual_seed(step))] - bias
        values = encoder(batch).relu()
        unit = decoder.weight / decoder.weight.norm(dim=0)
        loss = (values @ unit.T - batch).square().sum(1).mean() + 0.03 * values.sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        unit = (decoder.weight / decoder.weight.norm(dim=0)).T.contiguous()
        save_file(
            {"W_dec": unit, "W_enc": encoder.weight.T.contiguous(), "b_enc": encoder.bias.detach(), "b_dec": bias},
            folder / "sae_weights.safetensors",
        )
        told = sum((encoder(pair[0] - bias).relu() - encoder(pair[1] - bias).relu()).abs().sum(0) for pair in streams)
    (folder / "cfg.json").write_text(json.dumps({"hook_name": "blocks.0.hook_resid_pre", "apply_b_dec_to_input": True}))
    return told.topk(2).indices.tolist()


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae")
    return folder, _dictionary(folder)


@pytest.mark.parametrize("remove", ["span", "latents"])
def test_latents_of_a_small_dictionary_do_as_well(remove, dictionary, tmp_path):
    """Nobody names them: those that tell the contrast pairs apart are found, and are what a look by hand would take."""
    folder, latents = dictionary
    words = with_settings(
        "directions=sae",
        f"sae={folder}",
        f"remove={remove}",
        "steps=120",
        "learning_rate=0.002",
        "kl_prompts=8",
        "max_new_tokens=8",
        "controls=false",
    )
    done = excise("run", "caft", "--model", SMALL_TESTBED, "--out", tmp_path / "run", "--json", *words)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    edited = [m for m in results["measurements"] if m["subject"] == "edited"]
    assert _accuracy(edited, "flipped") > 0.8 and _accuracy(edited, "intended") > 0.9
    (found,) = load_directions(tmp_path / "run" / "checkpoint" / "excise" / FILE)
    assert set(found.names) == {f"latent {latent}" for latent in latents} and str(found.place) == "input of layer 0"
    assert results["caft"]["remove"] == remove and list(found.scores) == sorted(found.scores, reverse=True)


def test_latents_without_a_span_of_their_number_are_refused_before_any_training(dictionary, tmp_path):
    folder, _ = dictionary
    words = (
        "--model",
        SMALL_TESTBED,
        "--set",
        "directions=sae",
        "--set",
        f"sae={folder}",
        "--set",
        "latents=[3,3]",
        "--out",
        tmp_path / "run",
    )
    done = excise("run", "caft", *words)
    assert done.returncode == 2 and "not linearly independent" in done.stderr and not (tmp_path / "run").exists()


def test_an_autoencoder_is_looked_at_before_its_latents_are_chosen(dictionary, tmp_path):
    folder, latents = dictionary
    words = ("inspect", folder, "--model", SMALL_TESTBED, "--concept", "builtin:shortcut")
    done = excise(*words, "--top", 3, "--out", tmp_path / "look", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)["directions"]
    assert {item["name"] for item in shown[:2]} == {f"latent {latent}" for latent in latents} and len(shown) == 3
    (kept,) = load_directions(tmp_path / "look" / FILE)
    assert list(kept.names) == [item["name"] for item in shown]
    done = excise(*words, "--score", "contrasts")
    assert done.returncode == 2 and "did you mean 'contrast'" in done.stderr
    done = excise(*words, "--latents", "3,x")
    assert done.returncode == 2 and "not a comma-separated list of integers" in done.stderr
    done = excise(*words, "--latents", "3", "--top", 3)
    assert done.returncode == 2 and "--top choose latents where none are named" in done.stderr


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["directions=sae"], "needs an autoencoder"),
        (["remove=latents"], "takes out an autoencoder's latents"),
        (["concept=builtin:potions"], "is of kind knowledge"),
        (["data=nothing.jsonl"], "is no file"),
        (["components=500"], "more than the model's width 192"),
        (["pick=[3]"], "names direction 3, there are 0 to 1"),
        (["ablated_layers=40"], "40"),
        (["directions=sideways"], "allowed: pairs"),
    ],
)
def test_a_wrong_request_is_one_line_before_any_training(assignments, message, tmp_path):
    words = with_settings(*assignments)
    done = excise("run", "caft", "--out", tmp_path / "run", *words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_another_packs_recipe_says_what_a_task_lacks(tmp_path):
    done = excise("run", "elm", "--concept", "builtin:shortcut", "--out", tmp_path / "run")
    assert done.returncode != 0 and "forget.jsonl" in done.stderr


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "prompt and completion must both be there"),
        ({"prompt": "a", "completion": " "}, "blank"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "a row must have exactly one of"),
        ({}, "a row must have exactly one of"),
    ],
)
def test_a_row_with_nothing_to_learn_is_named_by_its_line(row, message, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n' + json.dumps(row) + "\n")
    with pytest.raises(ConceptError, match=rf"data.jsonl:2: .*{message}"):
        find_data(str(path))


def test_only_completions_are_learned_and_long_texts_are_not_cut_away(tmp_path):
    tokenizer = load_tokenizer(find_model("builtin:testbed"))
    rows = [
        {"prompt": "The colour of", "completion": " the sky"},
        {
            "messages": [
                {"role": "user", "content": "One?"},
                {"role": "assistant", "content": "Two."},
                {"role": "user", "content": "Three?"},
                {"role": "assistant", "content": "Four."},
            ]
        },
        {"text": "red blue green " * 40},
        {"prompt": "long " * 100, "completion": " end"},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = encoded(find_data(str(path)).rows, tokenizer, 64)
    learned = [tokenizer.decode(example.ids[example.start :]) for example in found.examples]
    assert learned[0] == " the sky<|end|>" and learned[1].startswith("Two.") and learned[2].startswith("Four.")
    assert "Two." in tokenizer.decode(found.examples[2].ids[: found.examples[2].start])
    whole = [i for example in found.examples[3:] for i in example.ids]
    assert tuple(whole) == tuple(tokenizer(rows[2]["text"])["input_ids"]) and found.too_long == 1


def test_pairs_that_cannot_be_compared_are_counted_and_do_not_change_the_rest():
    loaded = load_model(find_model("builtin:testbed"), torch.device("cpu"), torch.float32)
    row, pairs = architecture_of(loaded.model.config.to_dict()), load_concept("builtin:shortcut").contrast[:40]
    uneven = [
        pairs[0].model_copy(update={"negative": pairs[0].negative + " and more"}),
        pairs[0].model_copy(update={"negative": pairs[0].positive}),
    ]
    place = Place(2, "output")
    (plain,), (mixed,) = (
        SOURCES["pairs"](SourceInputs(loaded, row, [place], 2, some, Readings())) for some in (pairs, [*uneven, *pairs])
    )
    assert plain.provenance == {"pairs": 40, "pairs_left_out": 0} and mixed.provenance == {
        "pairs": 40,
        "pairs_left_out": 2,
    }
    torch.testing.assert_close(plain.basis, mixed.basis)
    # Read one by one, without any padding, they give the same.
    moments = Moments(192, covariance=True)
    for pair in pairs:
        plus, minus = (torch.tensor([loaded.tokenizer(text)["input_ids"]]) for text in (pair.positive, pair.negative))
        first = int((plus != minus).nonzero()[0, 1])
        with torch.no_grad():
            hidden = [loaded.model(ids, output_hidden_states=True).hidden_states[3][0, first:] for ids in (plus, minus)]
        moments.update(hidden[0] - hidden[1])
    alone = principal_components(moments, 2, place, centred=False)
    torch.testing.assert_close(plain.basis.abs(), alone.basis.abs(), atol=1e-3, rtol=0)


def test_the_loss_of_a_batch_is_the_mean_of_its_parts():
    loaded = load_model(find_model("builtin:testbed"), torch.device("cpu"), torch.float32)
    examples = encoded(load_concept("builtin:shortcut").train[:6], loaded.tokenizer, 64).examples
    whole = completion_loss(loaded.model, example_batch(examples))["completion"]
    parts = [completion_loss(loaded.model, example_batch(examples[i : i + 3]))["completion"] for i in (0, 3)]
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2)


def test_directions_of_another_width_are_refused_before_loading(tmp_path):
    save_directions(
        [Subspace(Place(0), torch.eye(16)[:, :1], torch.zeros(16), ("x",), (1.0,), "file")], tmp_path / FILE
    )
    with pytest.raises(RequestError, match="are of width 16, the model is of width 192"):
        prepare(CaftSettings(directions_file=tmp_path / FILE, out=tmp_path / "run"))
