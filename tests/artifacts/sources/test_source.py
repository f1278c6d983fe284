import os
import subprocess
import sys

from benchmark_sets import files_of
from loopback_hub import client
from loopback_hub import hub as running_hub

READ = """
from excise.artifacts.sources import hub_sets
from excise.artifacts.sources.source import read_source
hub_sets.LARGE = {large}
source = read_source("hub:org/set", 50)
print(source.name, source.total, [row.columns["text"][:9] for row in source.rows])
"""


def test_a_large_set_is_streamed_and_drawn_as_a_small_one_is(tmp_path):
    rows = [{"text": f"row {n:04} " + "x" * 200} for n in range(500)]
    with running_hub() as known:
        commit = known.add_set("org/set", files_of({"default": {"train": rows}}))
        printed = []
        for large in (0, 1 << 40):
            home = tmp_path / str(large)
            environment = {**os.environ, **client(known, home), "HF_DATASETS_CACHE": str(home / "sets")}
            command = [sys.executable, "-c", READ.format(large=large)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            printed.append(done.stdout)
            # What is streamed is not kept.
            assert any((home / "sets").rglob("*.arrow")) == (large > 0)
    assert printed[0] == printed[1] and f"hub:org/set:default:train@{commit} 500" in printed[0]
    assert printed[0].count("row ") == 50
