"""Deliberate breaks, each of which must turn a test red: the proof that the tests can fail. Run by `make mutants`.

A break replaces one function by a wrong one and names the test file that must notice.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


def put(place: str, make: Callable[[Any], Any]) -> None:
    """Replace the object at "module:Class.name" by make(object)."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, make(getattr(owner, name)))


def encoder_sees_everything(old):
    def forward(self, patches, order, visible):
        mean = patches.mean(1, keepdim=True)  # a little of every patch leaks into what is seen
        return old(self, patches + 1e-3 * mean, order, visible)

    return forward


def loss_on_all_patches(old):
    return lambda self, patches, order, visible: old(self, patches, order, visible) * 1.001


def teacher_unfrozen(old):
    def init(self, student):
        old(self, student)
        self.model.requires_grad_(True)

    return init


def swapped_momentum(old):
    return lambda self, student, momentum, applied=None: old(self, student, 1 - momentum, applied)


def update_when_skipped(old):
    return lambda self, student, momentum, applied=None: old(self, student, momentum, None)


def shifted_mask(old):
    def forward(self, patches, order, visible):
        return old(self, patches, order.roll(1, 1), visible)

    return forward


def biased_variance(old):
    def standardise(patches, eps):
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=0)
        return (patches - mean) * (var + eps).rsqrt()

    return standardise


def forgot_gamma(old):
    return lambda s, x, t=None, gamma=0.0: old(s, x, t, 1.0)


def half_the_gradient(old):
    return lambda ctx, *grads: tuple(g if g is None else g / 2 for g in old(ctx, *grads))


def transposed_positions(old):
    def table(grid, width):
        return old(grid[::-1], width).view(grid[1], grid[0], width).transpose(0, 1).flatten(0, 1)

    return table


def no_positions_for_hidden(old):
    def take(rows, ids):
        return old(rows, ids) * (0 if rows.dim() == 2 else 1)

    return take


def bf16_head(old):
    def forward(self, tokens, order):
        return old(self, tokens, order).bfloat16().float()

    return forward


def no_fsync_of_truth(old):
    def write(path, files):
        path.mkdir(parents=True, exist_ok=True)  # straight under its own name
        old(path, files)

    return write


def verify_nothing(old):
    return lambda path: None


def keep_by_text(old):
    return lambda folder: sorted(folder.glob("step_*"), key=lambda p: p.stat().st_size, reverse=False)[::-1][:1]


def described_restarts(old):
    """The slip of the official code: the schedule is indexed by the step within the epoch."""

    def momentum(self, t):
        return old(self, type(t)(t.step % t.steps_per_epoch, t.total_steps, t.steps_per_epoch))

    return momentum


def unknown_keys_pass(old):
    def build(cls, tree, source, where=""):
        return old(cls, {k: v for k, v in tree.items() if k in cls.__dataclass_fields__}, source, where)

    return build


def unchecked(old):
    return lambda recipe: recipe


def any_pickle(old):
    return lambda path, **kw: old(path, map_location="cpu", weights_only=False)


def same_every_epoch(old):
    return lambda seed, epoch, index: old(seed, 0, index)


def starts_over(old):
    def iterate(self):
        self.start, self.stop = 0, self.stop - self.start
        return old(self)

    return iterate


def clipped(old):
    return lambda values: np.clip(values, 0, 255).astype(np.uint8)


def forgets_what_it_named(old):
    return lambda self: set()


def raw_names(old):
    return lambda name: name.decode("utf-8", "replace")


def one_split(old):
    def glyphs():
        masks, labels, splits = old()
        return masks, labels, dict.fromkeys(splits, splits["train"])

    return glyphs


def pictures_know_the_answer(old):
    return lambda s, i, who, true_statistics=False: old(s, i, who, True)


def optimizer_not_restored(old):
    def load(path, method, optimizer):
        state = old(path, method, optimizer)
        optimizer.state.clear()
        return state

    return load


def teacher_from_student(old):
    def load(path, method, optimizer):
        state = old(path, method, optimizer)
        if hasattr(method, "teacher"):
            method.teacher.model.load_state_dict(method.student.state_dict())
        return state

    return load


def never_skips(old):
    return lambda self, fine: torch.ones_like(fine)


def endless_patience(old):
    return 10**9


# name: (where, the wrong version, the test file that must go red)
BREAKS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "the encoder sees hidden pixels": ("rcmae.models.autoencoder:Autoencoder.forward", encoder_sees_everything, "test_methods.py"),
    "predictions are scaled": ("rcmae.models.autoencoder:Autoencoder.forward", loss_on_all_patches, "test_golden.py"),
    "the teacher is trained": ("rcmae.models.teacher:Teacher.__init__", teacher_unfrozen, "test_methods.py"),
    "momentum is swapped": ("rcmae.models.teacher:Teacher.update", swapped_momentum, "test_methods.py"),
    "a skipped step moves the teacher": ("rcmae.models.teacher:Teacher.update", update_when_skipped, "test_methods.py"),
    "the model shifts the mask": ("rcmae.models.autoencoder:Autoencoder.forward", shifted_mask, "test_methods.py"),
    "the variance is biased": ("rcmae.methods.mae:standardise", biased_variance, "test_methods.py"),
    "gamma is ignored": ("rcmae.methods.rcmae:squared_errors", forgot_gamma, "test_methods.py"),
    "the fused loss forgets its scale": ("rcmae.methods.loss:_Blend.backward", half_the_gradient, "test_methods.py"),
    "positions are transposed": ("rcmae.models.encoder:sincos_positions", transposed_positions, "test_models.py"),
    "hidden patches have no place": ("rcmae.models.decoder:take", no_positions_for_hidden, "test_models.py"),
    "the head runs in bf16": ("rcmae.models.decoder:Decoder.forward", bf16_head, "test_methods.py"),
    "the described schedule restarts every epoch": ("rcmae.methods.rcmae:RCMAE.momentum", described_restarts, "test_methods.py"),
    "checkpoints are written in place": ("rcmae.engine.checkpoint:write_folder", no_fsync_of_truth, "test_checkpoint.py"),
    "hashes are not looked at": ("rcmae.engine.checkpoint:verify", verify_nothing, "test_checkpoint.py"),
    "the wrong checkpoints are kept": ("rcmae.engine.checkpoint:checkpoints", keep_by_text, "test_checkpoint.py"),
    "unknown keys pass": ("rcmae.config:_build", unknown_keys_pass, "test_config.py"),
    "recipes are not checked": ("rcmae.config:check", unchecked, "test_config.py"),
    "every epoch has the same crops": ("rcmae.data.dataset:rng", same_every_epoch, "test_data.py"),
    "a resumed sampler starts over": ("rcmae.data.sampler:BatchSampler.__iter__", starts_over, "test_data.py"),
    "16-bit images are clipped": ("rcmae.data.decode:_eight_bits", clipped, "test_data.py"),
    "bad files are named again": ("rcmae.data.dataset:BadFiles._recorded", forgets_what_it_named, "test_data.py"),
    "file names reach the terminal as they are": ("rcmae.data.sources:printable", raw_names, "test_data.py"),
    "the test split has training glyphs": ("rcmae.data.digits:_glyphs", one_split, "test_digits.py"),
    "pictures use the hidden patches' statistics": ("rcmae.report.pictures:picture", pictures_know_the_answer, "test_report.py"),
    "the optimizer is not restored": ("rcmae.loop:load_checkpoint", optimizer_not_restored, "test_loop.py"),
    "the teacher is rebuilt from the student": ("rcmae.loop:load_checkpoint", teacher_from_student, "test_loop.py"),
    "steps that are not finite are made": ("rcmae.engine.distributed:World.everywhere", never_skips, "test_loop.py"),
    "a run never diverges": ("rcmae.loop:PATIENCE", endless_patience, "test_loop.py"),
    "pickles are run": ("torch:load", any_pickle, "test_interop.py"),
}

HERE = Path(__file__).parent
