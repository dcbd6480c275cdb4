"""Fill the tables of README.md and docs from results/*.json: `python -m benchmarks.tables`.

A table goes between `<!-- table: NAME -->` and `<!-- end -->`. tests/test_package.py checks that all are up
to date.
"""

import json
import re
import textwrap
from collections.abc import Callable

from benchmarks import (
    ROOT,
    alarms,
    answered,
    bundled,
    busy,
    claim,
    commands,
    corruptions,
    detection,
    detection_step,
    digits_difficulty,
    evaluation,
    half_life,
    index,
    intervals,
    lab,
    learns,
    length,
    loader,
    mechanism,
    monitor_cost,
    own_pictures,
    paper,
    pictures,
    side_by_side,
    step,
)

TABLES: dict[str, tuple[Callable[..., str], str]] = {
    "answered": (answered.table, ""),
    "answered_short": (answered.summary, ""),
    "bundled": (bundled.table, "bundled"),
    "busy": (busy.table, "busy"),
    "claim": (claim.table, "claim"),
    "step": (step.table, "step_cpu"),
    "digits": (digits_difficulty.table, "digits_difficulty"),
    "lab_linear": (lab.linear_table, "lab_linear"),
    "lab_controls": (lab.controls_table, "lab_linear"),
    "lab_gradients": (mechanism.gradients_table, "lab_gradients"),
    "mechanism": (mechanism.table, "mechanism"),
    "half_life": (half_life.table, "half_life"),
    "half_life_verdict": (half_life.verdict, "half_life"),
    "verify": (commands.verify_table, "verify_*"),
    "alarms": (alarms.table, "alarms"),
    "monitor_cost": (monitor_cost.table, "monitor_cost"),
    "cost": (commands.cost_table, "cost"),
    "peaks": (commands.peak_table, "cost_cpu"),
    "race": (commands.race_table, "race"),
    "race_verdict": (commands.race_verdict, "race"),
    "long": (side_by_side.table, "long"),
    "pictures": (pictures.table, "pictures"),
    "one_gpu": (side_by_side.table, "one_gpu"),
    "learns": (learns.table, "learns"),
    "length": (length.table, "length"),
    "loader": (loader.table, "loader"),
    "own_pictures": (own_pictures.table, "own_pictures"),
    "index": (index.table, "index"),
    "intervals": (intervals.table, "intervals"),
    "paper": (paper.table, "paper_*"),
    "corruptions": (corruptions.table, "corruptions"),
    "evaluation": (evaluation.table, "evaluation"),
    "evaluation_verdict": (evaluation.verdict, "evaluation"),
    "detection": (detection.table, "detection"),
    "detection_verdict": (detection.verdict, "detection"),
    "detection_step": (detection_step.table, "detection_step*"),
}
"""The name in the marker: the function that renders the contents of the files, and their name in results/; ""
for one that reads them itself."""

PAGES = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            "bundled",
            "first-hour",
            "recipes",
            "gpus",
            "data",
            "lab",
            "compare",
            "paper",
            "robustness",
            "evaluation",
            "detection",
            "rcmae-answered",
        )
    ),
)


def rendered(name: str) -> str:
    """The text of a table."""
    render, files = TABLES[name]
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "results").glob(f"{files}.json"))]
    text = render(*results) if results or name == "paper" or not files else "This has not been run yet."
    lines, code = [], False
    for line in text.split("\n"):
        code ^= line.startswith("```")
        lines.append(_wrapped(line, code))
    return "\n".join(lines)


def _wrapped(line: str, code: bool) -> str:
    """A line of prose, or a command, in the width of the pages' source; rows of tables cannot be divided."""
    if line.startswith("|"):
        return line
    indent = "  " * (code or line.startswith("- "))
    parts = textwrap.wrap(line, 150, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return (" \\\n" if code else "\n").join(parts)


def filled(text: str) -> str:
    """The text of a page with all its tables rendered again."""

    def section(match: re.Match[str]) -> str:
        return f"{match[1]}{rendered(match[2])}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", section, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
