"""Run by tests/test_distributed.py under torchrun: two processes on the CPU train as one, and stop as one."""

import os
import sys
from pathlib import Path

import torch

import rcmae.loop as loop
from rcmae.data.sources import open_source
from rcmae.errors import Preempted, ProcessError
from rcmae.methods.rcmae import RCMAE
from tests import test_finetune
from tests.test_loop import run

METHODS: dict[str, dict] = {name: {"method": name, "steps": 4, "base_lr": 0.003} for name in ("dino", "ibot", "msn", "mocov3")}
METHODS["ibot"] |= {"sinkhorn": True}

if __name__ == "__main__":
    torch.set_num_threads(1)
    out, data, case = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    rank = int(os.environ["RANK"])
    if case == "nan" and rank == 1:  # one rank alone sees a loss that is not finite
        forward = RCMAE.forward

        def poisoned(method, batch, t):
            losses = forward(method, batch, t)
            return losses | {"loss": losses["loss"] * float("nan")} if t.step == 2 else losses

        RCMAE.forward = poisoned
    if case == "lost" and rank == 1:  # one rank is gone, as by SIGKILL
        loop.Run.update = lambda *args: os._exit(9)
    if case == "stop" and rank == 1:  # one rank alone gets the signal
        update = loop.Run.update

        def stopping(self, batches, t, window):
            if t.step == 3:
                self.stop.asked = "SIGTERM"
            return update(self, batches, t, window)

        loop.Run.update = stopping
    if case == "finetune":
        sets = tuple(open_source(str(Path(data) / name)) for name in ("train", "test"))
        test_finetune.run(out, sets, test_finetune.FULL)
        sys.exit()
    try:
        run(out, data, **METHODS.get(case, {"steps": 6}))
    except Preempted as e:
        assert case == "stop", e
        assert "saved at step 4" in str(e)
    except ProcessError as e:
        assert case == "lost", e
        (out / "said.txt").write_text(str(e))
