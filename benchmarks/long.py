"""Does a teacher help whose memory is a small share of a long run? `python -m benchmarks.long`.

docs/rcmae-answered.md has the plan. A tiny network, 20,000 steps: a half-life of 7 steps is
then 0.035 % of the run, as in the paper's. See `benchmarks.side_by_side` for how it is run and resumed.
"""

import sys

from benchmarks.runs import Rates
from benchmarks.side_by_side import MAE, Experiment, main

LONG = Experiment(
    name="long",
    network={
        "size": 32,
        "patch": 8,
        "width": 64,
        "depth": 2,
        "heads": 2,
        "decoder_width": 32,
        "decoder_depth": 1,
        "decoder_heads": 1,
        "batch_size": 32,
        "warmup": 0.05,
    },
    arms={
        MAE: {"gamma": 0.0, "half_life": "173 steps"},
        **{f"RC-MAE {n}": {"half_life": f"{n} steps"} for n in (7, 30, 173)},
        "RC-MAE cosine": {"schedule": "cosine", "momentum": 0.996},
    },
    decays=("cosine", "constant"),
    seeds=range(31, 41),
    tuning_seeds=range(2),
    rates=Rates((3e-3, 12e-3, 48e-3), (1.5e-3, 3e-3, 6e-3, 12e-3, 24e-3, 48e-3, 96e-3), seeds=2),
    steps=20_000,
    tuning_steps=2500,
    side_by_side=5,
)

if __name__ == "__main__":
    sys.exit(main(LONG, __doc__, device="cpu", jobs=2))
