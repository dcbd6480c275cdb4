"""The paper's tables as experiments that run: `python -m benchmarks.paper`."""

from typing import Any

from benchmarks.commands import race_table, race_verdict, resource_table
from benchmarks.markdown import mean
from benchmarks.markdown import table as markdown_table
from benchmarks.paper.experiments import EXPERIMENTS, FINE_TUNED, LABELS, Experiment
from rcmae.tasks.interval import correction_note


def table(*results: dict[str, Any]) -> str:
    """A section for each table of the paper: its numbers, the commands that reproduce it, and the results of
    our small form."""
    by_name = {result["experiment"]: result for result in results}
    return "\n\n".join(_section(name, EXPERIMENTS[name], by_name.get(name)) for name in EXPERIMENTS)


def _fine_tuned(rows: list[dict[str, Any]]) -> str:
    cells = [[row["arm"], f"{mean(row['accuracy']):.1f}", row.get("verdict", "")] for row in rows]
    note = f"Fine-tuned on {LABELS:g} % of the labels. {correction_note(len(rows) - 1)}"
    return markdown_table(["", FINE_TUNED, f"against {rows[0]['arm']}"], cells, note, left=(0, 2))


def _section(name: str, experiment: Experiment, results: dict[str, Any] | None) -> str:
    columns = list(experiment.rows[0].paper)
    paper = markdown_table(
        ["", *(f"{column} (paper)" for column in columns)],
        [[row.name, *(str(row.paper[c] or "unknown") for c in columns)] for row in experiment.rows],
    )
    shell = "\n".join(["```sh", *(row.command for row in experiment.rows), "```"])
    parts = [f"### {name}", f"{experiment.claim}.", paper, shell]
    command = f"`python -m benchmarks.paper {name} --run`"
    if not experiment.small:
        parts.append(f"Its small form is `{experiment.elsewhere}`.")
    elif results is None:
        parts.append(f"Small form: {command}. It has not been run yet.")
    else:
        parts.append(f"Small form on the bundled set, our numbers ({command}):")
        for title, race in results.get("races", {}).items():
            race |= {"machine": results["machine"]}
            parts += [f"{title}:", race_table(race), race_verdict(race), _fine_tuned(race[FINE_TUNED])]
        if "races" not in results:
            parts.append(resource_table(results))
    return "\n\n".join(parts)
