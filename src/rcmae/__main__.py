"""`rcmae` and `python -m rcmae`. Signals are handled before anything else is imported."""

import sys

from .engine import signals
from .engine.neighbors import Neighbors


def main() -> int:
    try:
        with signals.handled():
            neighbors = Neighbors()
            from .cli import main as run

            neighbors.choose()  # the import took long enough to measure them
            code = run(program=True)
    except signals.Interrupted as e:
        signals.end_at_once(e.exit_code)
    signals.ignore()  # the work is done, but Python takes a second to exit
    return code


if __name__ == "__main__":
    sys.exit(main())
