import pytest
from excise.artifacts.concepts import load_concept
from excise.editing.errors import RequestError
from excise.recipes.concept.scaffold import SAMPLES, new
from helpers import excise


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_new_pack_loads_and_explains_every_file(kind, tmp_path):
    new(tmp_path / "pack", kind)
    concept = load_concept(tmp_path / "pack")
    assert concept.about.kind == kind and concept.made == ()
    readme = (tmp_path / "pack" / "README.md").read_text()
    assert all(f"`{path.name}`" in readme for path in (tmp_path / "pack").iterdir() if path.name != "README.md")
    assert (tmp_path / "pack" / "concept.yaml").read_text().count("# ") >= 5
    with pytest.raises(RequestError, match="exists already"):
        new(tmp_path / "pack", kind)


def test_a_new_pack_runs_on_the_built_in_model_as_it_is(tmp_path):
    done = excise("concept", "new", tmp_path / "pack", "--kind", "behaviour")
    assert done.returncode == 0, done.stderr
    command = done.stdout.split("next:")[1].split("excise ")[2].split()
    done = excise(*command[:-1], tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wrong = excise("concept", "new", tmp_path / "other", "--kind", "fact")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "knowledge, behaviour, task" in wrong.stderr
