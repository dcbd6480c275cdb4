"""The paper's tables: claims, numbers, the ImageNet commands that reproduce them, and small forms on the
bundled set.

All numbers are the paper's (Lee et al., ICLR 2023), read from its tables and its Fig. 1(c); we have
reproduced none of them. None: we do not know the number. Commands pre-train, evaluate or detect.
"""

import math
from dataclasses import dataclass

IMAGENET = (
    "torchrun --nproc-per-node 8 -m rcmae pretrain {recipe} --data IMAGENET/train --out runs/{out} {flags}"
)
FINE_TUNE = "rcmae evaluate finetune runs/{run} --data IMAGENET --recipe {recipe}"
ROBUSTNESS = "rcmae evaluate robustness runs/{run}/evaluate/finetune-{network} --data IMAGENET {sets}"
SHIFTED = (
    "--no-attacks --imagenet-c IMAGENET-C --imagenet-a IMAGENET-A --imagenet-r IMAGENET-R "
    "--imagenet-sketch IMAGENET-SKETCH"
)
ATTACKED = "--no-corruptions --attacked-images 50000 --eps 0.25 0.5 1 2 4"
COCO = (
    "torchrun --nproc-per-node 8 -m rcmae detect train runs/{run} --data COCO --recipe benchmarking-{size} "
    "--accumulate 2"
)
FINE_TUNED = "top-1 after fine-tuning"


@dataclass(frozen=True)
class Row:
    """A row of a table in the paper: its name, the command for ImageNet, and the paper's numbers."""

    name: str
    command: str
    paper: dict[str, float | None]


@dataclass(frozen=True)
class Race:
    """A small form: arms of `rcmae compare race` and their budget."""

    name: str
    arms: tuple[str, ...]
    budget: str


@dataclass(frozen=True)
class Experiment:
    """A table of the paper."""

    claim: str
    rows: tuple[Row, ...]
    races: tuple[Race, ...] = ()
    cost: bool = False
    "whether the small form is the cost of a step"
    elsewhere: str = ""
    "a benchmark that is the small form"

    @property
    def small(self) -> bool:
        """Whether there is a small form."""
        return self.cost or bool(self.races)


LABELS = 10.0
"Percent of the labels in the fine-tuning of small forms."


def pretrain(method: str, out: str, flags: str = "", model: str = "vitb16") -> str:
    """The command of a model with the paper's settings."""
    if method in ("mae", "rcmae") and model != "vits16":  # as the recipes of 4,096 images say
        flags = f"--accumulate 2 {flags}"
    return IMAGENET.format(recipe=f"{method}-{model}-in1k", out=out, flags=flags).strip()


def _fine_tuning() -> tuple[Row, ...]:
    accuracies = {"mae": (81.8, 83.4, 85.5), "rcmae": (82.0, 83.6, 86.1)}
    rows = []
    for method, by_size in accuracies.items():
        for size, accuracy in zip("sbl", by_size, strict=True):
            model, run = f"vit{size}16", f"{method}-1600" if size == "b" else f"{method}-vit{size}-1600"
            command = f"{pretrain(method, run, model=model)} && "
            command += FINE_TUNE.format(run=run, recipe=f"{model}-in1k")
            rows.append(Row(f"{METHODS[method]}, ViT-{size.upper()}", command, {FINE_TUNED: accuracy}))
    return tuple(rows)


def _classified(command: str, columns: tuple[str, ...]) -> tuple[Row, ...]:
    """Rows of fine-tuned ViT-Bs, whose numbers we do not know."""
    return tuple(
        Row(
            METHODS[method],
            f"{FINE_TUNE.format(run=f'{method}-1600', recipe='vitb16-in1k')} && "
            + ROBUSTNESS.format(run=f"{method}-1600", network=network, sets=command),
            dict.fromkeys(columns),
        )
        for method, network in (("mae", "student"), ("rcmae", "teacher"))
    )


def _changed(setting: str, values: tuple[float, ...]) -> tuple[Row, ...]:
    """Rows of RC-MAE with one setting changed, whose numbers we do not know."""
    return tuple(
        Row(
            f"RC-MAE, {setting} {value:g}",
            pretrain("rcmae", f"rcmae-{setting}-{value:g}", f"--{setting} {value:g}"),
            {FINE_TUNED: None},
        )
        for value in values
    )


def _lengths() -> tuple[Row, ...]:
    accuracies = {"mae": (81.7, 82.2, 82.6, 83.4), "rcmae": (81.9, 82.6, 83.4, 83.6)}
    rows = []
    for method, by_length in accuracies.items():
        for epochs, accuracy in zip((200, 400, 800, 1600), by_length, strict=True):
            # the official code warms up for 40 epochs at any length
            flags = f"--epochs {epochs} --warmup {40 / epochs:g}"
            command = pretrain(method, f"{method}-{epochs}", flags)
            rows.append(Row(f"{METHODS[method]}, {epochs} epochs", command, {FINE_TUNED: accuracy}))
    return tuple(rows)


def _detect(method: str, size: str) -> str:
    """Training on COCO from a run of `fine_tuning`; for its other methods with the pre-training before it."""
    if method in ("mae", "rcmae"):
        return COCO.format(run=f"{method}-{'1600' if size == 'base' else 'vitl-1600'}", size=size)
    run = f"{method}-vitb"
    before = f"{pretrain(method, run)} && "
    return before + COCO.format(run=run, size=size)


MASKS = {
    "MAE": (83.4, 67.3, 50.3, 44.9),
    "RC-MAE, D": (83.6, 68.7, 50.7, 45.2),
    "RC-MAE, S": (83.6, 68.4, 51.0, 45.4),
}
MASK_COLUMNS = (FINE_TUNED, "linear probe", "COCO box AP", "COCO mask AP")
METHODS = {"mae": "MAE", "rcmae": "RC-MAE", "ibot": "iBOT", "msn": "MSN"}
"Methods in the paper's table of resources."

RATIOS, GAMMAS, MOMENTA = (0.6, 0.75, 0.9), (0.25, 0.5, 1.0, 2.0), (0.99, 0.996, 0.999)
"The values of our small forms and commands; we do not know those of the paper."

HALF_LIVES = (1, 3, 10, 30, *(round(math.log(0.5) / math.log(momentum)) for momentum in MOMENTA))
"In steps."

EXPERIMENTS = {
    "fine_tuning": Experiment(
        "RC-MAE is better than MAE after fine-tuning, for ViT-S, B and L (1,600 epochs)",
        _fine_tuning(),
        (Race("one network", ("mae", "mae averaged", "rcmae"), "256000 images"),),
    ),
    "convergence": Experiment(
        "RC-MAE after 800 epochs matches MAE after 1,600 (Fig. 1c, ViT-B)",
        _lengths(),
        tuple(
            Race(f"{images:,} images", ("mae", "mae averaged", "rcmae"), f"{images} images")
            for images in (16000, 32000, 64000, 128000)
        ),
    ),
    "mask_type": Experiment(
        "It matters little whether the teacher sees the same patches as the student (S) or different ones "
        "(D) (ViT-B, 1,600 epochs)",
        tuple(
            Row(name, pretrain(method, out, flags), dict(zip(MASK_COLUMNS, MASKS[name], strict=True)))
            for name, method, out, flags in (
                ("MAE", "mae", "mae-1600", ""),
                ("RC-MAE, D", "rcmae", "rcmae-d", "--teacher-mask different"),
                ("RC-MAE, S", "rcmae", "rcmae-1600", ""),
            )
        ),
        (Race("S and D", ("mae", "rcmae", "rcmae, teacher_mask=different"), "128000 images"),),
    ),
    "mask_ratio": Experiment(
        "A table of mask ratios with accuracy and hours on 8 V100; we do not know its numbers",
        tuple(
            Row(
                f"{METHODS[method]}, {ratio:.0%} masked",
                pretrain(method, f"{method}-{ratio}", f"--mask-ratio {ratio}"),
                {FINE_TUNED: None, "hours": None},
            )
            for method in ("mae", "rcmae")
            for ratio in RATIOS
        ),
        tuple(
            Race(
                f"{ratio:.0%} masked",
                tuple(f"{method}, mask_ratio={ratio}" for method in ("mae", "rcmae")),
                "128000 images",
            )
            for ratio in RATIOS
        ),
    ),
    "gamma": Experiment(
        "The weight of the consistency loss is 1; we do not know whether the paper has a table of it",
        _changed("gamma", GAMMAS),
        (Race("gamma", ("mae", *(f"rcmae, gamma={gamma}" for gamma in GAMMAS)), "128000 images"),),
    ),
    "momentum": Experiment(
        "The teacher's momentum is 0.996; we do not know whether the paper has a table of it. The small form "
        "has the half-lives of these momenta and shorter ones, since its runs are shorter",
        _changed("momentum", MOMENTA),
        (
            Race(
                "half-life",
                ("mae", *(f"rcmae, half_life={steps} steps" for steps in HALF_LIVES)),
                "128000 images",
            ),
        ),
    ),
    "resources": Experiment(
        "RC-MAE needs less memory and time than MSN and iBOT; we do not know the numbers",
        (
            Row(
                ", ".join(METHODS.values()),
                f"rcmae compare cost --methods {' '.join(METHODS)} --measure",
                {"GiB": None, "hours": None},
            ),
        ),
        cost=True,
    ),
    "robustness": Experiment(
        "ViT-B of 1,600 epochs, fine-tuned on ImageNet, tested on ImageNet-C, -A, -R and -Sketch; we "
        "do not know the numbers",
        _classified(SHIFTED, ("ImageNet-C, mCE", "ImageNet-A", "ImageNet-R", "ImageNet-Sketch")),
        elsewhere="python -m benchmarks.evaluation",
    ),
    "adversarial": Experiment(
        "The same networks under attacks, which the paper's first version names; we know neither the attacks "
        "nor the numbers",
        _classified(ATTACKED, ("FGSM", "PGD")),
        elsewhere="python -m benchmarks.evaluation",
    ),
    "detection": Experiment(
        "RC-MAE is better than MAE, MSN and iBOT on COCO (1,600 epochs of pre-training, 100 of COCO); of the "
        "settings we know only the protocol",
        tuple(
            Row(
                f"{METHODS[method]}, ViT-{size[0].upper()}",
                _detect(method, size),
                dict(zip(MASK_COLUMNS[2:], numbers, strict=True)),
            )
            for method, size, numbers in (
                ("mae", "base", (50.3, 44.9)),
                ("ibot", "base", (None, None)),
                ("msn", "base", (None, None)),
                ("rcmae", "base", (51.0, 45.4)),
                ("mae", "large", (53.3, 47.2)),
                ("rcmae", "large", (53.8, 47.7)),
            )
        ),
        elsewhere="python -m benchmarks.detection",
    ),
}
