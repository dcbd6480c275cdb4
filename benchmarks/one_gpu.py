"""Does the teacher help in longer runs of a larger network? `python -m benchmarks.one_gpu`, on a GPU.

docs/rcmae-answered.md has the plan; see `benchmarks.side_by_side` for how it is run and resumed. Give
--compile on a GPU; `--share 0.01 --device cpu` tries everything at a hundredth of its size.
"""

import sys

from benchmarks.runs import Rates
from benchmarks.side_by_side import MAE, Experiment, main

ONE_GPU = Experiment(
    name="one_gpu",
    network={
        "size": 64,
        "patch": 8,
        "width": 192,
        "depth": 6,
        "heads": 3,
        "decoder_width": 64,
        "decoder_depth": 1,
        "decoder_heads": 1,
        "batch_size": 256,
        "warmup": 0.05,
    },
    arms={
        MAE: {"gamma": 0.0, "half_life": "173 steps"},
        **{f"RC-MAE {n}": {"half_life": f"{n} steps"} for n in (7, 20, 173)},
    },
    seeds=range(11, 19),
    tuning_seeds=range(4),
    rates=Rates((1.5e-3, 3e-3, 6e-3), (7.5e-4, 1.5e-3, 3e-3, 6e-3, 12e-3), seeds=4),
    steps=20_000,
    tuning_steps=1000,
    side_by_side=8,
)

if __name__ == "__main__":
    sys.exit(main(ONE_GPU, __doc__, device="cuda", jobs=1))
