"""Every example of docs/extending.md runs as it stands there."""

from pathlib import Path

import pytest
from helpers import SMALL_TESTBED, run_file

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SHORT = (f"model={SMALL_TESTBED}", "steps=2", "batch_size=4", "questions=8", "kl_prompts=4", "max_new_tokens=4")


def _run(name: str, *arguments: object) -> str:
    done = run_file(EXAMPLES / f"{name}.py", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("architecture", "tensors write to the stream"),
        ("autoencoder_format", "2 latents at the output of layer 3"),
        ("measurement", "neutral: "),
    ],
)
def test_an_example_of_the_pages_runs(name, printed):
    assert printed in _run(name)


def test_the_example_attack_brings_back_what_is_known_and_only_that():
    lines = _run("attack").splitlines()
    known, unknown = (float(line.split(": ")[1].split()[0]) for line in lines)
    assert known > 0.8 and unknown < 0.4


@pytest.mark.parametrize("name", ["method", "unlearning_method"])
def test_an_example_method_publishes_a_checkpoint(tmp_path, name):
    assert "'edited'" in _run(name, tmp_path / "run", *SHORT)
    assert (tmp_path / "run" / "checkpoint" / "SHA256SUMS").is_file()
    assert (tmp_path / "run" / "report.html").is_file()


def test_extending_shows_every_example():
    page = (EXAMPLES.parent / "extending.md").read_text(encoding="utf-8")
    named = {path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith("relearn_")}
    assert {name for name in named if f"generated: example {name}" in page} == named
