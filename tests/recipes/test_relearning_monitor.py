"""The monitor sees a concept come back and leaves the training as it was."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from excise.artifacts.checkpoints.edits import save_edit
from excise.artifacts.checkpoints.export import export_edit
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.editing.edits.base import edit_model
from excise.editing.edits.pruned_units import PrunedUnits
from excise.editing.errors import RequestError
from excise.editing.hooks.unit_scores import rank_correlation
from excise.recipes.relearning_monitor import RelearningMonitor, centre, overlap
from helpers import SMALL_TESTBED, run_file
from pack_shapes import shaped
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
UNITS = {0: tuple(range(60)), 7: tuple(range(100, 140))}


def _pruned():
    loaded = load_model(find_model("builtin:testbed"), torch.device("cpu"), torch.float32)
    edit = PrunedUnits(UNITS, {}, "down", "llama", 192, 8, 1)
    edit_model(edit, loaded.model, loaded.model.config.to_dict())
    return loaded, edit


def _train(folder, *callbacks, steps=4):
    loaded, edit = _pruned()
    texts = [text.text for text in load_concept("builtin:potions").forget if text.group == "T"][:64]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    trainer = Trainer(
        model=loaded.model,
        args=arguments,
        train_dataset=[loaded.tokenizer(text) for text in texts],
        data_collator=DataCollatorForLanguageModeling(loaded.tokenizer, mlm=False),
    )
    monitors = [make(loaded, edit) for make in callbacks]
    for monitor in monitors:
        trainer.add_callback(monitor)
    trainer.train()
    return loaded.model, monitors


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    place = tmp_path_factory.mktemp("watched")

    def make(loaded, edit):
        return RelearningMonitor(
            "builtin:potions", loaded.tokenizer, pruned=edit, out=place / "out", questions=24, texts=24
        )

    model, (monitor,) = _train(place / "trainer", make)
    return place / "out", model, monitor


def test_training_ends_in_the_same_weights_with_and_without_it(watched, tmp_path):
    _, model, _ = watched
    alone, _ = _train(tmp_path)
    other, _ = _train(tmp_path, steps=3)
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert not all(torch.equal(p, model.get_parameter(name)) for name, p in other.named_parameters())


def test_it_looks_at_powers_of_two_and_the_last_step(watched):
    out, _, monitor = watched
    events = [json.loads(line) for line in (out / "monitor.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [seen.step for seen in monitor.seen] == [0, 1, 2, 4]
    assert all(0 <= e["accuracy"]["ci95"][0] <= e["accuracy"]["value"] <= e["accuracy"]["ci95"][1] <= 1 for e in events)
    assert (out / "recovery.png").stat().st_size > 10_000


def test_pruned_units_grow_back_and_are_left_out_of_the_picture(watched):
    _, _, monitor = watched
    first, last = (monitor.event(seen) for seen in (monitor.seen[0], monitor.seen[-1]))
    assert first["regrowth"] == 0 < last["regrowth"]
    assert first["overlap_of_top"] == first["similarity_of_tokens"] == 1
    assert first["rank_correlation"] == pytest.approx(1) and last["rank_correlation"] < 0.999
    assert first["centre_of_mass"] == first["centre_of_mass_before"] == last["centre_of_mass_before"]
    assert any(unit == "0.3" for unit in monitor.seen[-1].tokens)


def test_the_units_that_carry_the_concept_are_held_against_what_they_were_there_for(watched):
    _, _, monitor = watched
    # What units are for among the neighbours is read before and after, and not in between.
    assert [monitor.event(seen)["carriers"] is None for seen in monitor.seen] == [
        False,
        *[True] * (len(monitor.seen) - 2),
        False,
    ]
    first, last = (monitor.event(seen)["carriers"] for seen in (monitor.seen[0], monitor.seen[-1]))
    assert first["concept"] == first["concept_before"] and first["neighbour"] == first["neighbour_before"] > 0
    # Of the units that are strongest now, no others can have been stronger before than the strongest were.
    assert last["concept_before"] < first["concept_before"] and last["neighbour"] != last["neighbour_before"]


def test_training_state_is_put_back_even_where_modules_differ():
    loaded, _ = _pruned()
    loaded.model.train()
    loaded.model.model.layers[0].eval()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    RelearningMonitor("builtin:potions", loaded.tokenizer, questions=4, texts=4).look(loaded.model, 0)
    assert torch.equal(before, torch.get_rng_state())
    assert loaded.model.training and not loaded.model.model.layers[0].training and loaded.model.model.layers[1].training


def test_a_pack_of_questions_is_watched_and_one_with_nothing_to_compare_is_one_line(tmp_path):
    """Its texts are the questions with their answers; what is compared with nothing has no effect to measure."""
    folder = shaped(tmp_path / "pack", "held_out_alone")
    loaded = load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float32)
    monitor = RelearningMonitor(folder, loaded.tokenizer)
    seen = monitor.look(loaded.model, 0)
    assert seen.accuracy["value"] > 0.9 and seen.effect.isfinite().all() and seen.effect.abs().max() > 0.5
    alone = dataclasses.replace(load_concept(folder), retain=())
    with pytest.raises(RequestError, match="neither retain texts nor questions on anything else"):
        RelearningMonitor(alone, loaded.tokenizer)


def test_the_same_map_overlaps_and_another_does_not():
    one = torch.arange(200.0)
    assert overlap(one, one) == 1 and overlap(one, -one) == 0
    assert rank_correlation(one, one * 3) == pytest.approx(1) and rank_correlation(one, -one) == pytest.approx(-1)
    assert centre([1, 0, 1]) == 1 and centre([0, 0]) == 0


def test_what_is_no_prune_run_is_refused(tmp_path):
    loaded, _ = _pruned()
    with pytest.raises(RequestError, match="holds no edit; give a prune run"):
        RelearningMonitor("builtin:potions", loaded.tokenizer, pruned=tmp_path)


@pytest.mark.parametrize("name", ["relearn_with_trainer", "relearn_with_trl"])
def test_the_examples_run(name, tmp_path):
    if name.endswith("trl"):
        pytest.importorskip("trl", reason="TRL is not installed")
    run, source = tmp_path / "prune", find_model("builtin:testbed")
    _, edit = _pruned()
    checkpoint = run / "checkpoint"
    checkpoint.mkdir(parents=True)
    export_edit(edit, open_checkpoint(source.folder), checkpoint)
    save_edit(edit, checkpoint / "excise")
    done = run_file(EXAMPLES / f"{name}.py", run, tmp_path / "watched", 2)
    assert done.returncode == 0, done.stderr
    events = (tmp_path / "watched" / "monitor.jsonl").read_text().splitlines()
    assert [json.loads(event)["step"] for event in events] == [0, 1, 2]
