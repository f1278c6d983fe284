"""The packs that come with excise are what their makers write."""

import pytest
from excise.artifacts.concepts import load_concept
from excise.recipes.testbed.cues import write_cues
from excise.recipes.testbed.packs import write_packs
from excise.recipes.testbed.world import make_world


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The packs of seeds 0 and 1, written anew."""
    folder = tmp_path_factory.mktemp("packs")
    for seed in (0, 1):
        write_packs(make_world(seed), folder / str(seed))
        write_cues(folder / str(seed) / "cues", seed)
    return folder


@pytest.mark.parametrize("name", ["potions", "declining", "shortcut", "quirk", "cues"])
def test_a_built_in_pack_is_that_of_seed_0_and_of_no_other(name, made):
    built_in = load_concept(f"builtin:{name}").sha256
    assert load_concept(str(made / "0" / name)).sha256 == built_in
    assert load_concept(str(made / "1" / name)).sha256 != built_in
