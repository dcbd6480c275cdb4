"""What tests/test_distributed.py runs on two ranks."""

import json
import os
import signal
from pathlib import Path

import torch
from safetensors.torch import save_file

import rcmae.pretraining as pretraining
import rcmae.tasks.detection.train as dt
from rcmae import cli
from rcmae.data.sources import open_source
from rcmae.engine.distributed import World
from rcmae.errors import Preempted, ProcessError
from rcmae.methods.rcmae import RCMAE
from rcmae.tasks.detection import commands
from rcmae.tasks.detection.coco import CocoSet, open_coco
from rcmae.tasks.detection.model import detector
from rcmae.tasks.detection.predict import predict
from tests import test_detection_train, test_finetune
from tests.test_pretraining import run

METHODS: dict[str, dict] = {
    name: {"method": name, "steps": 4, "base_lr": 0.003} for name in ("dino", "ibot", "msn", "mocov3")
}
METHODS["ibot"] |= {"sinkhorn": True, "head_norm": True, "patch_head": "masked"}


def random_init(data: CocoSet, world: World = World()) -> list[dict]:
    """Detections of a randomly initialized detector."""
    model = detector(test_detection_train.backbone(), 10, test_detection_train.TINY)
    cpu = test_detection_train.CPU
    return predict(model, data, size=64, channels=3, device=cpu, batch=2, world=world).results


def main(out: Path, data: Path, case: str) -> int:
    """Run one rank; returns its exit code."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    if case == "nan" and rank == 1:  # the loss is not finite on one rank only
        forward = RCMAE.forward

        def poisoned(method, batch, t):
            losses = forward(method, batch, t)
            return losses | {"loss": losses["loss"] * float("nan")} if t.step == 2 else losses

        RCMAE.forward = poisoned
    if case == "lost" and rank == 1:  # one rank exits as if it was killed
        pretraining.Pretraining.update = lambda *args: os._exit(9)
    if case == "stop" and rank == 1:  # only one rank receives the signal
        update = pretraining.Pretraining.update

        def stopping(self, t):
            applied = update(self, t)
            if t.step == 3:
                signal.raise_signal(signal.SIGTERM)
            return applied

        pretraining.Pretraining.update = stopping
    if case == "finetune":
        sets = tuple(open_source(str(data / name)) for name in ("train", "test"))
        test_finetune.run(out, sets, test_finetune.FULL)
        return 0
    if case == "detect":
        sets = open_coco("bundled:scenes", train_images=8, test_images=5, size=64)
        sets[0].notes.append("printed once")
        commands.open_coco = lambda *names, **args: sets
        finish = dt.DetectionTraining.finish

        def save_and_finish(self):
            save_file(self.model.state_dict(), data / f"rank{rank}.safetensors")
            (data / f"detections{rank}.json").write_text(json.dumps(random_init(sets[1], self.world)))
            return finish(self)

        dt.DetectionTraining.finish = save_and_finish
        args = ["--recipe", f"{data}/tiny.toml", "--device", "cpu", "--precision", "fp32", "--workers", "0"]
        return cli.main(["detect", "train", f"{data}/backbone", "--out", str(out), *args])
    try:
        run(out, data, runtime={"cache": "ram"} if case == "cache" else {}, **METHODS.get(case, {"steps": 6}))
    except Preempted as e:
        assert case == "stop", e
        assert "saved at step 4" in str(e)
    except ProcessError as e:
        assert case == "lost", e
        (out / "error.txt").write_text(str(e))
    return 0
