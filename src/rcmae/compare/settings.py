"""Options of a race. This module does not import torch, so that --help is quick."""

from dataclasses import dataclass

from ..config import Rules, Section


@dataclass(frozen=True, kw_only=True)
class RaceOptions(Section):
    """How a race is run."""

    seeds: int = 3
    "Runs per arm; arms are compared within a seed."
    probes: int = 5
    "Number of probes during a run."
    probe_train: int = 2000
    "Labeled images to fit the probes on."
    probe_test: int = 4000
    "Labeled images to test the probes on."
    jobs: int | None = None
    "Simultaneous runs, which share the cores [default: one per core on a CPU, else 1]."
    device: str = "auto"
    "auto, cpu, cuda, cuda:1 or mps."

    def rules(self) -> Rules:
        counts = self.each("must be 1 or more", "probes", "probe_train", "probe_test", "jobs")
        return [*self.each("must be 2 or more", "seeds"), *counts]
