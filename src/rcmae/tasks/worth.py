"""`rcmae evaluate worth-it`: did pre-training pay off? Fine-tuning from the pre-trained weights and from
scratch, at several percentages of the labels and with several seeds."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from safetensors.numpy import load_file

from ..config import how_many
from ..engine import distributed
from ..engine.console import Screen, clock
from ..engine.distributed import World, autocast
from ..engine.run import translate_errors, write_json
from ..errors import ConfigError
from ..models.backbone import Backbone
from ..models.classifier import Classifier, classifier
from .context import results_folder, stem
from .evaluate import backbones, contexts, evaluate, networks
from .evaluation.base import EvaluationOptions
from .evaluation.finetune import FineTune
from .evaluation.worth import Worth
from .finetune import fitted
from .interval import EQUIVALENT, Difference, correction_note, difference, judged, percents
from .supervised import ADVICE

SCRATCH = "from scratch"


def arms(name: str, which: str, against: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """The arms by name: (backbone, network). Scratch comes first; all others are compared with it."""
    pretrained = {network: (name, network) for network in networks(name, which)}
    others = {other: (other, "teacher") for other in against}
    if twice := pretrained.keys() & others.keys() | ({SCRATCH} & others.keys()):
        raise ConfigError(f"{twice.pop()!r} is compared twice")
    return {SCRATCH: (f"scratch:{name}", "teacher")} | pretrained | others


def worth_it(
    name: str, task: Worth, tuning: FineTune, options: EvaluationOptions, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run the missing trainings; the same command resumes an interrupted comparison. Returns rows, and the
    verdict in sentences.

    Within a seed, every arm has the same labels, order and augmentation. Raises the errors of `rcmae.errors`.
    """
    task.check_settings(name, tuning, options)
    device = distributed.pick_device(options.device)
    with distributed.process_group(device) as world, translate_errors(device, world, ADVICE):
        return _worth_it(name, task, tuning, options, world, say if world.is_main else lambda text: None)


def _worth_it(
    name: str,
    task: Worth,
    tuning: FineTune,
    options: EvaluationOptions,
    world: World,
    say: Callable[[str], None],
) -> dict[str, Any]:
    options = options.with_data(name)
    # The default recipe depends on the backbone, but all arms must be trained by the same one.
    tuning = replace(tuning, recipe=tuning.resolve_recipe(name, options)[0])
    out = results_folder(name, options) / "worth-it"
    compared, rows = arms(name, options.which, task.against), []
    for backbone, which in compared.values():
        # A backbone that cannot be loaded must raise its error before hours of training.
        backbones(backbone, _with_network(options, which))
    total = len(task.percents) * task.seeds * len(compared)
    labels = ", ".join(f"{percent:g}" for percent in task.percents)
    say(f"{total} trainings: {', '.join(compared)}, on {labels} % of the labels, {task.seeds} seeds each")
    with Screen(world.is_main).progress("opening the images and timing a step", 1):
        expected = seconds_of_trainings(name, task, tuning, options, world)
    in_all = task.seeds * len(compared) * sum(expected.values())
    say(f"about {clock(in_all)} in all, estimated from a step on this machine, without reading images")
    number = 0
    seconds: dict[float, list[float]] = {percent: [] for percent in task.percents}
    for percent in task.percents:
        correct: dict[str, list[Bool[np.ndarray, " m"]]] = {arm: [] for arm in compared}
        images = 0
        for seed in range(1, task.seeds + 1):
            for index, (arm, (backbone, which)) in enumerate(compared.items()):
                folder = out / f"{index}-{_plain(arm)}"
                arm_options = replace(_with_network(options, which), labels=percent, seed=seed, out=folder)
                number += 1
                left = _left(seconds, expected, task.seeds * len(compared))
                say(f"training {number} of {total}{left}: {arm}, {percent:g} % of the labels, seed {seed}")
                for record in evaluate(backbone, tuning, arm_options):
                    images = record["train_images"]
                    seconds[percent].append(record["seconds"])
                    name_of_files = stem("finetune", record["network"], arm_options)
                    tensors = load_file(folder / f"{name_of_files}.safetensors")
                    correct[arm].append(tensors["correct"].astype(bool))
        if not images:  # not rank 0
            continue
        for arm, by_seed in correct.items():
            row = {"arm": arm, "percent": percent, "images": images, "seeds": percents(by_seed)}
            rows.append(row | ({} if arm == SCRATCH else {"gain": difference(by_seed, correct[SCRATCH])}))
    about = {"backbone": name, "data": options.data, "seeds": task.seeds}
    content = about | {"rows": rows, "verdict": verdict(rows)}
    if rows:
        write_json(out / "worth-it.json", content)
    return content


def seconds_of_trainings(
    name: str, task: Worth, tuning: FineTune, options: EvaluationOptions, world: World
) -> dict[float, float]:
    """The duration of a training of the backbone by percentage of the labels, from the time of a step on gray
    images of a growing batch, up to a micro-batch."""
    context, *_ = contexts(name, tuning, options, world, Screen(False))
    recipe, backbone = tuning.resolve_recipe(name, options)[1], context.backbone
    assert isinstance(backbone, Backbone)  # check_settings refuses "pixels"
    model = Classifier(classifier(backbone, len(context.set.classes)), *backbone.statistics)
    model.to(context.device).train()
    batch, seconds = 1, 0.0
    largest = max(2, recipe.batch_size // (world.size * tuning.accumulate))
    while seconds < 0.5 and batch < largest:  # the first steps, which are slow, are short
        batch = min(2 * batch, largest)
        images = torch.full((batch, backbone.channels, *backbone.shape), 0.5, device=context.device)
        began = time.monotonic()
        with autocast(context.device, context.precision):
            loss = model(images).sum()
        loss.backward()
        if context.device.type == "cuda":
            torch.cuda.synchronize(context.device)
        seconds = time.monotonic() - began
    each = 7 / 6 * seconds / batch / world.size  # scoring takes up to half as many forward passes
    expected = {}
    for percent in task.percents:
        images_used = max(1, round(len(context.set.train) * percent / 100))
        settings = fitted(recipe, images_used, world.size * tuning.accumulate)
        expected[percent] = each * settings.total_steps(images_used) * settings.batch_size
    return expected


def _with_network(options: EvaluationOptions, which: str) -> EvaluationOptions:
    """The options for a name returned by `networks`."""
    return replace(options, which=which)  # type: ignore[arg-type]  # also "backbone", which is no option


CONCLUSIONS = {
    "better": "pre-training paid off",
    "worse": "pre-training did not pay off: it is worse",
    "equivalent": f"pre-training made no difference of {EQUIVALENT:g} point or more",
    "inconclusive": "inconclusive",
}


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence for each arm and percentage of the labels, which are one family of comparisons, and how it
    was corrected."""
    compared = [row for row in rows if "gain" in row]
    sentences = []
    for row, result in zip(compared, judged(Difference(*row["gain"]) for row in compared), strict=True):
        scratch = next(r for r in rows if r["arm"] == SCRATCH and r["percent"] == row["percent"])
        sentences.append(
            f"With {row['percent']:g} % of the labels ({how_many(row['images'], 'image')}), "
            f"{row['arm']}: {CONCLUSIONS[result.word]} ({np.mean(row['seeds']):.1f} % accuracy, "
            f"{np.mean(scratch['seeds']):.1f} % from scratch; {result.numbers})."
        )
    return [*sentences, correction_note(len(compared))]


def _left(seconds: dict[float, list[float]], expected: dict[float, float], runs: int) -> str:
    """The remaining time in words, if a training has finished. `seconds` are the durations of those that
    have; at each percentage there will be `runs`, which were `expected` to take so long each."""
    done = sum(expected[percent] * len(durations) for percent, durations in seconds.items())
    if not done:
        return ""
    left = sum(expected[percent] * (runs - len(durations)) for percent, durations in seconds.items())
    return f", about {clock(left * sum(map(sum, seconds.values())) / done)} left"


def _plain(arm: str) -> str:
    return Path("".join(c if c.isalnum() else "-" for c in arm)).name.strip("-")
