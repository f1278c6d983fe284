"""Hold what computes against its definition, and damage files to see that every reader refuses or accepts them.

    python -m tests.fuzz --minutes 10 [--seed 0] [--only NAME ...] [--accepted]

Half of the time goes to each, unless names are given. A damaged file that is accepted needs a reason in ``accepted.py``.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("XDG_CACHE_HOME", tempfile.mkdtemp(prefix="excise-fuzz-cache-"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The oracles share helpers with the tests.
sys.path.insert(0, str(Path(__file__).parent.parent))


def main() -> int:
    """Run, and print what was found; 1 where anything was unexpected."""
    from transformers.utils import logging

    from .compare import compare
    from .examples import EXAMPLES
    from .oracles import ORACLES
    from .runner import accepted, fuzz, report

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[*ORACLES, *EXAMPLES], action="append", default=[])
    parser.add_argument("--accepted", action="store_true", help="list what was accepted, and why")
    options = parser.parse_args()
    oracles = [name for name in options.only if name in ORACLES]
    readers = [name for name in options.only if name in EXAMPLES]
    both = bool(oracles) == bool(readers)
    seconds, failed = 60 * options.minutes / (2 if both else 1), 0
    if oracles or not readers:
        failed += compare(seconds, options.seed, oracles)
    if readers or not oracles:
        outcome = fuzz(seconds, options.seed, readers)
        print("\n".join([*(accepted(outcome) if options.accepted else ()), *report(outcome)]))
        failed += len(outcome.unexpected)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
