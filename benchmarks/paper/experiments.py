"""The paper's tables: claims, numbers, the ImageNet commands that reproduce them, and small forms on the
bundled set.

All numbers are the paper's (Lee et al., ICLR 2023), read from its tables and its Fig. 1(c); we have
reproduced none of them. None: we do not know the number. Commands pre-train, evaluate or detect.
"""

from dataclasses import dataclass

IMAGENET = (
    "torchrun --nproc-per-node 8 -m rcmae pretrain {recipe} --data IMAGENET/train --out runs/{out} "
    "--accumulate 2 {flags}"
)
ROBUSTNESS = (
    "rcmae evaluate finetune runs/{run} --data IMAGENET --recipe vitb16-in1k && "
    "rcmae evaluate robustness runs/{run}/evaluate/finetune-{network} --data IMAGENET --imagenet-c "
    "IMAGENET-C --imagenet-a IMAGENET-A "
    "--imagenet-r IMAGENET-R --imagenet-sketch IMAGENET-SKETCH"
)
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


def pretrain(method: str, out: str, flags: str = "") -> str:
    """The command of a ViT-B/16 with the paper's settings."""
    return IMAGENET.format(recipe=f"{method}-vitb16-in1k", out=out, flags=flags).strip()


def _lengths() -> tuple[Row, ...]:
    accuracies = {"mae": (81.7, 82.2, 82.6, 83.4), "rcmae": (81.9, 82.6, 83.4, 83.6)}
    rows = []
    for method, by_length in accuracies.items():
        for epochs, accuracy in zip((200, 400, 800, 1600), by_length, strict=True):
            # the official code warms up for 40 epochs at any length
            flags = f"--epochs {epochs} --warmup {40 / epochs:g}"
            command = pretrain(method, f"{method}-{epochs}", flags)
            rows.append(Row(f"{method}, {epochs} epochs", command, {FINE_TUNED: accuracy}))
    return tuple(rows)


def _detect(method: str, size: str) -> str:
    """Training on COCO from a run of `mask_type`; for ViT-L with the pre-training before it."""
    run = f"{method}-1600" if size == "base" else f"{method}-large-1600"
    before = IMAGENET.format(recipe=f"{method}-vitl16-in1k", out=run, flags="").strip() + " && "
    return before * (size == "large") + COCO.format(run=run, size=size)


MASKS = {
    "MAE": (83.4, 67.3, 50.3, 44.9),
    "RC-MAE, D": (83.6, 68.7, 50.7, 45.2),
    "RC-MAE, S": (83.6, 68.4, 51.0, 45.4),
}
MASK_COLUMNS = (FINE_TUNED, "linear probe", "COCO box AP", "COCO mask AP")
COMPARED = ("mae", "rcmae", "ibot", "msn")
"Methods in the paper's table of resources."

RATIOS = (0.6, 0.75, 0.9)
"The ratios of our small form and commands; we do not know those of the paper."

EXPERIMENTS = {
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
                f"RC-MAE, {ratio:.0%} masked",
                pretrain("rcmae", f"rcmae-{ratio}", f"--mask-ratio {ratio}"),
                {FINE_TUNED: None, "hours": None},
            )
            for ratio in RATIOS
        ),
        (
            Race(
                "mask ratio",
                tuple(f"rcmae, mask_ratio={ratio}" for ratio in reversed(RATIOS)),
                "128000 images",
            ),
        ),
    ),
    "resources": Experiment(
        "RC-MAE needs less memory and time than MSN and iBOT; we do not know the numbers",
        (
            Row(
                "mae, rcmae, ibot, msn",
                f"rcmae compare cost --methods {' '.join(COMPARED)} --measure",
                {"GiB": None, "hours": None},
            ),
        ),
        cost=True,
    ),
    "robustness": Experiment(
        "ViT-B of 1,600 epochs, fine-tuned on ImageNet, tested on ImageNet-C, -A, -R and -Sketch; we "
        "do not know the numbers",
        tuple(
            Row(
                name,
                ROBUSTNESS.format(run=run, network=network),
                dict.fromkeys(("ImageNet-C, mCE", "ImageNet-A", "ImageNet-R", "ImageNet-Sketch")),
            )
            for name, run, network in (("MAE", "mae-1600", "student"), ("RC-MAE", "rcmae-1600", "teacher"))
        ),
        elsewhere="python -m benchmarks.evaluation",
    ),
    "detection": Experiment(
        "RC-MAE is better than MAE on COCO (1,600 epochs of pre-training, 100 of COCO); of the settings "
        "we know only the protocol",
        tuple(
            Row(
                f"{name}, ViT-{size[0].upper()}",
                _detect(method, size),
                dict(zip(MASK_COLUMNS[2:], numbers, strict=True)),
            )
            for name, method, size, numbers in (
                ("MAE", "mae", "base", (50.3, 44.9)),
                ("RC-MAE", "rcmae", "base", (51.0, 45.4)),
                ("MAE", "mae", "large", (53.3, 47.2)),
                ("RC-MAE", "rcmae", "large", (53.8, 47.7)),
            )
        ),
        elsewhere="python -m benchmarks.detection",
    ),
}
