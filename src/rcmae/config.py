"""What a run is told. `Recipe` is all that changes a result and is hashed; `Machine` is all that does not.

Both are frozen dataclasses. A recipe file is TOML with one table a section; every field is also a flag of
`rcmae pretrain`, named without its section (`[images] size = 224` is `--size 224`), so no two sections share a name.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from .errors import ConfigError

T = TypeVar("T")

MethodName = Literal["mae", "rcmae", "dino", "ibot", "msn", "mocov3"]


@dataclass(frozen=True, kw_only=True)
class Images:
    """What a training sample is."""

    size: int = 224
    "side of the training crop in pixels (its width, if `height` is given); a multiple of the patch"
    height: int | None = None
    "height of a crop that is not square"
    channels: int = 3
    "bands of an image; other than 1 and 3 needs multi-band TIFF and the [tiff] extra"
    normalize: Literal["imagenet", "data"] = "imagenet"
    "statistics that standardise the pixels: ImageNet's, or the data's own (measured and recorded)"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    "share of the image's area that a random crop covers (lowest, highest); 1 1 takes the whole image"
    flip: bool = True
    "flip left and right at random"

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of a crop in pixels."""
        return self.height or self.size, self.size


@dataclass(frozen=True, kw_only=True)
class Network:
    """The encoder (a plain timm Vision Transformer) and the decoder that pre-training needs."""

    model: str = "vit_base_patch16"
    "a named size (see `rcmae list`) or timm:NAME of any plain timm Vision Transformer"
    patch: int | None = None
    "patch side in pixels; default: the named size's own"
    width: int | None = None
    "encoder width; default: the named size's own"
    depth: int | None = None
    "encoder blocks; default: the named size's own"
    heads: int | None = None
    "encoder attention heads; default: the named size's own"
    registers: int = 0
    "register tokens beside the class token"
    decoder_width: int | None = None
    "decoder width; default: the named size's own"
    decoder_depth: int | None = None
    "decoder blocks; default: the named size's own"
    decoder_heads: int | None = None
    "decoder attention heads; default: the named size's own"


@dataclass(frozen=True, kw_only=True)
class MAE:
    """Masked auto-encoding, shared by `mae` and `rcmae`."""

    mask_ratio: float = 0.75
    "share of the patches that is hidden"
    target: Literal["normalised", "pixels"] = "normalised"
    "what a hidden patch is compared with: standardised by its own mean and variance, or plain pixels"
    target_eps: float = 1e-6
    "added to a patch's variance before it is divided by; larger on small patches, where flat ones are noise"


@dataclass(frozen=True, kw_only=True)
class RCMAE:
    """What `rcmae` adds to MAE."""

    gamma: float = 1.0
    "weight of the consistency with the teacher; 0 is MAE"
    teacher_mask: Literal["same", "different"] = "same"
    "the teacher sees the student's visible patches (the paper's S), or draws its own (D)"


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The mean teacher, of every method that has one."""

    schedule: Literal["half-life", "described", "released", "linear"] = "half-life"
    "teacher momentum: constant, from `half_life`; a cosine to 1 (RC-MAE's text, DINO); constant (RC-MAE's code); linear towards 1 (MSN)"
    momentum: float = 0.996
    "where `described` and `linear` start, where `released` stays; `half-life` does not use it"
    half_life: str = "0.5%"
    "how long a student stays half remembered: '0.5%' of the run, '173 steps', '2e6 images', '0.5 epochs' or 'auto'"
    ema_updates: int = 1
    "teacher updates an optimizer step; the official code makes one a micro-batch (ViT-B and L: 2)"


@dataclass(frozen=True, kw_only=True)
class Crops:
    """The views of self-distillation (dino, ibot, msn, mocov3): two crops as [images] says, and small ones, in changed colours."""

    local_crops: int = 8
    "small crops an image (MSN's focal views); 0 with mocov3"
    local_size: int = 96
    "their side in pixels; a multiple of the patch"
    local_scale: tuple[float, float] = (0.05, 0.4)
    "share of the image's area that they cover"
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    "change of brightness, contrast, saturation and hue in 80 % of the crops; images of other than 3 channels keep theirs"
    grey: float = 0.2
    "share of the crops without colour"
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    "share of the crops that are blurred: of the first global one, the second, the small ones"
    solarize: float = 0.2
    "share of the second global crops whose bright pixels are inverted"


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Heads and losses of self-distillation."""

    prototypes: int = 65536
    "dino, ibot: width of the head's output; msn: number of prototypes"
    head_width: int = 2048
    "hidden width of the head"
    head_norm: bool = False
    "BatchNorm between its layers, an option of both codes (dino, ibot; the heads of msn and mocov3 have it)"
    embedding: int = 256
    "width in which similarity is measured: before the prototypes, or (mocov3) of queries and keys"
    student_temperature: float = 0.1
    "of the student's softmax; mocov3: of the contrast"
    teacher_temperature: float = 0.04
    "of the teacher's softmax (dino, ibot)"
    teacher_temperature_start: float = 0.04
    "where the teacher's temperature starts"
    teacher_temperature_warmup: float = 0.0
    "share of the run in which it rises linearly"
    centre_momentum: float = 0.9
    "what a centre keeps of itself in a step (dino, ibot)"
    freeze_last: float = 1.0
    "epochs in which the head's last layer does not move, within the first tenth of the run (dino, ibot)"
    masked_images: float = 0.5
    "share of the global crops of which patches are masked (ibot)"
    masked_share: tuple[float, float] = (0.1, 0.5)
    "share of the patches of such a crop that is masked (ibot)"
    mask_shape: Literal["block", "random"] = "block"
    "how masked patches lie (ibot)"
    patch_head: Literal["all", "masked"] = "all"
    "patches that the head is put on: all, as the reference code does, or the masked ones, on which alone the loss is (ibot)"
    anchor_drop: float = 0.15
    "share of the patches that a large anchor view loses (msn)"
    sharpen: float = 0.25
    "temperature that sharpens the targets (msn)"
    sinkhorn: bool = False
    "balance the targets over the prototypes (msn; dino and ibot: in place of the centre, as DINOv2 does)"
    entropy: float = 1.0
    "weight of the mean entropy that is maximised (msn)"
    freeze_patches: bool = True
    "the patch embedding stays as it is drawn (mocov3)"


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW with warm-up and cosine."""

    batch_size: int = 256
    "images an optimizer step, over all devices and micro-batches"
    base_lr: float = 1.5e-4
    "learning rate for a batch of 256; the linear rule gives base_lr * batch_size / 256"
    min_lr: float = 0.0
    "learning rate at the end of the cosine"
    warmup: float = 0.05
    "share of the run in which the learning rate rises linearly"
    weight_decay: float = 0.05
    "decoupled weight decay, on matrices only"
    weight_decay_end: float | None = None
    "where a cosine takes it by the end of the run; default: it stays"
    betas: tuple[float, float] = (0.9, 0.95)
    "AdamW's decay rates"
    clip: float | None = None
    "largest norm of the gradient; default: no clipping"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What is measured on the way, on a small labelled subset when the data has labels."""

    probes: int = 6
    "times that student and teacher are probed during the run; 0: never"
    probe_train: int = 2000
    "labelled images that the probes are fitted on"
    probe_test: int = 1000
    "labelled images that they are scored on"
    attentive: bool = False
    "also fit a probe that chooses what to look at among all tokens"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that changes the result of a pre-training run."""

    method: MethodName = "rcmae"
    "what is learned: see `rcmae list`"
    data: str = "embedded:digits"
    "the images: a folder, or another source that `rcmae list` shows"
    seed: int = 0
    "every crop, mask and initial weight is a function of it"
    epochs: float | None = None
    "length of the run in passes over the data"
    steps: int | None = None
    "length of the run in optimizer steps"
    time: str | None = None
    "length of the run as time (90s, 10m, 8h): the steps that fit are measured first, then fixed"
    images: Images = Images()
    network: Network = Network()
    mae: MAE = MAE()
    rcmae: RCMAE = RCMAE()
    teacher: Teacher = Teacher()
    crops: Crops = Crops()
    distill: Distill = Distill()
    optim: Optim = Optim()
    probe: Probe = Probe()

    def total_steps(self, images: int) -> int | None:
        """Optimizer steps on a set of so many images; None where `time` decides.

        Without any length: some 400 passes over a small set, but no run is shorter than 4 or longer than 40 million samples,
        the budget of one GPU from an hour to a day.
        """
        if self.time:
            return None
        if self.steps:
            return self.steps
        if self.epochs:
            return max(1, round(self.epochs * (images // self.optim.batch_size)))
        return max(1, min(max(400 * images, 4_000_000), 40_000_000) // self.optim.batch_size)


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """Where and how a run of any kind is carried out. Nothing here changes what is computed, beyond rounding."""

    out: Path | None = None
    "run directory; default: one below runs/ (of `detect train`, below the backbone's run). A run that is already there goes on"
    device: str = "auto"
    "auto, cpu, cuda, cuda:1 or mps"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    "auto: bf16 where the device multiplies it faster (CUDA, CPUs with AMX or AVX512-BF16), else fp32"
    accumulate: int = 1
    "micro-batches an optimizer step and device: less memory, the same step (nearly so where a loss looks across the batch)"
    workers: int | None = None
    "loader processes a device; default: by the data and the cores"
    threads: int | None = None
    "CPU threads of this process; default: torch's"
    compile: bool = False
    "compile the blocks with torch.compile"
    checkpointing: bool = False
    "recompute activations in the backward pass: less memory, about a third more time"
    save_every: str = "5m"
    "time between checkpoints"
    keep: int = 2
    "newest checkpoints that are kept"
    log_every: int | None = None
    "steps between two lines of metrics.jsonl; default: a hundredth of the run, at most 50"
    strict: bool = False
    "end at the first unreadable image"
    bad_share: float = 0.01
    "end when more than this share of the images (and more than ten files) is unreadable"
    tensorboard: bool = False
    "also write TensorBoard events (needs the [tensorboard] extra)"
    wandb: str | None = None
    "also log to this Weights & Biases project (needs the [wandb] extra)"


@dataclass(frozen=True, kw_only=True)
class Machine(Workplace):
    """The same of pre-training, with its instruments."""

    monitor: bool = True
    "carry the instruments of rcmae.lab: what the teacher does, whether features live (below 2 % of the time from 1,000 steps on)"
    on_alarm: Literal["warn", "stop"] = "warn"
    "what a named fault of the teacher or a collapse does: one line, or the end of the run, its checkpoint kept"


def sections(cls: type = Recipe) -> dict[str, type]:
    """The sections of a recipe by name, in order."""
    return {f.name: f.type for f in fields(cls) if is_dataclass(f.type)}  # type: ignore[misc]


# --- files ------------------------------------------------------------------------------------------------------------


def load_recipe(name: str) -> Recipe:
    """A recipe by name (`rcmae list`) or by the path of a TOML file.

    Raises ConfigError with the file, the key and the nearest legal name.
    """
    return load_settings(name, shipped_recipes(), parse_recipe)


def load_settings(name: str, shipped: dict[str, Any], parse: Callable[[str, str], T]) -> T:
    """What `parse(text, source)` makes of a file in the package, by name, or of a TOML file, by path. Raises ConfigError."""
    path = Path(name)
    if path.suffix == ".toml" or (name not in shipped and path.is_file()):
        if not path.is_file():
            raise ConfigError(f"recipe file {name} does not exist")
        try:
            return parse(path.read_text(encoding="utf-8"), name)
        except UnicodeDecodeError as e:
            raise ConfigError(f"{name} is not UTF-8 text: {e.reason} at byte {e.start}") from e
        except OSError as e:
            raise ConfigError(f"recipe file {name} cannot be read: {e.strerror}") from e
    if name not in shipped:
        raise ConfigError(f"there is no recipe {name!r}{hint(name, shipped)} (`rcmae list` shows all)")
    return parse(shipped[name].read_text(encoding="utf-8"), f"{name}.toml")


def shipped_recipes(kind: str = "") -> dict[str, Any]:
    """The recipes inside the package: name -> readable file. Those of pre-training, or of the folder `kind`."""
    folder = resources.files("rcmae.recipes").joinpath(kind)
    return {f.name.removesuffix(".toml"): f for f in sorted(folder.iterdir(), key=lambda f: f.name) if f.name.endswith(".toml")}


def parse_recipe(text: str, source: str) -> Recipe:
    """TOML text to a checked Recipe; `source` names the file in messages."""
    return check(parse_settings(Recipe, text, source))


def parse_settings(cls: type[T], text: str, source: str) -> T:
    """TOML text to a dataclass of settings, types checked, values not."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{source} is not TOML: {e}") from e
    return _build(cls, tree, source)


def to_toml(recipe: Any) -> str:
    """A recipe, of pre-training or of a task, as TOML that reads back to an equal one; values that are None are left out."""
    tree = dataclasses.asdict(recipe)
    lines = [f"{k} = {_toml(v)}" for k, v in tree.items() if not isinstance(v, dict) and v is not None]
    for name in sections(type(recipe)):
        lines += ["", f"[{name}]"]
        lines += [f"{k} = {_toml(v)}" for k, v in tree[name].items() if v is not None]
    return "\n".join(lines) + "\n"


def recipe_hash(recipe: Any) -> str:
    """Twelve hex digits that name the recipe. Where the data lies is no part of it; its fingerprint is recorded apart."""
    tree = dataclasses.asdict(recipe)
    tree |= {"data": ""} if "data" in tree else {}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def flat(recipe: Any) -> dict[str, Any]:
    """The recipe as flag name -> value, without the sections and without what is None."""
    tree = dataclasses.asdict(recipe)
    for name in sections(type(recipe)):
        tree |= tree.pop(name)
    return {k: v for k, v in tree.items() if v is not None}


def changed(recipe: Recipe, **settings: Any) -> Recipe:
    """The recipe with settings of any section replaced, each by its flag's name."""
    parts = {name: getattr(recipe, name) for name in sections()}
    for name, part in parts.items():
        parts[name] = replace(part, **{f.name: settings.pop(f.name) for f in fields(part) if f.name in settings})
    return replace(recipe, **(parts | settings))


def with_settings(recipe: Recipe, settings: Sequence[str], source: str) -> Recipe:
    """The recipe with settings of any section replaced, each given as "key=value". Raises ConfigError that names `source`."""
    return check(replaced(recipe, settings, source))


def replaced(recipe: T, settings: Sequence[str], source: str) -> T:
    """The same for any frozen dataclass of settings, unchecked."""
    tree, own = tomllib.loads(to_toml(recipe)), sections(type(recipe))
    homes = {f.name: tree for f in fields(type(recipe)) if f.name not in own}  # type: ignore[arg-type]
    homes |= {f.name: tree[name] for name, section in own.items() for f in fields(section)}
    for text in settings:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or key not in homes:
            raise ConfigError(f"{source}: {text!r} is no setting{hint(key, homes) if equals else '; write key=value'}")
        try:
            homes[key][key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            homes[key][key] = value
    return _build(type(recipe), tree, source)


# --- checks -----------------------------------------------------------------------------------------------------------


def check(r: Recipe) -> Recipe:
    """Refuse impossible values, all problems in one message, before any data is touched. Returns the recipe."""
    lo, hi = r.images.crop_scale
    lengths = [n for n in ("epochs", "steps", "time") if getattr(r, n) is not None]
    rules = [
        (len(lengths) <= 1, f"give one of epochs, steps and time, not {' and '.join(lengths)}"),
        (r.epochs is None or r.epochs > 0, f"epochs must be above 0, not {r.epochs}"),
        (r.steps is None or r.steps > 0, f"steps must be above 0, not {r.steps}"),
        (0 <= r.seed < 2**63, f"seed must be 0 or more and below 2**63, not {r.seed}"),
        (r.images.size > 0, f"size must be above 0, not {r.images.size}"),
        (r.images.channels > 0, f"channels must be above 0, not {r.images.channels}"),
        (0 < lo <= hi <= 1, f"crop_scale must satisfy 0 < low <= high <= 1, not {lo} {hi}"),
        (0 < r.mae.mask_ratio < 1, f"mask_ratio must lie between 0 and 1, not {r.mae.mask_ratio}"),
        (r.mae.target_eps > 0, f"target_eps must be above 0, not {r.mae.target_eps}"),
        (r.rcmae.gamma >= 0, f"gamma must be 0 or more, not {r.rcmae.gamma}"),
        (0 <= r.teacher.momentum <= 1, f"momentum must lie in 0 to 1, not {r.teacher.momentum}"),
        (r.teacher.ema_updates >= 1, f"ema_updates must be 1 or more, not {r.teacher.ema_updates}"),
        (r.optim.batch_size > 0, f"batch_size must be above 0, not {r.optim.batch_size}"),
        (r.optim.base_lr > 0 and math.isfinite(r.optim.base_lr), f"base_lr must be above 0, not {r.optim.base_lr}"),
        (r.optim.min_lr >= 0, f"min_lr must be 0 or more, not {r.optim.min_lr}"),
        (0 <= r.optim.warmup < 1, f"warmup is a share of the run, from 0 to below 1, not {r.optim.warmup}"),
        (r.optim.weight_decay >= 0, f"weight_decay must be 0 or more, not {r.optim.weight_decay}"),
        (all(0 <= b < 1 for b in r.optim.betas), f"betas must lie in 0 to below 1, not {r.optim.betas}"),
        (
            r.optim.weight_decay_end is None or (r.optim.weight_decay_end >= 0 and r.optim.weight_decay > 0),
            f"weight_decay_end must be 0 or more, and needs a weight_decay above 0; not {r.optim.weight_decay_end}",
        ),
        (r.crops.local_crops >= 0, f"local_crops must be 0 or more, not {r.crops.local_crops}"),
        (r.crops.local_size > 0, f"local_size must be above 0, not {r.crops.local_size}"),
        (
            0 < r.crops.local_scale[0] <= r.crops.local_scale[1] <= 1,
            f"local_scale must satisfy 0 < low <= high <= 1, not {r.crops.local_scale}",
        ),
        (
            all(v >= 0 for v in r.crops.jitter) and r.crops.jitter[3] <= 0.5,
            f"jitter must be 0 or more, its hue at most 0.5, not {r.crops.jitter}",
        ),
        (r.distill.prototypes >= 2, f"prototypes must be 2 or more, not {r.distill.prototypes}"),
        (r.distill.head_width > 0, f"head_width must be above 0, not {r.distill.head_width}"),
        (r.distill.embedding > 1, f"embedding must be 2 or more, not {r.distill.embedding}"),
        (0 <= r.distill.centre_momentum < 1, f"centre_momentum must lie in 0 to below 1, not {r.distill.centre_momentum}"),
        (
            0 <= r.distill.teacher_temperature_warmup <= 1,
            f"teacher_temperature_warmup is a share of the run, not {r.distill.teacher_temperature_warmup}",
        ),
        (
            0 <= r.distill.masked_share[0] <= r.distill.masked_share[1] <= 1,
            f"masked_share must satisfy 0 <= low <= high <= 1, not {r.distill.masked_share}",
        ),
        (0 <= r.distill.anchor_drop < 1, f"anchor_drop must lie in 0 to below 1, not {r.distill.anchor_drop}"),
        (r.distill.entropy >= 0, f"entropy must be 0 or more, not {r.distill.entropy}"),
        (r.optim.clip is None or r.optim.clip > 0, f"clip must be above 0, not {r.optim.clip}"),
        (r.probe.probes >= 0, f"probes must be 0 or more, not {r.probe.probes}"),
        (r.probe.probe_train > 0, f"probe_train must be above 0, not {r.probe.probe_train}"),
        (r.probe.probe_test > 0, f"probe_test must be above 0, not {r.probe.probe_test}"),
        (r.images.height is None or r.images.height > 0, f"height must be above 0, not {r.images.height}"),
        (r.network.registers >= 0, f"registers must be 0 or more, not {r.network.registers}"),
    ]
    shares = {"grey": r.crops.grey, "solarize": r.crops.solarize, "masked_images": r.distill.masked_images}
    shares |= {f"blur {i}": v for i, v in enumerate(r.crops.blur)}
    rules += [(0 <= v <= 1, f"{k} is a share, from 0 to 1, not {v}") for k, v in shares.items()]
    temperatures = ("student_temperature", "teacher_temperature", "teacher_temperature_start", "sharpen")
    rules += [(getattr(r.distill, k) > 0, f"{k} must be above 0, not {getattr(r.distill, k)}") for k in temperatures]
    sizes = {f.name: getattr(r.network, f.name) for f in fields(Network) if f.name not in ("model", "registers")}
    rules += [(v is None or v > 0, f"{k} must be above 0, not {v}") for k, v in sizes.items()]
    values = [(k, x) for k, v in flat(r).items() for x in (v if isinstance(v, (list, tuple)) else [v]) if isinstance(x, float)]
    rules += [(math.isfinite(v), f"{k} must be a finite number, not {v}") for k, v in values]
    problems = [message for fine, message in rules if not fine]
    problems += _unreadable((parse_time, r.time), (parse_half_life, r.teacher.half_life))
    if problems:
        raise ConfigError("; ".join(problems))
    return r


def check_machine(m: Workplace) -> Workplace:
    """Likewise for the machine."""
    rules = [
        (m.accumulate >= 1, f"accumulate must be 1 or more, not {m.accumulate}"),
        (m.workers is None or m.workers >= 0, f"workers must be 0 or more, not {m.workers}"),
        (m.threads is None or m.threads >= 1, f"threads must be 1 or more, not {m.threads}"),
        (m.keep >= 1, f"keep must be 1 or more, not {m.keep}"),
        (m.log_every is None or m.log_every >= 1, f"log_every must be 1 or more, not {m.log_every}"),
        (0 <= m.bad_share <= 1, f"bad_share must lie in 0 to 1, not {m.bad_share}"),
    ]
    problems = [message for fine, message in rules if not fine] + _unreadable((parse_time, m.save_every))
    if problems:
        raise ConfigError("; ".join(problems))
    return m


def _unreadable(*texts: tuple[Callable[[str], Any], str | None]) -> list[str]:
    problems = []
    for parse, text in texts:
        try:
            if text is not None:
                parse(text)
        except ConfigError as e:
            problems.append(str(e))
    return problems


def parse_time(text: str) -> float:
    """'90s', '10m', '1.5h', '2d' or plain seconds, in seconds."""
    m = re.fullmatch(r"\s*([0-9]+\.?[0-9]*(?:e[0-9]+)?)\s*([smhd]?)\s*", text)
    if m is None or not (seconds := float(m[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[m[2]]) > 0:
        raise ConfigError(f"{text!r} is no length of time; write 90s, 10m, 8h or 2d")
    return seconds


def parse_half_life(text: str) -> tuple[float, str]:
    """'0.5%', '173 steps', '2e6 images' or '0.5 epochs' as (number, unit), the unit of a share is '%'; 'auto' as (0, 'auto')."""
    if text.strip() == "auto":
        return 0.0, "auto"
    m = re.fullmatch(r"\s*([0-9]+\.?[0-9]*(?:e[0-9]+)?)\s*(%|steps?|images?|epochs?)\s*", text)
    if m is None or not float(m[1]) > 0:
        raise ConfigError(f"{text!r} is no half-life; write '0.5%' (of the run), '173 steps', '2e6 images', '0.5 epochs' or 'auto'")
    return float(m[1]), m[2] if m[2] == "%" else m[2].rstrip("s") + "s"


# --- helpers ----------------------------------------------------------------------------------------------------------


def _build(cls: type, tree: dict[str, Any], source: str, where: str = "") -> Any:
    known = {f.name: f for f in fields(cls)}
    values = {}
    for key, value in tree.items():
        if key not in known:
            raise ConfigError(f"{source}: unknown key {where}{key}{hint(key, known, where)}")
        kind = known[key].type
        if is_dataclass(kind):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {where}{key} is a section: write [{key}]")
            values[key] = _build(typing.cast(type, kind), value, source, f"{key}.")
        else:
            values[key] = _convert(kind, value, f"{source}: {where}{key}")
    return cls(**values)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{where} must be one of {', '.join(map(str, args))}, not {value!r}{hint(str(value), args)}")
    if origin is types.UnionType:
        return None if value is None else _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if args[-1] is ...:  # of any length
            args = args[:1] * (len(value) if isinstance(value, (list, tuple)) else 1)
        if isinstance(value, (list, tuple)) and len(value) == len(args):
            return tuple(_convert(a, v, where) for a, v in zip(args, value, strict=True))
        raise ConfigError(f"{where} must be a list of {len(args)} values, not {value!r}")
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if type(value) is kind is not float:
        return value
    raise ConfigError(f"{where} must be of type {getattr(kind, '__name__', kind)}, not {value!r}")


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    # JSON's numbers and strings are TOML's, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def hint(word: str, known: Any, where: str = "") -> str:
    """ "; did you mean ...?" if one of the known words is near."""
    close = difflib.get_close_matches(word, list(map(str, known)), n=1)
    return f"; did you mean {where}{close[0]}?" if close else ""
