"""`rcmae` and `python -m rcmae`. Signals are handled before anything else is imported."""

import sys

from .engine import signals


def main() -> int:
    try:
        with signals.handled():
            from .cli import main as run

            code = run(program=True)
    except signals.Interrupted as e:
        signals.end_at_once(e.exit_code)
    signals.ignore()  # the work is done, but Python takes a second to exit
    return code


if __name__ == "__main__":
    sys.exit(main())
