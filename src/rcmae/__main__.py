"""`rcmae` and `python -m rcmae`: signals are answered before anything else is loaded."""

import sys

from .engine import signals


def main() -> int:
    """Run the command that this process was started with."""
    code = 0
    try:
        with signals.answered():
            from .cli import main as run

            code = run()
    except signals.Interrupted as e:
        code = e.exit_code
    if signals.asked():
        signals.end_at_once(code)  # what loader processes are doing is of no use any more
    return code


if __name__ == "__main__":
    sys.exit(main())
