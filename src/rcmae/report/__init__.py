"""One self-contained page a run."""

from pathlib import Path


def write_report(run: Path) -> Path:
    page = run / "report.html"
    page.write_text("<title>to come</title>")
    return page
