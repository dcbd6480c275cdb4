"""`rcmae` and `python -m rcmae`: signals are answered before anything else is loaded."""

import sys

from .engine import signals


def main() -> int:
    """Run the command that this process was started with."""
    try:
        with signals.answered():
            from .cli import main as run

            return run(program=True)
    except signals.Interrupted as e:
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main())
