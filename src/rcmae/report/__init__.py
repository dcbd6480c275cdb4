"""One self-contained page a run."""

from .build import write_report

__all__ = ["write_report"]
