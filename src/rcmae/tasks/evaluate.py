"""`rcmae evaluate`: what a backbone is worth on a labelled set, in the numbers that papers report.

A task fits something on the training part, on frozen features or end to end, and scores it on the other part. It leaves a JSON file (the
metric, by class, the settings, hashes of backbone and data) and, beside it, which test images were right, for paired comparisons.
"""

import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save
from torch import Tensor, nn

from ..config import Workplace
from ..config import replaced as replaced_settings
from ..data.dataset import Bad, Images
from ..data.labelled import Labelled, open_labelled
from ..data.loader import batches_of, processes
from ..data.sampler import BatchSampler
from ..data.sources import Subset, recipe_for
from ..data.views import Image, center, flip, random_resized_crop
from ..engine import distributed
from ..engine.checkpoint import replace_file
from ..engine.console import Screen
from ..engine.distributed import World
from ..engine.run import describe_machine, plain_failures, read_json, write_json
from ..errors import ConfigError
from ..interop.load import load, load_classifier, tested_on
from ..interop.official import read_pth
from ..models.backbone import Backbone, Features, Pixels
from ..models.classifier import Classifier
from . import attentive, linear
from .features import Seen, extract, identity
from .finetune import check_finetune, finetune, load_finetune
from .knn import Knn, check_k
from .robustness.metrics import ece
from .robustness.sets import Loading
from .robustness.study import check as check_study
from .robustness.study import settings as task_settings
from .robustness.study import study
from .score import Scored, score
from .settings import KNN, KS, Attentive, Evaluation, Linear, Pool, Robustness, Tuning, check_evaluation, check_task
from .splits import PERCENTS, read_split, write_splits

TOKENS_IN_MEMORY = 16 * 2**30
"Bytes of tokens that are kept; above it an attentive probe computes them anew in every pass, as its papers do."

ALONE = "backbone"
"What a network is called that is neither a student nor a teacher."


class Found(NamedTuple):
    """What a task found: metrics, which test images were right, the model (pixels in 0 to 1 to logits), what it was told or chose."""

    metrics: dict[str, float]
    right: Bool[np.ndarray, " m"]
    model: nn.Module
    settings: dict[str, Any]
    details: dict[str, Any] | None = None
    more: dict[str, Bool[np.ndarray, "..."]] | None = None
    seconds: float | None = None
    "where the work was done before, or in parts"


class Probed(nn.Module):
    """A frozen backbone with a layer on what it makes of pixels in 0 to 1: logits "b c"."""

    def __init__(self, backbone: nn.Module, reads: Literal["mean", "cls", "tokens"], layer: nn.Module):
        super().__init__()
        self.backbone, self.reads, self.layer = backbone, reads, layer

    def forward(self, images: Float[Tensor, "b ch h w"]) -> Float[Tensor, "b c"]:
        return self.layer(getattr(self.backbone(images), self.reads))


@dataclass
class Subject:
    """A backbone before a labelled set: what tasks ask of both."""

    name: str
    which: str
    backbone: Backbone | Pixels
    set: Labelled
    how: Evaluation
    device: torch.device
    world: World
    screen: Screen
    precision: str
    classifier: tuple[Classifier, list[str]] | None = None
    "where the backbone came with a head: the whole, and its classes"
    seen: dict[tuple[str, bool], Seen] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        return self.how.cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rcmae"

    def part(self, part: Literal["train", "test"]) -> Subset:
        """The test part, or of the training part the images whose labels are used."""
        if part == "test":
            return self.set.test
        return self.set.train if self.how.labels == 100 else Subset(self.set.train, self.split())

    def split(self) -> Int[np.ndarray, " k"]:
        """The images whose labels are used, from a file that all backbones share."""
        train, folder = self.set.train, self.cache / "splits" / f"{self.set.train.fingerprint()[:16]}-{self.how.seed}"
        file = folder / f"labels-{self.how.labels:g}.json"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_splits(folder, train.labels, self.how.seed, sorted({*PERCENTS, self.how.labels}))
        return read_split(file, train.labels)

    def features(self, part: Literal["train", "test"], tokens: bool = False) -> Seen:
        """Features of a part, computed once and cached."""
        if (part, tokens) not in self.seen:
            images = self.part(part)
            with self.screen.progress(f"features of {images.name}", len(images)) as tick:
                self.seen[part, tokens] = extract(
                    self.backbone, images, cache=self.cache / "features", tokens=tokens, device=self.device, precision=self.precision,
                    world=self.world, workers=self.how.workers, tick=tick, note=self.note,
                )  # fmt: skip
        return self.seen[part, tokens]

    def note(self, bad: list[Bad]) -> None:
        """Name images that cannot be read."""
        for _, where, reason in bad:
            self.screen.say(f"note: {where} cannot be read ({reason})")

    def fitted_on(self, tokens: bool = False) -> tuple[Seen, Int[np.ndarray, " n"]]:
        """Features of the readable training images, and their labels."""
        seen = self.features("train", tokens)
        if not seen.readable.all():
            seen = Seen(*(x[seen.readable] if x is not None else None for x in seen))
        return seen, seen.labels

    def hits(self, said: Int[np.ndarray, " m"], seen: Seen) -> Bool[np.ndarray, " m"]:
        """Which test images are right; one that cannot be read is wrong."""
        return (said == seen.labels) & seen.readable

    def score(self, model: nn.Module) -> Scored:
        """What a model of pixels makes of the test images."""
        test = self.set.test
        with self.screen.progress(f"scoring on {test.name}", len(test)) as tick:
            return score(
                model, test, shape=tuple(self.backbone.shape), channels=self.backbone.channels, device=self.device,
                precision=self.precision, workers=self.how.workers, note=self.note, tick=tick,
            )  # fmt: skip

    def crops(self, steps: int, batch: int, augment: bool) -> Iterator[tuple[Features, Int[Tensor, " b"]]]:
        """Batches of `steps`: what the backbone makes of new crops and flips in every pass (or of the same views), and labels."""
        part = self.part("train")
        sampler = BatchSampler(len(part), batch, start=0, stop=steps, seed=self.how.seed)
        view = functools.partial(_crop, shape=tuple(self.backbone.shape), augment=augment)
        crops = Images(part, view, self.how.seed, self.backbone.channels, labelled=True)
        backbone = self.backbone.to(self.device).eval()
        with self.screen.progress("fit", steps) as tick:
            for step, images in enumerate(batches_of(crops, sampler, part, self.how.workers, self.device, self.note)):
                with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    seen = backbone(images["image"].float() / 255)
                yield seen, images["label"]
                tick(step + 1)


def _crop(image: Image, draws: np.random.Generator, shape: tuple[int, int], augment: bool) -> dict[str, Tensor]:
    """A random crop (0.2 to 1 of the area) and flip, as MAE's linear probe is trained on, or the view of evaluation."""
    view = flip(random_resized_crop(image, shape, (0.2, 1.0), draws), draws) if augment else center(image, shape)
    return {"image": view.contiguous()}


# --- probes of frozen features ----------------------------------------------------------------------------------------


def knn(subject: Subject, task: KNN) -> Found:
    """k-NN at every k; raises ConfigError when one that was chosen is larger than the training set."""
    if task.k != KS:
        check_k(task.k, len(subject.part("train")))
    train, labels = subject.fitted_on()
    if task.k == KS and len(labels) < max(KS):
        task = replace(task, k=tuple(k for k in KS if k <= len(labels)) or (len(labels),))
        subject.screen.say(f"note: {len(labels)} training images: k of {', '.join(map(str, task.k))} only")
    check_k(task.k, len(labels))
    test = subject.features("test")
    near = Knn(train.pooled(task.pool).to(subject.device), torch.from_numpy(labels).to(subject.device), len(subject.set.classes),
               max(task.k), task.temperature)  # fmt: skip
    said: dict[int, list[Tensor]] = {k: [] for k in task.k}
    with torch.no_grad(), subject.screen.progress("k-NN", len(test.labels)) as tick:
        for i, part in enumerate(test.pooled(task.pool).split(256)):
            for k, votes in near.votes(part.to(subject.device), task.k).items():
                said[k].append(votes.argmax(1).cpu())
            tick(min((i + 1) * 256, len(test.labels)))
    hits = {k: subject.hits(torch.cat(parts).numpy(), test) for k, parts in said.items()}
    kept = near.k = 20 if 20 in task.k else task.k[0]
    metrics = {f"top1 k={k}": 100 * float(h.mean()) for k, h in hits.items()}
    return Found({"top1": metrics[f"top1 k={kept}"]} | metrics, hits[kept], Probed(subject.backbone, task.pool, near), asdict(task))


def fit_linear(subject: Subject, task: Linear) -> Found:
    """A linear probe by either protocol."""
    pool: Pool = task.pool or ("mean" if task.protocol == "rates" else "cls")
    classes, chose = len(subject.set.classes), {}
    size = len(subject.part("train"))
    if task.protocol == "rates":
        train, labels = subject.fitted_on()
        batch = min(task.batch or 1024, len(labels))
        steps = task.fit_steps or min(max(500, 100 * (len(labels) // batch)), 12_500)
        found = linear.fit_rates(train.pooled(pool).to(subject.device), labels, classes, steps=steps, batch=batch, seed=subject.how.seed)
        layer, chose = found.layer, {"rate": found.rate, "held_out": {f"{k:g}": v for k, v in found.held_out.items()}}
    else:
        batch = min(task.batch or 16384, size)
        steps = task.fit_epochs * (size // batch)
        if task.augment:
            batches = ((getattr(seen, pool), answers) for seen, answers in subject.crops(steps, batch, augment=True))
        else:
            train, labels = subject.fitted_on()
            batches = attentive.in_memory(train.pooled(pool).to(subject.device), labels, steps, batch, subject.how.seed)
        width = subject.features("test").pooled(pool).shape[1]
        layer = linear.fit_mae(
            batches, width, classes, steps=steps, warmup=10 / max(task.fit_epochs, 20), batch=batch, base_lr=task.fit_lr,
            seed=subject.how.seed, device=subject.device,
        )  # fmt: skip
    test = subject.features("test")
    hits = subject.hits(linear.said(layer, test.pooled(pool).to(subject.device)), test)
    settings = asdict(task) | {"pool": pool, "batch": batch, "fit_steps": steps} | chose
    return Found({"top1": 100 * float(hits.mean())}, hits, Probed(subject.backbone, pool, layer), settings)


@torch.no_grad()
def token_bytes(subject: Subject) -> int:
    """What all tokens of both parts take in half precision."""
    grey = torch.full((1, subject.backbone.channels, *subject.backbone.shape), 0.5, device=subject.device)
    return 2 * subject.backbone.to(subject.device).eval()(grey).tokens.numel() * (len(subject.part("train")) + len(subject.set.test))


def fit_attentive(subject: Subject, task: Attentive) -> Found:
    """An attentive probe; tokens that do not fit into memory are computed anew in every pass."""
    part, device = subject.part("train"), subject.device
    batch = min(task.batch, len(part))
    steps = task.fit_steps or min(max(500, 40 * (len(part) // batch)), 50_000)
    size = token_bytes(subject)
    if size <= TOKENS_IN_MEMORY:
        train, labels = subject.fitted_on(tokens=True)
        found = attentive.fit_rates(
            task.kind, train.tokens, labels, len(subject.set.classes), steps=steps, batch=batch, heads=task.queries,
            seed=subject.how.seed, device=device,
        )  # fmt: skip
        test = subject.features("test", tokens=True)
        hits = subject.hits(linear.said(found.probe, test.tokens.to(device)), test)
        probe, chose = found.probe, {"rate": found.rate, "held_out": {f"{k:g}": v for k, v in found.held_out.items()}}
    else:
        subject.screen.say(f"note: {size / 2**30:.0f} GiB of tokens are not kept: features are computed anew in every pass")
        rate = attentive.RATES[len(attentive.RATES) // 2]
        examples = next(subject.crops(1, min(512, len(part)), augment=False))[0].tokens
        with torch.random.fork_rng():
            torch.manual_seed(subject.how.seed)
            heads = attentive.heads_for(examples.shape[2], task.queries)
            probe = attentive.PROBES[task.kind](examples, heads, len(subject.set.classes)).to(device)
        batches = ((seen.tokens, answers) for seen, answers in subject.crops(steps, batch, augment=True))
        probe, chose = attentive.fit(probe, batches, steps, rate), {"rate": rate}
        hits = subject.score(Probed(subject.backbone, "tokens", probe)).right
    return Found(
        {"top1": 100 * float(hits.mean())},
        hits,
        Probed(subject.backbone, "tokens", probe),
        asdict(task) | {"batch": batch, "fit_steps": steps} | chose,
    )


def fine_tune(subject: Subject, task: Tuning) -> Found:
    """All weights move; the run lies beside the results, and the same command goes on with it. The last step is the result."""
    how, world = subject.how, subject.world
    if isinstance(subject.backbone, Pixels):
        raise ConfigError("pixels have no weights to fine-tune; give a backbone, or scratch:BACKBONE for new weights")
    name = task.recipe or recipe_for(how.data)
    recipe = load_finetune(name)
    if any(text.partition("=")[0].strip() in ("steps", "epochs") for text in task.settings):
        recipe = replace(recipe, steps=None, epochs=None)
    recipe = replaced_settings(recipe, task.settings, name)
    if recipe.seed:
        raise ConfigError(f"{name} and its settings say seed {recipe.seed}; leave it out there, --seed gives it")
    recipe = check_finetune(replace(recipe, seed=how.seed))
    out = place(subject.name, how) / stem("finetune", subject.which, how)
    machine = Workplace(
        out=out, device=how.device, precision=how.precision, workers=how.workers, accumulate=task.accumulate, compile=task.compile,
        checkpointing=task.checkpointing, bad_share=task.bad_share,
    )  # fmt: skip
    about = {"backbone": subject.name, "network": subject.which, "test": subject.set.test.fingerprint()[:16]}
    tuned = finetune(subject.backbone, subject.part("train"), subject.set.test, subject.set.classes, recipe, machine, about)
    best = max(line["accuracy"] for line in tuned.history)
    metrics = {"top1": 100 * float(tuned.right.mean()), "ECE": ece(tuned.confidence, tuned.right)}
    if world.first and best > metrics["top1"]:
        metrics |= {"best epoch, chosen on the test images": best}
    settings = asdict(task) | asdict(recipe) | {"recipe": name, "run": str(out)}
    return Found(metrics, tuned.right, tuned.model, settings, seconds=tuned.seconds)


def classes_for(subject: Subject, task: Robustness) -> list[str]:
    """The classes of the logits that robustness is asked of. What cannot be asked is refused here, before any work."""
    if subject.backbone.channels != 3:
        raise ConfigError(f"corruptions and published sets are of 3 channels; {subject.name} takes {subject.backbone.channels}")
    classes = subject.set.classes
    if subject.classifier is not None:
        model, names = subject.classifier
        if not names and model.vit.num_classes != len(classes):
            raise ConfigError(f"{subject.name} has {model.vit.num_classes} classes without names, and the data {len(classes)}")
        classes = names or classes
    check_study(task, classes, tuple(subject.backbone.shape))
    return classes


def robustness(subject: Subject, task: Robustness) -> Found:
    """A classifier as it is, or a probe that is fitted first, on shifted, corrupted and attacked images."""
    fitted: dict[str, Any] = {}
    model: nn.Module
    classes = classes_for(subject, task)
    if subject.classifier is not None:
        model = subject.classifier[0]
    else:
        if task.probe == "knn":
            found = knn(subject, KNN(k=(min(20, len(subject.fitted_on()[1])),)))
        else:
            found = fit_linear(subject, Linear()) if task.probe == "linear" else fit_attentive(subject, Attentive())
        model, fitted = found.model, {"probe_settings": found.settings | {"precision": subject.precision}}
        subject.screen.say(f"fitted: {task.probe} probe, on {len(subject.part('train')):,} images: {found.metrics['top1']:.1f} % right")
    workers = processes(subject.set.test, subject.how.workers)
    loading = Loading(tuple(subject.backbone.shape), subject.device, workers=workers)
    subject.precision = "fp32"  # of what is recorded: images are judged, and attacked, without autocast
    of = study(model, classes, subject.set.test, task, loading, subject.how.seed, subject.screen.say)
    return Found(
        of.metrics, of.right["clean"], model, task_settings(task) | fitted, of.details, {k: v for k, v in of.right.items() if k != "clean"}
    )


RUNS: dict[type, tuple[str, Callable[[Subject, Any], Found]]] = {
    KNN: ("knn", knn), Linear: ("linear", fit_linear), Attentive: ("attentive", fit_attentive), Tuning: ("finetune", fine_tune),
    Robustness: ("robustness", robustness),
}  # fmt: skip
Task = KNN | Linear | Attentive | Tuning | Robustness


# --- carrying a task out ----------------------------------------------------------------------------------------------


def backbones(name: str, how: Evaluation) -> list[tuple[str, Backbone | Pixels]]:
    """The networks that are asked for, by what they are called. Raises CheckpointError or ConfigError."""
    return [
        (which, Pixels() if name == "pixels" else load(name, "teacher" if which == ALONE else which, how.heads, how.seed))
        for which in networks(name, how.which)
    ]


def subjects(name: str, how: Evaluation, world: World, screen: Screen, headed: bool = False) -> Iterator[Subject]:
    """The backbone, or both networks of a run, before its data; with `headed`, a classifier as it is. Raises before any work is done."""
    device = distributed.pick_device(how.device)
    precision = distributed.pick_precision(how.precision, device)
    whole = load_classifier(name, how.heads) if headed else None
    found = [("classifier", Backbone(whole[0].vit, *_statistics(whole[0])))] if whole else backbones(name, how)
    opened: Labelled | None = None
    for which, backbone in found:
        if opened is None:
            tested = tested_on(name) if whole else None
            opened = open_labelled(how.data, how.val, channels=backbone.channels, size=backbone.shape[1], tested=tested)
            for note in opened.notes:
                screen.say(f"note: {note}")
        yield Subject(name, which, backbone, opened, how, device, world, screen, precision, whole)


def _statistics(model: Classifier) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(x.flatten().tolist()) for x in (model.mean, model.std))


def networks(name: str, which: str) -> list[str]:
    """The networks that are asked for; `ALONE` for what has no teacher and student."""
    if name == "pixels" or name.startswith(("timm:", "scratch:")):
        return [ALONE]
    path = Path(name)
    if (path / "export").is_dir():
        there = [n for n in ("student", "teacher") if (path / "export" / n).is_dir()]
        if there == ["student"] and which != "student":
            load(name, "teacher")  # says so if a teacher was lost
            return ["student"]
    elif path.suffix not in (".pth", ".pt"):
        return [ALONE]
    elif read_pth(path).teacher is None:
        return ["student"]
    return ["student", "teacher"] if which == "both" else [which]


def evaluate(name: str, task: Task, how: Evaluation = Evaluation()) -> list[dict[str, Any]]:
    """Carry a task out on a backbone, write its files, and return what they say: one record a network.

    Works under `torchrun`: ranks share the work of the backbone, the first one fits and writes. Raises the errors of `rcmae.errors`.
    """
    check_task(task)
    check_evaluation(how)
    run = RUNS[type(task)][1]
    device, records, tunes = distributed.pick_device(how.device), [], isinstance(task, Tuning)
    advice = "try a smaller --batch or --device cpu" if hasattr(task, "batch") else "try --device cpu"
    with distributed.joined(device) as world, plain_failures(device, world, advice), Screen(world.first) as screen:
        found = subjects(name, how, world, screen, isinstance(task, Robustness))
        if world.size > 1 and not tunes:  # all make the features of all, so that none has to wait for the fits of the first
            found = list(found)
            for subject in found:
                if isinstance(task, Robustness):
                    classes_for(subject, task)
                tokens = isinstance(task, Attentive) or getattr(task, "probe", "") == "attentive"
                if subject.classifier is None and not (tokens and token_bytes(subject) > TOKENS_IN_MEMORY):
                    for part in ("train", "test"):
                        subject.features(part, tokens)
        for subject in found if world.first or tunes else ():
            began = time.monotonic()
            result = run(subject, task)
            if world.first:
                records.append(record(task, subject, result, time.monotonic() - began))
    return records


def place(name: str, how: Evaluation) -> Path:
    """The folder that results of a backbone go to."""
    if how.out:
        return how.out
    path = Path(name)
    if (path / "recipe.toml").exists():
        return path / "evaluate"
    return Path("runs") / "evaluate" / (re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "backbone")


def stem(kind: str, which: str, how: Evaluation) -> str:
    """What a result's files are called: the task, the network, and what is unusual: the share of the labels, the seed."""
    share = "" if how.labels == 100 else f"-{how.labels:g}-percent"
    return f"{kind}-{which}{share}{f'-seed-{how.seed}' if how.seed else ''}"


def varied(task: Task) -> str:
    """What a task's choices add to the name of its files: "-mae", "-cls", "-latent". Fine-tuning has one place whatever its recipe."""
    if isinstance(task, Tuning):
        return ""
    chosen = [getattr(task, f.name) for f in fields(task) if isinstance(getattr(task, f.name), str)]
    usual = [getattr(type(task)(), f.name) for f in fields(task) if isinstance(getattr(task, f.name), str)]
    return "".join(f"-{value}" for value, default in zip(chosen, usual, strict=True) if value != default)


def record(task: Task, subject: Subject, found: Found, seconds: float) -> dict[str, Any]:
    """Write a result's JSON and hits, beside those of another question that go by the same name; returns the JSON's content."""
    kind, how, test = RUNS[type(task)][0], subject.how, subject.set.test
    hashes = {"backbone": identity(subject.backbone), "train": subject.part("train").fingerprint()[:16], "test": test.fingerprint()[:16]}
    asked = hashlib.sha256(json.dumps([hashes, asdict(task)], default=str).encode()).hexdigest()[:16]
    classes = subject.set.classes
    by_class = {classes[i]: 100 * float(found.right[test.labels == i].mean()) for i in np.unique(test.labels)}
    content = {
        "task": kind, "backbone": subject.name, "network": subject.which, "metrics": found.metrics, "labels_percent": how.labels,
        "train_images": len(subject.part("train")), "test_images": len(test), "classes": len(classes), "settings": found.settings,
        "seed": how.seed, "data": how.data, "val": how.val, "notes": list(subject.set.notes),
        "hashes": hashes | {"asked": asked},
        "seconds": round(found.seconds or seconds, 1), "machine": describe_machine(subject.device, subject.precision),
        "per_class": by_class,
    }  # fmt: skip
    content |= {"details": found.details} if found.details else {}
    folder = place(subject.name, how)
    folder.mkdir(parents=True, exist_ok=True)
    name = stem(kind, subject.which, how) + varied(task)
    there = folder / f"{name}.json"
    if there.exists() and not isinstance(task, Tuning) and read_json(there).get("hashes", {}).get("asked") != asked:
        name += f"-{asked[:6]}"  # other settings, images or weights: both are kept (fine-tuning refuses them in the same place)
    hits = {"right": found.right} | (found.more or {})
    replace_file(folder / f"{name}.safetensors", save({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in hits.items()}))
    write_json(folder / f"{name}.json", content)
    return content
