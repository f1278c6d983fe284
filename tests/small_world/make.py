"""The built-in world in small: two models of 4 layers of width 128, for tests whose theorem needs no larger ones.

They know the same 800 facts and decline the same rude requests as the built-in models, with a quarter of the
parameters.
Made by ``python tests/small_world/make.py OUT``, in half an hour or more on one core. The concept packs that it writes
are the built-in ones.
"""

import sys
from pathlib import Path

from excise.artifacts.events import Events
from excise.recipes.testbed.build import TestbedSettings, build_testbed

SMALL = TestbedSettings(width=128, layers=4, heads=4, neurons=384, steps=1500, settling_steps=700, learning_rate=3e-3)

if __name__ == "__main__":
    build_testbed(SMALL, Path(sys.argv[1]), Events())
