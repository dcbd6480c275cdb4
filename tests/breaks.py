"""Deliberate breaks, each of which must turn a test red: the proof that the tests can fail. Run by `make mutants`.

A break replaces one function by a wrong one and names the test that must notice.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import re
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
    def values(cls, tree, source, where=""):
        return old(cls, {k: v for k, v in tree.items() if k in cls.__dataclass_fields__}, source, where)

    return values


def seconds_by_default(old):
    return lambda text: old(text + "s" if text.strip()[-1:].isdigit() else text)


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
        if method.teacher is not None:
            method.teacher.model.load_state_dict(method.student.state_dict())
        return state

    return load


def never_skips(old):
    return lambda self, fine: torch.ones_like(fine)


def endless_patience(old):
    return 10**9


def without_the_last(old):
    return lambda self: old(self)[:-1]


def replaces_nothing(old):
    return {}


def always_half_life(old):
    return "a shorter --half-life"


def zero(old):
    return 0


def notes_nothing(old):
    return lambda *args: ""


def all_milestones(old):
    return lambda run, step, milestone, *sinks: old(run, step, step or 0, *sinks)


def any_dictionary(old):
    return lambda line: isinstance(line, dict)


def alarms_unread(old):
    return lambda alarms, watched: old([], watched)


def silence_unwatched(old):
    return lambda alarms, watched: old(alarms, True)


def health_left_out(old):
    return lambda health, collapse_advice: None


def momentum_as_told(old):
    return lambda line, key: old(line, key.replace("measured_", "expected_") if isinstance(key, str) else key)


def judged_as_reconstruction(old):
    return classmethod(lambda cls, means, reference: [("bad", "The last losses are not finite.")])


def drawn_without_data(old):
    shown = importlib.import_module("rcmae.report.panels").Shown("figure-nothing", "<svg></svg>", "Nothing.")
    return lambda figures, lines, reference: [*old(figures, lines, reference), shown]


def a_flag_of_another(old):
    return "lower --gamma"


def one_network(old):
    def by_depth(groups, *args, **kwargs):
        joined = {n: (c, {b.replace("decoder ", "encoder d"): v for b, v in values.items()}) for n, (c, values) in groups.items()}
        return old(joined, *args, **kwargs)

    return by_depth


def straight_when_unnamed(old):
    def plot(lines, levels=None, ylabel="", log=False, *args, **kwargs):
        return old(lines, levels, ylabel, log and all(line.name for line in lines), *args, **kwargs)

    return plot


def never_smooth(old):
    return lambda axes, line, markers, log: old(axes, dataclasses.replace(line, smooth=False), markers, log)


def measured_as_reference(old):
    def write_page(found, out):
        return old(found | {"table": [row | {"reference": row["previous"]} for row in found["table"]]}, out)

    return write_page


def shades_swapped(old):
    swap = {"memory1": "memory3", "memory3": "memory1"}
    return lambda found: {k: re.sub("memory[13]", lambda m: swap[m[0]], svg) for k, svg in old(found).items()}


def conditions_reversed(old):
    def by_depth(groups, *args):
        values = reversed([values for _, values in groups.values()])
        return old({name: (colour, v) for (name, (colour, _)), v in zip(groups.items(), values, strict=True)}, *args)

    return by_depth


def no_difference(old):
    return lambda a, b, start: 0.0


def one_ranks_losses(old):
    return lambda value: value


def newest_counts_fully(old):
    return lambda updates, alpha: old(updates, alpha) / alpha


def no_gate(old):
    return lambda residuals, past, seen, lr, weights: old(residuals, seen.expand_as(past), seen, lr, weights)


def too_stable(old):
    return lambda gamma, alpha: 1.05 * old(gamma, alpha)


def one_draw(old):
    return lambda self, indices, draw: old(self, indices, 0)


def every_method_compares(old):
    return classmethod(lambda cls: True)


def no_controls(old):
    return ()


def losses_swapped(old):
    return lambda method, batch: old(method, batch)[::-1]


def momentum_as_expected(old):
    return lambda self: {"measured_momentum": self.expected, "expected_momentum": self.expected}


def calls_nothing(old):
    return lambda self, *args, **options: []


def calls_again(old):
    return lambda self, found: found


def sees_no_rounding(old):
    return lambda values: False


def sees_no_constant(old):
    return lambda prediction, target: False


def sees_no_repetition(old):
    return lambda self: False


def compares_no_buffers(old):
    return lambda self: None


def impatient(old):
    return -0.005


def forgets_alarms(old):
    return lambda lines, step: set()


def stops_for_nothing(old):
    return lambda self: ""


# name: (where, the wrong version, the test file that must go red)
def own_view_too(old):
    def across_views(student, teacher, temperature):
        log = (student / temperature).log_softmax(-1).sum(0)
        return -(teacher * log).sum(-1).mean(1).sum() / (len(teacher) * len(student))

    return across_views


def centre_moves_anyway(old):
    return lambda self, applied: old(self, torch.ones_like(applied))


def centre_forgets_micro_batches(old):
    def update(self, applied):
        del self.accumulated[:-1]
        return old(self, applied)

    return update


def never_frozen(old):
    return lambda self, t, applied: None


def masked_are_seen(old):
    return lambda self, net, images, ids=None, masked=None: old(self, net, images, ids)


def every_patch_of_the_anchor(old):
    return lambda self, net, images, ids=None, masked=None: old(self, net, images, None, masked)


def contrast_with_oneself(old):
    return lambda q, k, temperature: old(q, q, temperature)


def lopsided(old):
    return lambda p, rounds=3: p / p.sum(1, keepdim=True)


def all_is_the_students(old):
    return lambda self, teacher: None


def same_crop_twice(old):
    def call(self, image, rng):
        views = old(self, image, rng)
        return views | {"image": views["image"][:1].expand(2, -1, -1, -1)}

    return call


def interval_of_many_seeds(old):
    def interval(hits, others, draws=4000):
        mean, low, high = old(hits, others, draws)
        return [mean, mean + (low - mean) / 3, mean + (high - mean) / 3]

    return interval


def images_of_another_arm(old):
    return lambda hits, others, draws=4000: old(hits, [h[::-1] for h in others], draws)


def means_are_enough(old):
    def verdict(rows, about):
        sure = [row | {"linear against": {k: [v[0]] * 3 for k, v in row["linear against"].items()}} for row in rows]
        return old(sure, about)

    return verdict


def averages_cost_a_teacher(old):
    return lambda *args, **kwargs: [dataclasses.replace(arm, paid=arm.recipe) for arm in old(*args, **kwargs)]


def nothing_is_finished(old):
    return property(lambda self: False)


def looks_everywhere(old):
    return lambda self, tokens: old(self, tokens.mean(1, keepdim=True).expand_as(tokens))


def another_start(old):
    def init(self, *args):
        torch.rand(1)
        old(self, *args)

    return init


def centre_in_any_case(old):
    return lambda self, logits, center, temperature: ((logits - center.value) / temperature).softmax(-1)


def neighbours_by_length(old):
    return lambda queries, train, k: (-torch.cdist(queries, train)).topk(k).indices.flip(1)


def sgd_for_lars(old):
    return lambda model, lr: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)


def keeps_the_scale(old):
    return lambda mean, std, weight, bias: old(mean, torch.ones_like(std), weight, bias)


def scores_on_what_it_saw(old):
    return lambda labels, seed=0, share=0.2: np.roll(old(labels, seed, share), 1) & False


def classes_by_number(old):
    def parts(train, test):
        test.classes = train.classes[: len(test.classes)]
        return old(train, test)

    return parts


def any_backbone_is_the_same(old):
    return lambda backbone: "0" * 16


def grey_counts(old):
    return lambda self, predicted, seen: predicted == seen.labels


def substitute_under_a_wrong_label(old):
    def read(self, index):
        image, _, bad = old(self, index)
        return image, index, bad

    return read


def paths_drawn_anew(old):
    drawn = itertools.count()
    return lambda seed, step, part: old(seed, next(drawn), part)


def mixtures_of_a_micro_batch(old):
    return lambda self, images, labels, step, part: old(self, images, labels, step, 0)


def a_bit_always_kept(old):
    return lambda image, bits, **unused: old(image, max(bits, 1))


def generators_left_alone(old):
    return lambda rng: contextlib.nullcontext()


def one_rate_for_all_layers(old):
    return lambda vit, weight_decay, decay: old(vit, weight_decay, 1.0)


def mean_of_all_tokens(old):
    def classifier(*args, **kwargs):
        vit = old(*args, **kwargs)
        vit.pool_include_prefix = True
        return vit

    return classifier


def unread_image_is_looked_at(old):
    return lambda self, i: old(self, i) | {"fine": True}


def severity_four_is_three(old):
    """As ImageNet-C's own fog and snow: one severity is no stronger than the one before."""
    return lambda image, corruption, severity, seed=0, index=0: old(image, corruption, 3 if severity == 4 else severity, seed, index)


def every_image_has_the_same_draws(old):
    return lambda seed, index, corruption: old(seed, 0, corruption)


def constants_of_large_images(old):
    """ImageNet's noise on 32 px: a rounding of pixels that no one sees, and another one that hides the picture."""
    return {name: (change, large, large) for name, (change, large, _) in old.items()}


def alexnet_in_another_order(old):
    """A list of numbers whose order is not that of the corruptions."""
    return dict(zip(old, [*list(old.values())[1:], next(iter(old.values()))], strict=True))


def columns_by_order(old):
    """The first folder is the first logit: what gives 0.08 % on ImageNet-A."""
    return lambda classes, folders: np.arange(len(folders))


def eps_in_deviations(old):
    """eps in units of the standardised pixels: larger by one over the deviation."""
    return lambda model, images, labels, attack, *rest: old(model, images, labels, dataclasses.replace(attack, eps=attack.eps * 4), *rest)


def calibration_of_means(old):
    """Only the overall accuracy and confidence are compared."""
    return lambda confidence, right, bins=15: 100 * abs(float(confidence.mean() - right.mean()))


def corrupt_the_whole_picture(old):
    """The corruption first, then the evaluation view, which takes some of it away."""

    def severities(image, index, shape, corruption, severities, seed):
        sets = importlib.import_module("rcmae.tasks.robustness.sets")
        return torch.stack([sets.center(sets.corrupt(image, corruption, s, seed, index), shape) for s in severities])

    return severities


def a_resized_imagenet_c(old):
    """Stored crops are resized and cropped once more, whatever their size."""
    sets = importlib.import_module("rcmae.tasks.robustness.sets")
    return lambda image, index, shape: sets.center(image, shape)[None]


def draws_by_the_number_in_the_part(old):
    sets = importlib.import_module("rcmae.tasks.robustness.sets")

    def item(self, place):
        index = int(self.indices[place])
        origin = int(self.source.chosen[index]) if isinstance(self.source, sets.sources.Subset) else index
        return self.view(sets.read_image(self.source, index, 3), origin)

    return item


def c_style_has_an_mce(old):
    sets = importlib.import_module("rcmae.tasks.robustness.sets")
    return property(lambda self: sets.mean_corruption_error(self.errors))


def the_traceback_stays(old):
    def plain(loader):
        try:
            yield from loader
        except Exception as e:
            raise type(e)(str(e).strip().splitlines()[-1]) from e

    return plain


def votes_alone(old):
    return lambda self, x: self.votes.__wrapped__(self, x, [self.k])[self.k]


def heads_do_not_count(old):
    def digest(backbone):
        for block in backbone.vit.blocks if hasattr(backbone, "vit") else ():
            block.attn.num_heads, kept = 1, block.attn.num_heads
            block.attn.kept = kept
        found = old(backbone)
        for block in backbone.vit.blocks if hasattr(backbone, "vit") else ():
            block.attn.num_heads = block.attn.kept
        return found

    return digest


# --- detection --------------------------------------------------------------------------------------------------------


def rows_for_columns(old):
    def positions(self, q):
        found, side = old(self, q), self.window
        return found if found is None else found.unflatten(3, (side, side)).transpose(3, 4).flatten(3)

    return positions


def changed_vit(change):
    """What `windowed` returns, with something done to the ViT."""

    def make(old):
        def windowed(plain, s):
            vit, tables = old(plain, s)
            change(vit)
            return vit, tables

        return windowed

    return make


@changed_vit
def positions_on_their_side(vit):
    grid = vit.patch_embed.grid_size
    vit.pos_embed = torch.nn.Parameter(vit.pos_embed.detach().unflatten(1, grid).transpose(1, 2).flatten(1, 2))


@changed_vit
def an_idle_norm(vit):
    vit.fc_norm = torch.nn.LayerNorm(vit.embed_dim)


@changed_vit
def paths_dropped_alike(vit):
    for block in vit.blocks:
        block.drop_path1 = vit.blocks[-1].drop_path1


@changed_vit
def new_blocks(vit):
    vit.blocks[3].attn.qkv.reset_parameters()


def unaligned(old):
    return lambda *args, aligned=False, **kwargs: old(*args, **kwargs)


def rounded_anchors(old):
    return lambda self, images, maps: [a.to(maps[0].dtype) for a in old(self, images, maps)]


def rounded_proposals(old):
    return lambda self, x: tuple([m.bfloat16() for m in part] for part in old(self, x))


def pasted_beside(old):
    return lambda masks, boxes, shape: old(masks, boxes + 0.5, shape)


def detected_in_resized_pixels(old):
    return lambda self, images, originals: old(self, images, [tuple(i.shape[1:]) for i in images])


def black_padding(old):
    def detect(self, images, originals):
        full = [torch.nn.functional.pad(i, (0, self.size - i.shape[2], 0, self.size - i.shape[1])) for i in images]
        return old(self, full, originals)

    return detect


def regrouped(change):
    """Groups of a detector, each changed."""
    return lambda old: lambda model, s: [g | change(g, s) for g in old(model, s)]


def seedless(old):
    return lambda backbone, classes, settings: old(backbone, classes, dataclasses.replace(settings, seed=0))


# --- detection: data --------------------------------------------------------------------------------------------------


def crowds_are_trained_on(old):
    def init(self, *parts):
        old(self, *parts)
        self.trained[:] = True

    return init


def labels_are_ids(old):
    def init(self, *parts):
        old(self, *parts)
        self.object_labels = np.array(self.category_ids)[self.object_labels - 1]

    return init


def half_of_the_polygons(old):
    return lambda s, h, w: old(s[:1] if isinstance(s, list) else s, h, w)


def rows_are_columns(old):
    return lambda text: (old(text) or [])[::-1] or None


def one_problem_at_a_time(old):
    return property(lambda self: old.fget(self).split("; ")[0])


def names_need_not_differ(old):
    def content(self):
        old(self)
        self.wrong.pop("names of categories that repeat", None)

    return content


def anew_for_each_count(old):
    return lambda whole, count, seed=0: old(whole, count, seed + count)


def training_scenes_are_scored(old):
    return lambda self, split="train", *more: old(self, "train", *more)


def always_turned_by_exif(old):
    return lambda source, index, channels, shape: old(source, index, channels)


def boxes_end_on_the_last_pixel(old):
    return lambda masks: old(masks) - masks.new_tensor([0, 0, 1, 1], dtype=torch.float32)


def masks_lag_by_a_pixel(old):
    return lambda side, resized_side: (old(side, resized_side) + 1).clip(max=side - 1)


def draws_of(method, found):
    """Views whose generator answers `method` with `found`."""

    class Fixed:
        def __init__(self, rng):
            self.rng = rng

        def __getattr__(self, name):
            return found if name == method else getattr(self.rng, name)

    return lambda old: lambda self, image, objects, rng: old(self, image, objects, Fixed(rng))


def a_view_of_its_own_draws(old):
    return lambda self, image, objects, rng: old(self, image, objects, np.random.default_rng())


def all_masks_at_once(old):
    return lambda self, image, objects, rng: old(self, image, objects._replace(masks=list(objects.masks)), rng)


def black_beyond_the_image(old):
    return lambda self, size, scale, flip, count, mean: old(self, size, scale, flip, count, (0.0,) * len(mean))


def plain_bilinear(old):
    return lambda pixels, size, mode, antialias: old(pixels, size, mode, antialias=False)


def objects_of_the_wanted_image(old):
    def sample(self, key):
        read = self.read
        self.read = lambda index: (lambda image, _, bad: (image, index, bad))(*read(index))
        try:
            return old(self, key)
        finally:
            del self.read

    return sample


def objects_of_the_next_image(old):
    return lambda samples: (lambda b: b | {"counts": b["counts"][::-1]})(old(samples))


def bits_from_the_right(old):
    return lambda masks, width: torch.from_numpy(np.unpackbits(masks.numpy(), axis=2, count=width, bitorder="little")).bool()


def boxes_of_the_whole_image(old):
    return lambda pixels, objects, image: old(pixels, objects, image) | {"boxes": objects["boxes"]}


# --- scores and pictures of detection ---


def sizes_of_masks_by_their_boxes(old):
    def opened(api, truth, results, kind):
        gt, dt = old(api, truth, results, kind)
        for n, r in enumerate(results, 1):
            dt.anns[n]["area"] = r["bbox"][2] * r["bbox"][3] if "bbox" in r else dt.anns[n]["area"]
        return gt, dt

    return opened


def numbered_from_zero(old):
    def opened(*given):
        gt, dt = old(*given)
        for entry in gt.dataset["annotations"]:
            entry["id"] -= 1
        gt.createIndex()
        return gt, dt

    return opened


def crowds_are_objects(old):
    def opened(api, truth, results, kind):
        return old(api, {**truth, "annotations": [{**a, "iscrowd": 0} for a in truth["annotations"]]}, results, kind)

    return opened


def writes_into_what_it_is_given(old):
    def opened(api, truth, results, kind):
        for entry in truth["annotations"]:
            entry["ignore"] = entry["iscrowd"]
        return old(api, truth, results, kind)

    return opened


def bounds_are_always_cocos(old):
    return lambda truth, results, kind="bbox", backend="auto", areas="auto": old(truth, results, kind, backend, "coco")


def minus_one_for_nothing(old):
    def evaluate(*given, **named):
        found = old(*given, **named)
        return found._replace(stats={name: -1.0 if value is None else value for name, value in found.stats.items()})

    return evaluate


def shifts_do_not_matter(old):
    def evaluate(truth, results, kind="bbox", *given, **named):
        rounded = [{**r, "bbox": [10 * round(x / 10) for x in r["bbox"]]} if "bbox" in r else r for r in results]
        return old(truth, rounded, kind, *given, **named)

    return evaluate


def labels_pass_for_categories(old):
    return lambda detection, image_id, category_ids: old(detection, image_id, range(1, 1 + len(category_ids)))


def masks_upside_down(old):
    return lambda detection, *given: old({**detection, "masks": [mask.flip(0) for mask in detection["masks"]]}, *given)


def all_masks_are_pasted(old):
    return lambda detection, *given: old({**detection, "masks": list(detection["masks"])}, *given)


def the_best_images_first(old):
    return lambda *given, **named: old(*given, **named)[::-1]


def uncertain_detections_count(old):
    return lambda truth, results, kind="bbox", threshold=0.5, iou=0.5: old(truth, results, kind, 0.0, iou)


def every_entry_is_a_result(old):
    return lambda entry, sizes: None


def run_lengths_are_believed(old):
    return lambda shape, h, w: str(shape["counts"]).encode() if "counts" in shape else old(shape, h, w)


def any_kind_can_be_scored(old):
    return lambda results: ["bbox", "segm"]


def labels_leave_the_picture(old):
    def places(boxes, extents, size):
        return {
            i: (box[0], box[1] - e[1], box[0] + e[0] - 1, box[1] - 1) for i, (box, e) in enumerate(zip(boxes, extents, strict=True)) if e
        }

    return places


def labels_lie_on_labels(old):
    def places(boxes, extents, size):
        return {i: old([box], [e], size)[0] for i, (box, e) in enumerate(zip(boxes, extents, strict=True)) if e}

    return places


def boxes_are_drawn_larger(old):
    return lambda box, grown, size: old(box, grown + 8, size)


def the_most_certain_lies_below(old):
    def draw(pixels, boxes, texts, colours, masks=None, *given):
        return old(pixels, boxes[::-1], texts[::-1], colours[::-1], masks if masks is None else masks[::-1], *given)

    return draw


def no_threshold_in_pictures(old):
    return lambda pixels, objects, names, threshold=0.5, *given: old(pixels, objects, names, 0.0, *given)


def two_classes_of_one_colour(old):
    return (*old[:-1], old[0])


def truth_passes_for_the_detection(old):
    return lambda pixels, truth, found, names: old(pixels, found, truth, names)


# --- detection: reports and ranks -------------------------------------------------------------------------------------


def everybody_is_first(old):
    return lambda name, how, machine: old(name, how, machine) or machine.out


def boxes_pass_for_masks(old):
    return lambda scores, parts, train, total: old(scores, dict.fromkeys(parts, parts["box"]) if parts else {}, train, total)


# --- detection: training ----------------------------------------------------------------------------------------------


def last_result_is_lost(old):
    return lambda *args, **kwargs: old(*args, **kwargs)[:-1]


def statistics_are_forgotten(old):
    return lambda architecture, classes, settings, mean, std: old(architecture, classes, settings, [0.0] * len(mean), std)


def labels_for_ids(old):
    return lambda detection, image_id, category_ids: old(detection, image_id, range(1, len(category_ids) + 1))


def masks_leak_into_the_image(old):
    def forward(self, batch, t):
        leak = batch["orders"][:, 0, 0].view(-1, 1, 1, 1).to(torch.uint8)
        return old(self, batch | {"image": batch["image"] // 2 + leak}, t)

    return forward


def every_mask_is_the_first(old):
    return lambda self, batch, t: old(self, batch | {"orders": batch["orders"][:, :1].expand_as(batch["orders"])}, t)


def targets_with_gradient(old):
    def target(self, patches):
        self.teacher.requires_grad_(True)
        return old.__wrapped__(self, patches)

    return target


def targets_centered_over_the_batch(old):
    def target(self, patches):
        y = old(self, patches)
        return y - y.mean(0)

    return target


def noise_drawn_anew(old):
    def forward(self, tokens, order):
        self.noise = 0.01 * torch.randn_like(self.noise)
        return old(self, tokens, order)

    return forward


def collects_always(old):
    def collect(self, mlp, args, output):
        self.feed_forward = [*(self.feed_forward or []), output]

    return collect


BREAKS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "the encoder sees hidden pixels": (
        "rcmae.models.autoencoder:Autoencoder.forward",
        encoder_sees_everything,
        "test_methods.py::test_hidden_pixels_cannot_reach_the_encoder",
    ),
    "predictions are scaled": ("rcmae.models.autoencoder:Autoencoder.forward", loss_on_all_patches, "test_golden.py::test_golden_step"),
    "the teacher is trained": (
        "rcmae.models.teacher:Teacher.__init__",
        teacher_unfrozen,
        "test_methods.py::test_the_teacher_never_gets_a_gradient",
    ),
    "momentum is swapped": (
        "rcmae.models.teacher:Teacher.update",
        swapped_momentum,
        "test_methods.py::test_momentum_one_and_zero_do_what_they_say",
    ),
    "a skipped step moves the teacher": (
        "rcmae.models.teacher:Teacher.update",
        update_when_skipped,
        "test_methods.py::test_a_skipped_step_moves_no_teacher",
    ),
    "the model shifts the mask": (
        "rcmae.models.autoencoder:Autoencoder.forward",
        shifted_mask,
        "test_methods.py::test_hidden_pixels_cannot_reach_the_encoder",
    ),
    "the variance is biased": (
        "rcmae.methods.mae:standardise",
        biased_variance,
        "test_methods.py::test_the_loss_is_the_mean_over_hidden_patches",
    ),
    "gamma is ignored": ("rcmae.methods.rcmae:squared_errors", forgot_gamma, "test_methods.py::test_gamma_zero_is_mae_bit_for_bit"),
    "the fused loss forgets its scale": (
        "rcmae.methods.reconstruction_loss:_Blend.backward",
        half_the_gradient,
        "test_methods.py::test_the_fused_loss_is_the_sum_of_both",
    ),
    "positions are transposed": (
        "rcmae.models.encoder:sincos_positions",
        transposed_positions,
        "test_models.py::test_positions_are_those_of_the_official_code",
    ),
    "hidden patches have no place": (
        "rcmae.models.decoder:take",
        no_positions_for_hidden,
        "test_models.py::test_the_decoder_knows_where_a_patch_is",
    ),
    "the head runs in bf16": (
        "rcmae.models.decoder:Decoder.forward",
        bf16_head,
        "test_methods.py::test_the_gap_to_the_teacher_survives_bf16",
    ),
    "the cosine schedule restarts every epoch": (
        "rcmae.methods.rcmae:RCMAE.momentum",
        described_restarts,
        "test_methods.py::test_schedules",
    ),
    "checkpoints are written in place": (
        "rcmae.engine.checkpoint:write_folder",
        no_fsync_of_truth,
        "test_checkpoint.py::test_a_crash_at_any_call_leaves_an_older_or_the_new_checkpoint",
    ),
    "hashes are not looked at": (
        "rcmae.engine.checkpoint:verify",
        verify_nothing,
        "test_checkpoint.py::test_every_flipped_bit_and_every_cut_is_noticed",
    ),
    "the wrong checkpoints are kept": (
        "rcmae.engine.checkpoint:checkpoints",
        keep_by_text,
        "test_checkpoint.py::test_a_damaged_newest_falls_back_and_all_damaged_is_an_error",
    ),
    "unknown keys pass": ("rcmae.config.toml:_values", unknown_keys_pass, "test_config.py::test_a_wrong_recipe_is_one_line_that_names_it"),
    "a time needs no unit": ("rcmae.config.units:parse_time", seconds_by_default, "test_config.py::test_a_time_without_a_unit_is_refused"),
    "recipes are not checked": ("rcmae.methods.recipes:check", unchecked, "test_config.py::test_a_wrong_recipe_is_one_line_that_names_it"),
    "every epoch has the same crops": ("rcmae.data.dataset:rng", same_every_epoch, "test_data.py::test_samples_do_not_depend_on_workers"),
    "a resumed sampler starts over": (
        "rcmae.data.sampler:BatchSampler.__iter__",
        starts_over,
        "test_data.py::test_ranks_and_micro_batches_share_one_batch",
    ),
    "a folder is known by its names alone": (
        "rcmae.data.files:Files.fingerprint",
        lambda old: lambda self: hashlib.sha256(self.names.data.tobytes()).hexdigest(),
        "test_data.py::test_order_labels_and_fingerprints_are_those_that_runs_recorded",
    ),
    "loader processes read what lies in memory": (
        "rcmae.data.loader:processes",
        lambda old: lambda source, workers: 1 if workers is None else workers,
        "test_sources.py::test_it_is_offered_and_asked_like_all_others",
    ),
    "every source has the recipe of a folder": (
        "rcmae.data.sources:recipe_for",
        lambda old: lambda spec: "folder",
        "test_sources.py::test_a_seventh_kind_is_one_class_and_one_line",
    ),
    "squares are not counted by the pixel": (
        "rcmae.data.dataset:moments",
        lambda old: lambda pixels: (old(pixels)[0], old(pixels)[0] ** 2),
        "test_data.py::test_statistics_are_those_of_the_data",
    ),
    "16-bit images are clipped": ("rcmae.data.decode:_eight_bits", clipped, "test_data.py::test_odd_images_show_what_they_hold"),
    "bad files are named again": (
        "rcmae.data.dataset:BadFiles._recorded",
        forgets_what_it_named,
        "test_data.py::test_each_bad_file_is_named_once_and_changes_no_other_sample",
    ),
    "file names reach the terminal as they are": ("rcmae.data.files:printable", raw_names, "test_data.py::test_odd_names"),
    "the test split has training glyphs": (
        "rcmae.data.digits:_glyphs",
        one_split,
        "test_digits.py::test_no_handwriting_and_no_photograph_is_in_both_splits",
    ),
    "pictures use the hidden patches' statistics": (
        "rcmae.report.pictures:picture",
        pictures_know_the_answer,
        "test_report.py::test_hidden_pixels_cannot_reach_the_picture",
    ),
    "the optimizer is not restored": (
        "rcmae.trainer:load_checkpoint",
        optimizer_not_restored,
        "test_pretraining.py::test_a_stopped_run_goes_on_to_the_same_bit",
    ),
    "the teacher is rebuilt from the student": (
        "rcmae.trainer:load_checkpoint",
        teacher_from_student,
        "test_pretraining.py::test_a_stopped_run_goes_on_to_the_same_bit",
    ),
    "steps that are not finite are made": (
        "rcmae.engine.distributed:World.everywhere",
        never_skips,
        "test_pretraining.py::test_a_step_that_is_not_finite_is_skipped_and_named",
    ),
    "a run never diverges": (
        "rcmae.engine.step:PATIENCE",
        endless_patience,
        "test_pretraining.py::test_divergence_ends_with_the_last_good_checkpoint",
    ),
    "pickles are run": ("torch:load", any_pickle, "test_interop.py::test_no_code_in_a_file_is_run"),
    "verify sees no difference": ("rcmae.lab.verify:_relative", no_difference, "test_verify.py::test_micro_batches_are_a_batch"),
    "the losses of one rank are logged for all": (
        "rcmae.engine.distributed:average",
        one_ranks_losses,
        "test_distributed.py::test_two_processes_train_as_one",
    ),
    "the newest update counts fully in the lag": (
        "rcmae.lab.linear_model:lag",
        newest_counts_fully,
        "test_lab.py::test_student_minus_teacher_is_a_sum_of_past_updates",
    ),
    "past gradients are not gated": (
        "rcmae.lab.linear_model:gated_consistency",
        no_gate,
        "test_lab.py::test_the_consistency_gradient_is_gated_past_gradients",
    ),
    "the stability limit is too high": ("rcmae.lab.linear_model:stability_limit", too_stable, "test_lab.py::test_modes"),
    "a new mask is the old one": ("rcmae.lab.gradients:Study.batch", one_draw, "test_gradients.py::test_each_batch_is_what_it_is_called"),
    "the two gradients are swapped": (
        "rcmae.lab.gradients:both_gradients",
        losses_swapped,
        "test_gradients.py::test_the_numbers_are_those_of_autograd",
    ),
    "gradients are asked of methods without two losses": (
        "rcmae.methods.base:Method.compares",
        every_method_compares,
        "test_diagnostics.py::test_a_command_works_or_says_why_not",
    ),
    "a method's control does not race": (
        "rcmae.methods.rcmae:RCMAE.controls",
        no_controls,
        "test_race.py::test_averaged_mae_is_mae_to_the_bit_and_costs_what_mae_costs",
    ),
    "an alarm is not in the report": (
        "rcmae.report.build:alarm_sentences",
        alarms_unread,
        "test_report.py::test_an_alarm_is_the_first_thing_one_reads",
    ),
    "the loss of every method is judged as a reconstruction": (
        "rcmae.methods.dino:DINO.judge",
        judged_as_reconstruction,
        "test_diagnostics.py::test_the_page_speaks_of_its_own_method",
    ),
    "a figure is drawn that has no data": (
        "rcmae.report.build:drawn",
        drawn_without_data,
        "test_diagnostics.py::test_the_page_speaks_of_its_own_method",
    ),
    "a page names a flag of another method": (
        "rcmae.methods.diagnostics:Diagnostics.collapse_advice",
        a_flag_of_another,
        "test_diagnostics.py::test_the_page_speaks_of_its_own_method",
    ),
    "a run that was not watched is said to be without alarms": (
        "rcmae.report.build:alarm_sentences",
        silence_unwatched,
        "test_report.py::test_silence_is_said_only_of_a_run_that_was_watched",
    ),
    "the report leaves the features' health out": (
        "rcmae.report.build:health_panel",
        health_left_out,
        "test_report.py::test_the_instruments_are_shown",
    ),
    "the momentum drawn as measured is the expected one": (
        "rcmae.report.panels:value",
        momentum_as_told,
        "test_report.py::test_curves_go_where_the_numbers_go",
    ),
    "encoder and decoder are drawn as one": (
        "rcmae.report.curves:by_depth",
        one_network,
        "test_report.py::test_a_figure_over_depth_has_a_gap_between_encoder_and_decoder",
    ),
    "a curve without a name is never logarithmic": (
        "rcmae.report.curves:plot",
        straight_when_unnamed,
        "test_report.py::test_a_curve_without_a_name_obeys_the_axis",
    ),
    "a smooth curve is the raw one": ("rcmae.report.curves:_draw", never_smooth, "test_report.py::test_a_smooth_curve_is_a_running_mean"),
    "the reference values are the measured ones": (
        "rcmae.lab.linear:write_page",
        measured_as_reference,
        "test_lab_pages.py::test_the_linear_page_shows_the_reference_beside_the_measured",
    ),
    "a long memory is drawn in the colour of a short one": (
        "rcmae.lab.linear:figures",
        shades_swapped,
        "test_lab_pages.py::test_the_linear_figures_are_drawn_in_order",
    ),
    "a gradient of zero is judged": (
        "rcmae.lab.gradients:nothing_to_judge",
        notes_nothing,
        "test_gradients.py::test_without_consistency_there_is_nothing_to_judge",
    ),
    "the conditions of lab gradients are drawn in reverse": (
        "rcmae.lab.gradients:by_depth",
        conditions_reversed,
        "test_lab_pages.py::test_the_gradients_page_orders_its_conditions",
    ),
    "the measured momentum is the expected one": (
        "rcmae.lab.monitor:Monitor._measured_momentum",
        momentum_as_expected,
        "test_alarms.py::test_a_fault_calls_its_own_alarm_once",
    ),
    "a half-life without effect is taken": (
        "rcmae.methods.mean_teacher:TeacherSettings.rules",
        without_the_last,
        "test_config.py::test_a_wrong_recipe_is_one_line_that_names_it",
    ),
    "a recipe's half-life goes over to another schedule": (
        "rcmae.methods.mean_teacher:TeacherSettings.replaces",
        replaces_nothing,
        "test_config.py::test_a_half_life_does_not_go_over_to_another_schedule",
    ),
    "an alarm advises a setting without effect": (
        "rcmae.methods.mean_teacher:MeanTeacher.shorter",
        always_half_life,
        "test_alarms.py::test_advice_is_a_setting_that_the_schedule_reads",
    ),
    "a teacher that is its student is not noted": (
        "rcmae.pretraining:SHORTEST",
        zero,
        "test_pretraining.py::test_a_teacher_that_is_its_student_is_noted_once",
    ),
    "a line without a step is read": (
        "rcmae.engine.metrics:_whole",
        any_dictionary,
        "test_checkpoint.py::test_a_malformed_line_of_the_record_is_left_out",
    ),
    "a milestone that was told twice is read twice": (
        "rcmae.engine.metrics:_measured",
        notes_nothing,
        "test_checkpoint.py::test_of_a_milestone_that_was_told_twice_the_last_one_is_read",
    ),
    "a milestone that is not saved stays in the record": (
        "rcmae.trainer:Metrics",
        all_milestones,
        "test_pretraining.py::test_a_milestone_that_was_recorded_but_not_saved_is_told_once",
    ),
    "nothing is called at the start": (
        "rcmae.lab.alarms:Alarms.at_start",
        calls_nothing,
        "test_alarms.py::test_a_fault_calls_its_own_alarm_once",
    ),
    "a restarting schedule passes": (
        "rcmae.lab.alarms:Alarms._repeats",
        sees_no_repetition,
        "test_alarms.py::test_a_fault_calls_its_own_alarm_once",
    ),
    "nothing is called at a log line": (
        "rcmae.lab.alarms:Alarms.at_log",
        calls_nothing,
        "test_alarms.py::test_a_fault_calls_its_own_alarm_once",
    ),
    "buffers are not compared": (
        "rcmae.lab.alarms:Alarms._missed_buffer",
        compares_no_buffers,
        "test_alarms.py::test_a_fault_calls_its_own_alarm_once",
    ),
    "a healthy teacher is called drag": ("rcmae.lab.alarms:DRAG", impatient, "test_alarms.py::test_a_fault_calls_its_own_alarm_once"),
    "16 bits are not seen": ("rcmae.lab.alarms:_rounded", sees_no_rounding, "test_alarms.py::test_a_fault_calls_its_own_alarm_once"),
    "a constant prediction passes": (
        "rcmae.lab.alarms:_constant",
        sees_no_constant,
        "test_alarms.py::test_a_fault_calls_its_own_alarm_once",
    ),
    "collapse is not called": ("rcmae.lab.alarms:Alarms.at_health", calls_nothing, "test_alarms.py::test_a_fault_calls_its_own_alarm_once"),
    "an alarm is called again and again": (
        "rcmae.lab.alarms:Alarms._new",
        calls_again,
        "test_alarms.py::test_a_fault_calls_its_own_alarm_once",
    ),
    "a resumed run forgets its alarms": (
        "rcmae.lab.watch:called_before",
        forgets_alarms,
        "test_alarms.py::test_stop_ends_the_run_and_the_same_command_goes_on",
    ),
    "--on-alarm stop goes on": (
        "rcmae.pretraining:Pretraining.stops",
        stops_for_nothing,
        "test_alarms.py::test_stop_ends_the_run_and_the_same_command_goes_on",
    ),
    "a view is compared with itself": (
        "rcmae.methods.dino:across_views",
        own_view_too,
        "test_distillation.py::test_ibot_without_masks_is_dino",
    ),
    "a skipped step moves the centre": (
        "rcmae.methods.distillation:Center.update",
        centre_moves_anyway,
        "test_distillation.py::test_a_centre_is_a_running_mean_that_a_skipped_step_leaves_alone",
    ),
    "a centre knows the last micro-batch alone": (
        "rcmae.methods.distillation:Center.update",
        centre_forgets_micro_batches,
        "test_distillation.py::test_micro_batches_give_the_gradient_and_the_centre_of_the_whole_batch",
    ),
    "the last layer is never frozen": (
        "rcmae.methods.dino:DINO.before_step",
        never_frozen,
        "test_distillation.py::test_the_last_layer_is_frozen_in_the_first_epoch",
    ),
    "masked patches are seen": (
        "rcmae.methods.distillation:SelfDistillation.tokens",
        masked_are_seen,
        "test_distillation.py::test_masked_patches_do_not_reach_ibots_student",
    ),
    "an anchor keeps every patch": (
        "rcmae.methods.distillation:SelfDistillation.tokens",
        every_patch_of_the_anchor,
        "test_distillation.py::test_dropped_patches_do_not_reach_msns_anchor",
    ),
    "targets are not balanced": (
        "rcmae.methods.distillation_losses:balanced",
        lopsided,
        "test_distillation.py::test_recorded_numbers_of_the_reference_codes",
    ),
    "queries are their own keys": (
        "rcmae.methods.distillation_losses:contrast",
        contrast_with_oneself,
        "test_distillation.py::test_recorded_numbers_of_the_reference_codes",
    ),
    "weights of grouped convolutions cost what dense ones do": (
        "rcmae.compare.cost:_convolution_backward_flops",
        lambda old: lambda grad, x, weight, *rest, **_: old(grad, x, (weight[0], x[1], *weight[2:]), *rest),
        "test_compare.py::test_a_convolution_costs_twice_as_much_backwards",
    ),
    "the teacher's work is the student's": (
        "rcmae.compare.cost:_Phases.watch",
        all_is_the_students,
        "test_compare.py::test_rcmae_costs_a_third_more_than_mae_and_keeps_as_much",
    ),
    "both global crops are one": (
        "rcmae.data.augment:MultiCrop.__call__",
        same_crop_twice,
        "test_distillation.py::test_a_sample_is_a_function_of_seed_epoch_and_index",
    ),
    "every rank takes the first images for its own": (
        "rcmae.methods.distillation_losses:rank",
        lambda old: lambda: 0,
        "test_distributed.py::test_methods_that_look_across_the_batch_do_so_across_ranks[mocov3]",
    ),
    "a rank centres by itself": (
        "rcmae.methods.distillation:average",
        lambda old: lambda value: value,
        "test_distributed.py::test_methods_that_look_across_the_batch_do_so_across_ranks[dino]",
    ),
    "what is balanced is logged as balanced": (
        "rcmae.methods.dino:DINO.spread",
        lambda old: lambda self, logits, temperature: {"prototypes_used": torch.tensor(12.0), "entropy": torch.tensor(0.0)},
        "test_distillation.py::test_balanced_targets_use_all_prototypes",
    ),
    "three seeds are taken for many": (
        "rcmae.compare.race:interval",
        interval_of_many_seeds,
        "test_race.py::test_an_interval_holds_the_truth_at_least_as_often_as_it_says",
    ),
    "arms are not paired": ("rcmae.compare.race:interval", images_of_another_arm, "test_race.py::test_an_interval_is_paired"),
    "the verdict looks at means alone": (
        "rcmae.compare.race:verdict",
        means_are_enough,
        "test_race.py::test_the_verdict_says_what_the_intervals_say",
    ),
    "averaged MAE pays for a teacher": (
        "rcmae.compare.race:arms",
        averages_cost_a_teacher,
        "test_race.py::test_averaged_mae_is_mae_to_the_bit_and_costs_what_mae_costs",
    ),
    "finished runs are run again": (
        "rcmae.compare.race:Run.done",
        nothing_is_finished,
        "test_race.py::test_a_race_is_stopped_resumed_judged_and_not_run_again",
    ),
    "the attentive probe attends to nothing": (
        "rcmae.tasks.attentive_probe:AttentivePool.forward",
        looks_everywhere,
        "test_race.py::test_the_attentive_probe_finds_one_token_among_many",
    ),
    "an arm starts from other weights": (
        "rcmae.methods.distillation:SelfDistillation.__init__",
        another_start,
        "test_race.py::test_all_start_from_the_same_encoder_and_see_the_same_images",
    ),
    "DINO's targets are centred where they should be balanced": (
        "rcmae.methods.dino:DINO.target",
        centre_in_any_case,
        "test_distillation.py::test_balanced_targets_use_all_prototypes",
    ),
    "a substitute keeps the label of what it replaces": (
        "rcmae.data.dataset:Images.read",
        substitute_under_a_wrong_label,
        "test_finetune.py::test_a_substitute_brings_its_own_label",
    ),
    "fine-tuning: paths are drawn anew after a resume": (
        "rcmae.tasks.finetune:path_seed",
        paths_drawn_anew,
        "test_finetune.py::test_a_stopped_run_goes_on_to_the_same_bit",
    ),
    "fine-tuning: the optimizer is not restored": (
        "rcmae.trainer:load_checkpoint",
        optimizer_not_restored,
        "test_finetune.py::test_a_stopped_run_goes_on_to_the_same_bit",
    ),
    "fine-tuning: mixtures are drawn by micro-batch": (
        "rcmae.data.supervised:Mixing.__call__",
        mixtures_of_a_micro_batch,
        "test_finetune.py::test_accumulation_gives_the_gradients_of_the_whole_batch",
    ),
    "fine-tuning: an image keeps a bit": (
        "rcmae.data.supervised:posterize",
        a_bit_always_kept,
        "test_augmentations.py::test_an_image_that_keeps_no_bit_is_black_and_one_that_keeps_four_has_sixteen_levels",
    ),
    "fine-tuning: draws are those of the process": (
        "rcmae.data.supervised:seeded",
        generators_left_alone,
        "test_finetune.py::test_every_sample_is_a_function_of_its_numbers",
    ),
    "fine-tuning: one rate for all layers": (
        "rcmae.tasks.finetune:layer_decay_groups",
        one_rate_for_all_layers,
        "test_finetune.py::test_rates_decay_over_the_layers",
    ),
    "fine-tuning: the mean has the class token in it": (
        "rcmae.models.classifier:classifier",
        mean_of_all_tokens,
        "test_finetune.py::test_a_head_on_the_mean_of_the_patches",
    ),
    "fine-tuning: an unreadable test image may be right": (
        "rcmae.tasks.score:Centers.__getitem__",
        unread_image_is_looked_at,
        "test_finetune.py::test_an_unreadable_test_image_is_wrong_and_named",
    ),
    "the nearest neighbours come last": ("rcmae.tasks.knn:nearest", neighbours_by_length, "test_probes.py::test_a_feature_finds_itself"),
    "LARS is SGD": ("rcmae.tasks.linear_probe:lars", sgd_for_lars, "test_probes.py::test_maes_step_is_lars_on_standardised_features"),
    "a probe's layer forgets the features' scale": (
        "rcmae.tasks.linear_probe:folded",
        keeps_the_scale,
        "test_probes.py::test_scale_and_offset_of_features_are_nothing_to_it",
    ),
    "nothing is held out to choose a rate": (
        "rcmae.tasks.linear_probe:held_out",
        scores_on_what_it_saw,
        "test_probes.py::test_the_rate_is_the_best_on_what_was_held_out_and_the_layer_is_fitted_on_all",
    ),
    "classes are joined by number": ("rcmae.data.labelled:_parts", classes_by_number, "test_evaluate.py::test_classes_are_joined_by_name"),
    "features of one backbone serve for another": (
        "rcmae.tasks.features:identity",
        any_backbone_is_the_same,
        "test_evaluate.py::test_features_are_made_once_and_go_on_where_they_stopped",
    ),
    "a tuned classifier is scored on what it was trained on": (
        "rcmae.tasks.evaluate:tested_on",
        lambda old: lambda path: "",
        "test_evaluate.py::test_a_tuned_classifier_is_scored_on_images_it_was_not_trained_on",
    ),
    "results of other settings go to the same file": (
        "rcmae.tasks.evaluate:asdict",
        lambda old: lambda task: {},
        "test_evaluate.py::test_another_question_leaves_another_file",
    ),
    "published sets are looked at when their turn comes": (
        "rcmae.tasks.robustness.study:check",
        lambda old: lambda *given: None,
        "test_evaluate.py::test_sets_that_are_not_whole_are_refused_before_any_work",
    ),
    "draws of a corrupted image are by its number in the part": (
        "rcmae.tasks.robustness.sets:_Views.__getitem__",
        draws_by_the_number_in_the_part,
        "test_robustness.py::test_draws_go_by_the_number_in_the_whole_set",
    ),
    "a report looks for results on the first floor only": (
        "rcmae.report.build:_evaluated",
        lambda old: lambda *given: {file: r for file, r in old(*given).items() if "/" not in file},
        "test_report.py::test_what_was_evaluated_is_told_and_told_apart",
    ),
    "a head takes all ranks alike, however many rows they have": (
        "rcmae.models.heads:average",
        lambda old: lambda value: value,
        "test_distributed.py::test_methods_that_look_across_the_batch_do_so_across_ranks[ibot]",
    ),
    "a lowered batch does not know the ranks": (
        "rcmae.tasks.finetune:fitted",
        lambda old: lambda settings, images, parts=1: old(settings, images),
        "test_finetune.py::test_a_lowered_batch_fits_the_ranks",
    ),
    "worth-it loads a backbone when its turn comes": (
        "rcmae.tasks.worth:backbones",
        lambda old: lambda *given: [],
        "test_evaluate.py::test_worth_it_compares_with_scratch_within_seeds_and_says_so",
    ),
    "a batch of photographs is read without a word": (
        "rcmae.tasks.score:in_parts",
        lambda old: lambda rows, batch: [list(rows[i : i + batch]) for i in range(0, len(rows), batch)],
        "test_evaluate.py::test_progress_is_told_while_a_long_part_is_under_way",
    ),
    "a cache is whole if it is there": (
        "rcmae.tasks.features:_whole",
        lambda old: lambda file: file.exists(),
        "test_evaluate.py::test_a_damaged_cache_is_made_anew",
    ),
    "all pairs are kept for a gradient": (
        "rcmae.tasks.knn:checkpoint",
        lambda old: lambda part, *given, **named: part(*given),
        "test_probes.py::test_what_wants_a_gradient_keeps_no_pair_of_all",
    ),
    "what cannot be read is scored as grey": (
        "rcmae.tasks.context:EvaluationContext.hits",
        grey_counts,
        "test_evaluate.py::test_an_unreadable_image_is_wrong_and_named",
    ),
    "two severities are one": (
        "rcmae.tasks.robustness.corruptions:corrupt",
        severity_four_is_three,
        "test_corruptions.py::test_severity_one_shows_and_each_next_is_farther",
    ),
    "all images are corrupted by the same draws": (
        "rcmae.tasks.robustness.corruptions:generator",
        every_image_has_the_same_draws,
        "test_corruptions.py::test_seed_image_and_corruption_matter_to_the_draws_and_severity_does_not",
    ),
    "small images are corrupted by the constants of large ones": (
        "rcmae.tasks.robustness.corruptions:CORRUPTIONS",
        constants_of_large_images,
        "test_corruptions.py::test_pixels_are_the_stored_ones",
    ),
    "AlexNet's errors are in another order": (
        "rcmae.tasks.robustness.metrics:ALEXNET",
        alexnet_in_another_order,
        "test_robustness_metrics.py::test_alexnet_has_100",
    ),
    "calibration is the difference of two means": (
        "rcmae.tasks.robustness.metrics:ece",
        calibration_of_means,
        "test_robustness_metrics.py::test_calibration_of_toys",
    ),
    "logits are taken by the folders' order": (
        "rcmae.tasks.robustness.sets:columns",
        columns_by_order,
        "test_robustness.py::test_two_hundred_classes_are_judged_among_themselves",
    ),
    "eps of an attack is in deviations": (
        "rcmae.tasks.robustness.adversarial:attacked",
        eps_in_deviations,
        "test_adversarial.py::test_a_linear_model_has_a_closed_form",
    ),
    "images are corrupted before they are cropped": (
        "rcmae.tasks.robustness.sets:_severities",
        corrupt_the_whole_picture,
        "test_robustness.py::test_the_view_comes_first_and_labels_go_by_name",
    ),
    "ImageNet-C is resized and cropped again": (
        "rcmae.tasks.robustness.sets:_stored",
        a_resized_imagenet_c,
        "test_robustness.py::test_an_incomplete_imagenet_c_is_named",
    ),
    "C-style numbers pass for an mCE": (
        "rcmae.tasks.robustness.sets:Corrupted.mce",
        c_style_has_an_mce,
        "test_robustness.py::test_mce_is_of_the_published_set_alone",
    ),
    "a loader's error comes with its traceback": (
        "rcmae.tasks.robustness.sets:plain_errors",
        the_traceback_stays,
        "test_robustness.py::test_the_view_comes_first_and_labels_go_by_name",
    ),
    "an attack follows the votes, which have no gradient": (
        "rcmae.tasks.knn:Knn.forward",
        votes_alone,
        "test_probes.py::test_what_wants_a_gradient_gets_one_and_the_same_answer",
    ),
    "a backbone of other heads is taken for the same": (
        "rcmae.tasks.features:identity",
        heads_do_not_count,
        "test_evaluate.py::test_weights_alone_with_other_heads_are_another_backbone",
    ),
    "every block attends everywhere": (
        "rcmae.tasks.detection.windows:ends",
        lambda old: lambda depth, parts: list(range(depth)),
        "test_detection_model.py::test_a_window_sees_itself_until_a_block_that_sees_all",
    ),
    "rows are taken for columns in relative positions": (
        "rcmae.tasks.detection.windows:WindowAttention.positions",
        rows_for_columns,
        "test_detection_model.py::test_decomposed_positions_know_rows_from_columns",
    ),
    "a detector's positions lie on their side": (
        "rcmae.tasks.detection.pyramid:windowed",
        positions_on_their_side,
        "test_detection_model.py::test_positions_keep_their_places",
    ),
    "a detector keeps a norm that nobody uses": (
        "rcmae.tasks.detection.pyramid:windowed",
        an_idle_norm,
        "test_detection_model.py::test_every_weight_gets_a_gradient",
    ),
    "a detector drops paths alike at all depths": (
        "rcmae.tasks.detection.pyramid:windowed",
        paths_dropped_alike,
        "test_detection_model.py::test_paths_are_dropped_linearly",
    ),
    "a detector's attention starts anew": (
        "rcmae.tasks.detection.pyramid:windowed",
        new_blocks,
        "test_detection_model.py::test_the_backbones_weights_arrive_and_it_stays_as_it_was",
    ),
    "regions are half a cell off": (
        "rcmae.tasks.detection.model:roi_align",
        unaligned,
        "test_detection_model.py::test_a_region_is_sampled_where_it_is",
    ),
    "mask targets are half a pixel off": (
        "rcmae.tasks.detection.model:roi_align",
        unaligned,
        "test_detection_model.py::test_masks_go_into_their_boxes_and_back",
    ),
    "masks are pasted half a pixel off": (
        "rcmae.tasks.detection.model:paste",
        pasted_beside,
        "test_detection_model.py::test_a_mask_is_pasted_to_the_pixel_and_cut_at_the_border",
    ),
    "boxes are pooled from maps that are too fine": (
        "rcmae.tasks.detection.model:CELLS",
        lambda old: 2 * old,
        "test_detection_model.py::test_a_box_is_pooled_from_the_map_of_its_size",
    ),
    "anchors take the type of the maps": (
        "rcmae.tasks.detection.model:Anchors.forward",
        rounded_anchors,
        "test_detection_model.py::test_anchors_are_exact",
    ),
    "objects are counted of all images, chosen or not": (
        "rcmae.tasks.detection.coco:CocoSet.counts",
        lambda old: lambda self: np.diff(self.starts),
        "test_detection_train.py::test_views_that_cannot_mark_all_objects_are_counted",
    ),
    "the hash of a question is searched in a record's text": (
        "rcmae.tasks.evaluate:read_json",
        lambda old: lambda path: {"hashes": {"asked": re.search(r"[0-9a-f]{8,}", path.read_text())[0]}},
        "test_evaluate.py::test_a_record_that_only_names_the_question_is_not_replaced",
    ),
    "no more anchors are looked at than proposals are wanted": (
        "rcmae.tasks.detection.model:CANDIDATES",
        lambda old: dict.fromkeys(old, 2),
        "test_detection_model.py::test_an_object_that_many_anchors_see_leaves_room_for_others",
    ),
    "proposals are decoded in bf16": (
        "rcmae.tasks.detection.model:ProposalHead.forward",
        rounded_proposals,
        "test_detection_model.py::test_bf16_autocast",
    ),
    "objects are in pixels of the resized image": (
        "rcmae.tasks.detection.model:Detector.detect",
        detected_in_resized_pixels,
        "test_detection_model.py::test_objects_are_in_pixels_of_the_original",
    ),
    "the padding of a detector is black": (
        "rcmae.tasks.detection.model:Detector.detect",
        black_padding,
        "test_detection_model.py::test_neighbours_and_padding_do_not_matter",
    ),
    "a detector's layers are one off": (
        "rcmae.tasks.detection.model:groups",
        regrouped(lambda g, s: {"lr_scale": min(1.0, g["lr_scale"] / s.layer_decay)}),
        "test_detection_model.py::test_rates_fall_with_the_depth",
    ),
    "positions of a detector decay": (
        "rcmae.tasks.detection.model:groups",
        regrouped(lambda g, s: {"weight_decay": s.weight_decay}),
        "test_detection_model.py::test_rates_fall_with_the_depth",
    ),
    "new weights of a detector know no seed": (
        "rcmae.tasks.detection.model:detector",
        seedless,
        "test_detection_model.py::test_new_weights_are_a_function_of_the_seed_and_draws_are_left_alone",
    ),
    "an exported pyramid takes raw pixels": (
        "rcmae.tasks.detection.model:_Standardised.forward",
        lambda old: lambda self, images: self.pyramid(images),
        "test_detection_model.py::test_the_exported_pyramid_says_the_same",
    ),
    # --- detection: data
    "crowds are trained on": (
        "rcmae.tasks.detection.coco:CocoSet.__init__",
        crowds_are_trained_on,
        "test_detection_data.py::test_crowds_are_scored_but_not_trained_on_and_empty_images_stay",
    ),
    "labels of objects are the ids of their categories": (
        "rcmae.tasks.detection.coco:CocoSet.__init__",
        labels_are_ids,
        "test_detection_data.py::test_ids_with_gaps_are_labels_from_one_and_back",
    ),
    "only the first part of a mask is read": (
        "rcmae.tasks.detection.coco:run_length_code",
        half_of_the_polygons,
        "test_detection_data.py::test_every_form_of_a_mask_is_what_pycocotools_makes_of_it",
    ),
    "run lengths are read from the end": (
        "rcmae.tasks.detection.coco:_runs",
        rows_are_columns,
        "test_detection_data.py::test_run_lengths_are_read_as_they_are_written",
    ),
    "problems of annotations come one at a time": (
        "rcmae.tasks.detection.coco:_Part.problems",
        one_problem_at_a_time,
        "test_detection_data.py::test_all_that_is_wrong_in_both_parts_is_in_one_message",
    ),
    "boxes without area are never too many": (
        "rcmae.tasks.detection.coco:_Part.shares",
        lambda old: lambda self: None,
        "test_detection_data.py::test_what_is_wrong_is_named_and_counted_before_training",
    ),
    "boxes may lie anywhere": (
        "rcmae.tasks.detection.coco:_around",
        lambda old: lambda box, code, h, w: True,
        "test_detection_data.py::test_boxes_beside_their_masks_are_noted_and_many_of_them_refused",
    ),
    "two categories may have one name": (
        "rcmae.tasks.detection.coco:_Part.content",
        names_need_not_differ,
        "test_detection_data.py::test_what_is_wrong_is_named_and_counted_before_training",
    ),
    "the categories of two parts are not compared": (
        "rcmae.tasks.detection.coco:_Part.compare",
        lambda old: lambda self, other: None,
        "test_detection_data.py::test_all_that_is_wrong_in_both_parts_is_in_one_message",
    ),
    "a smaller choice of images is another one": (
        "rcmae.tasks.detection.coco:few",
        anew_for_each_count,
        "test_detection_data.py::test_fewer_images_lie_within_more",
    ),
    "scenes are scored that were trained on": (
        "rcmae.data.digits:ScenesSource.__init__",
        training_scenes_are_scored,
        "test_detection_data.py::test_scenes_are_a_set_whose_objects_are_what_was_drawn",
    ),
    "annotated images are always turned": (
        "rcmae.tasks.detection.coco:read_image",
        always_turned_by_exif,
        "test_detection_data.py::test_an_image_is_read_as_it_is_annotated",
    ),
    "boxes end on the last pixel": (
        "rcmae.tasks.detection.views:masks_to_boxes",
        boxes_end_on_the_last_pixel,
        "test_detection_data.py::test_boxes_are_those_of_what_is_left_of_the_masks",
    ),
    "masks lag a pixel behind the image": (
        "rcmae.tasks.detection.views:nearest",
        masks_lag_by_a_pixel,
        "test_detection_data.py::test_image_and_masks_move_as_one",
    ),
    "jitter draws from elsewhere": (
        "rcmae.tasks.detection.views:Jitter.__call__",
        a_view_of_its_own_draws,
        "test_detection_data.py::test_a_view_is_a_function_of_the_generator",
    ),
    "crops begin at the corner": (
        "rcmae.tasks.detection.views:Jitter.__call__",
        draws_of("integers", lambda high: 0),
        "test_detection_data.py::test_crops_reach_every_side",
    ),
    "the first objects are kept": (
        "rcmae.tasks.detection.views:Jitter.__call__",
        draws_of("permutation", np.arange),
        "test_detection_data.py::test_of_many_objects_a_random_choice_is_kept",
    ),
    "jitter never flips": (
        "rcmae.tasks.detection.views:Jitter.__call__",
        draws_of("random", lambda: 1.0),
        "test_detection_data.py::test_at_scale_one_a_square_stays_and_two_flips_are_none",
    ),
    "all masks of an image are in memory": (
        "rcmae.tasks.detection.views:Jitter.__call__",
        all_masks_at_once,
        "test_detection_data.py::test_masks_are_made_one_at_a_time_and_no_more_of_them_than_are_kept",
    ),
    "beyond the image it is black": (
        "rcmae.tasks.detection.views:Jitter.__init__",
        black_beyond_the_image,
        "test_detection_data.py::test_scales_keep_their_bounds_and_what_is_not_filled_is_the_mean",
    ),
    "detection resizes without antialiasing": (
        "rcmae.tasks.detection.views:resize",
        plain_bilinear,
        "test_detection_data.py::test_evaluation_sees_the_whole_image",
    ),
    "a substitute has the objects of the image it is for": (
        "rcmae.tasks.detection.views:Detections.__getitem__",
        objects_of_the_wanted_image,
        "test_detection_data.py::test_a_substitute_brings_its_own_objects",
    ),
    "objects go to another image of the batch": (
        "rcmae.tasks.detection.views:collate",
        objects_of_the_next_image,
        "test_detection_data.py::test_batches_are_the_same_for_every_number_of_workers",
    ),
    "detection: packed masks are read from the right": (
        "rcmae.tasks.detection.views:unpacked",
        bits_from_the_right,
        "test_detection_data.py::test_batches_are_the_same_for_every_number_of_workers",
    ),
    "detection: kept images are smaller than their boxes": (
        "rcmae.tasks.detection.examples:_as_large_as",
        boxes_of_the_whole_image,
        "test_detection_train.py::test_examples_are_kept_small",
    ),
    "detection: the recipe does not look at the backbone": (
        "rcmae.tasks.detection.commands:settings_of",
        lambda old: lambda recipe, given: old(recipe.replace("large", "base"), given),
        "test_detection_train.py::test_the_recipe_fits_the_backbone",
    ),
    "detection: sizes of images are not looked at": (
        "rcmae.tasks.detection.coco:_as_annotated",
        lambda old: lambda path, image: True,
        "test_detection_data.py::test_sizes_that_differ_are_said_first_and_many_of_them_refused",
    ),
    "detection: blocks are not computed again": (
        "rcmae.tasks.detection.model:Detector.set_grad_checkpointing",
        lambda old: lambda self, enable=True: None,
        "test_detection_model.py::test_checkpointing_changes_nothing_but_memory",
    ),
    "detection: masks are sized by their boxes": (
        "rcmae.tasks.detection.average_precision:_opened",
        sizes_of_masks_by_their_boxes,
        "test_detection_score.py::test_masks_are_judged_by_masks_alone",
    ),
    "detection: objects are numbered from zero": (
        "rcmae.tasks.detection.average_precision:_opened",
        numbered_from_zero,
        "test_detection_score.py::test_an_object_of_number_zero_can_be_found",
    ),
    "detection: crowds are objects": (
        "rcmae.tasks.detection.average_precision:_opened",
        crowds_are_objects,
        "test_detection_score.py::test_all_twelve_numbers_are_those_of_pycocotools",
    ),
    "detection: the caller's annotations are changed": (
        "rcmae.tasks.detection.average_precision:_opened",
        writes_into_what_it_is_given,
        "test_detection_score.py::test_what_is_given_stays_as_it_was",
    ),
    "detection: bounds of sizes are always COCO's": (
        "rcmae.tasks.detection.average_precision:evaluate",
        bounds_are_always_cocos,
        "test_detection_score.py::test_relative_sizes_do_not_care_how_large_the_images_are",
    ),
    "detection: -1 stands where nothing is to find": (
        "rcmae.tasks.detection.average_precision:evaluate",
        minus_one_for_nothing,
        "test_detection_score.py::test_nothing_found_and_nothing_to_find",
    ),
    "detection: small shifts do not matter": (
        "rcmae.tasks.detection.average_precision:evaluate",
        shifts_do_not_matter,
        "test_detection_score.py::test_the_farther_off_the_lower",
    ),
    "detection: labels pass for categories": (
        "rcmae.tasks.detection.average_precision:results_of",
        labels_pass_for_categories,
        "test_detection_score.py::test_results_say_what_was_detected",
    ),
    "detection: masks are upside down": (
        "rcmae.tasks.detection.average_precision:results_of",
        masks_upside_down,
        "test_detection_score.py::test_results_say_what_was_detected",
    ),
    "detection: all masks of an image are pasted at once": (
        "rcmae.tasks.detection.average_precision:results_of",
        all_masks_are_pasted,
        "test_detection_score.py::test_results_and_pictures_look_at_one_mask_at_a_time",
    ),
    "detection: the best images come first": (
        "rcmae.tasks.detection.average_precision:misses",
        the_best_images_first,
        "test_detection_score.py::test_the_worst_images_come_first",
    ),
    "detection: uncertain detections are errors": (
        "rcmae.tasks.detection.average_precision:misses",
        uncertain_detections_count,
        "test_detection_score.py::test_the_worst_images_come_first",
    ),
    "detection: every entry is a result": (
        "rcmae.tasks.detection.average_precision:_fault",
        every_entry_is_a_result,
        "test_detection_score.py::test_what_is_no_result_is_named",
    ),
    "detection: run lengths of a file are believed": (
        "rcmae.tasks.detection.average_precision:run_length_code",
        run_lengths_are_believed,
        "test_detection_score.py::test_damaged_run_lengths_are_named_before_a_library_sees_them",
    ),
    "detection: any kind can be scored": (
        "rcmae.tasks.detection.average_precision:kinds_of",
        any_kind_can_be_scored,
        "test_detection_score.py::test_what_results_have_is_scored",
    ),
    "detection: labels leave the picture": (
        "rcmae.report.detections:label_places",
        labels_leave_the_picture,
        "test_detection_score.py::test_labels_stay_in_the_picture_and_off_each_other",
    ),
    "detection: labels lie on labels": (
        "rcmae.report.detections:label_places",
        labels_lie_on_labels,
        "test_detection_score.py::test_labels_stay_in_the_picture_and_off_each_other",
    ),
    "detection: boxes are drawn larger": (
        "rcmae.report.detections:_around",
        boxes_are_drawn_larger,
        "test_detection_score.py::test_a_picture_changes_at_boxes_masks_and_labels_alone",
    ),
    "detection: the most certain lies below": (
        "rcmae.report.detections:draw",
        the_most_certain_lies_below,
        "test_detection_score.py::test_the_most_certain_lies_on_top_and_the_uncertain_is_left_out",
    ),
    "detection: pictures have no threshold": (
        "rcmae.report.detections:draw_objects",
        no_threshold_in_pictures,
        "test_detection_score.py::test_the_most_certain_lies_on_top_and_the_uncertain_is_left_out",
    ),
    "detection: two classes have one colour": (
        "rcmae.report.detections:PALETTE",
        two_classes_of_one_colour,
        "test_detection_score.py::test_classes_have_colours_of_their_own_that_black_letters_show_on",
    ),
    "detection: truth and detection are swapped": (
        "rcmae.report.detections:side_by_side",
        truth_passes_for_the_detection,
        "test_detection_score.py::test_truth_and_what_was_found_stand_beside_each_other",
    ),
    # --- detection: reports and ranks
    "detectors: every rank writes the report": (
        "rcmae.tasks.detection.commands:train_detector",
        everybody_is_first,
        "test_distributed.py::test_two_processes_detect_and_learn_to_as_two_micro_batches_do",
    ),
    "detectors: the report knows pre-training only": (
        "rcmae.report:kind_of",
        lambda old: lambda run: "pre-training",
        "test_detection_report.py::test_a_detector_that_was_stopped_has_a_page_too",
    ),
    "detectors: the report says boxes for masks": (
        "rcmae.report.detect:verdict",
        boxes_pass_for_masks,
        "test_detection_report.py::test_the_page_says_what_the_scores_say",
    ),
    "detectors: unreadable images are passed over in silence": (
        "rcmae.report.detect:bad_files",
        lambda old: lambda path: [],
        "test_detection_report.py::test_images_that_could_not_be_read_are_named",
    ),
    "detectors: the report of the backbone is silent": (
        "rcmae.report.build:detector",
        lambda old: lambda run: None,
        "test_detection_report.py::test_the_report_of_the_backbone_tells_its_detector",
    ),
    # --- detection: training
    "detectors: proposals are drawn anew after a resume": (
        "rcmae.tasks.detection.train:path_seed",
        paths_drawn_anew,
        "test_detection_train.py::test_a_stopped_run_goes_on_to_the_same_bit",
    ),
    "detectors: the optimizer is not restored": (
        "rcmae.trainer:load_checkpoint",
        optimizer_not_restored,
        "test_detection_train.py::test_a_stopped_run_goes_on_to_the_same_bit",
    ),
    "detectors: the rate stays": (
        "rcmae.tasks.detection.train:rate",
        lambda old: lambda s, t: s.lr,
        "test_detection_train.py::test_rates_rise_and_fall_at_their_steps",
    ),
    "detectors: nothing is learned": (
        "rcmae.tasks.detection.train:rate",
        lambda old: lambda s, t: 0.0,
        "test_detection_train.py::test_it_learns_scenes_by_heart",
    ),
    "detectors: the last object is lost": (
        "rcmae.tasks.detection.train:predict",
        last_result_is_lost,
        "test_detection_train.py::test_what_a_run_leaves_says_the_same",
    ),
    "detectors: read back without their statistics": (
        "rcmae.tasks.detection.files:rebuild",
        statistics_are_forgotten,
        "test_detection_train.py::test_what_a_run_leaves_says_the_same",
    ),
    "detectors: labels pass for ids": (
        "rcmae.tasks.detection.predict:results_of",
        labels_for_ids,
        "test_detection_train.py::test_a_foreign_folder_trains_evaluates_and_is_shown",
    ),
    # --- data2vec
    "data2vec: the student sees hidden patches": (
        "rcmae.methods.data2vec:Data2Vec.predict",
        lambda old: lambda self, patches, orders: old(self, patches + 1e-3 * patches.mean(1, keepdim=True), orders),
        "test_data2vec.py::test_hidden_pixels_do_not_reach_the_student_but_the_target",
    ),
    "data2vec: the target knows the masks": (
        "rcmae.methods.data2vec:Data2Vec.forward",
        masks_leak_into_the_image,
        "test_data2vec.py::test_the_target_does_not_depend_on_the_masks",
    ),
    "data2vec: only the first mask counts": (
        "rcmae.methods.data2vec:Data2Vec.forward",
        every_mask_is_the_first,
        "test_data2vec.py::test_many_masks_in_one_pass_are_the_mean_of_single_ones",
    ),
    "data2vec: the teacher has a gradient": (
        "rcmae.methods.data2vec:Data2Vec.target",
        targets_with_gradient,
        "test_data2vec.py::test_the_teacher_has_no_gradient_and_every_trained_weight_has_one",
    ),
    "data2vec: targets depend on the batch": (
        "rcmae.methods.data2vec:Data2Vec.target",
        targets_centered_over_the_batch,
        "test_data2vec.py::test_micro_batches_give_the_gradient_of_the_whole_batch",
    ),
    "data2vec: the teacher looks twice": (
        "rcmae.methods.data2vec:Data2Vec.target",
        lambda old: lambda self, patches: (old(self, patches), old(self, patches))[1],
        "test_data2vec.py::test_all_masks_of_an_image_share_one_pass_of_the_teacher",
    ),
    "data2vec: targets are bf16": (
        "rcmae.methods.data2vec:Data2Vec.target",
        lambda old: lambda self, patches: old(self, patches).bfloat16(),
        "test_data2vec.py::test_targets_are_float32_under_autocast",
    ),
    "data2vec: visible places are learned from": (
        "rcmae.methods.data2vec:Data2Vec.hidden",
        lambda old: lambda self, rows, orders: old(self, rows, orders.flip(2)),
        "test_data2vec.py::test_visible_places_get_no_loss",
    ),
    "data2vec: one block too few makes the target": (
        "rcmae.methods.data2vec:sizes",
        lambda old: lambda s, encoder: (*old(s, encoder)[:2], max(1, old(s, encoder)[2] - 1)),
        "test_data2vec.py::test_the_target_is_the_mean_of_the_normalised_feed_forward_outputs_of_the_top_blocks",
    ),
    "data2vec: targets are taken with what entered": (
        "rcmae.methods.data2vec:Data2Vec._collect",
        lambda old: lambda self, mlp, args, output: old(self, mlp, args, output + args[0]),
        "test_data2vec.py::test_the_target_is_the_mean_of_the_normalised_feed_forward_outputs_of_the_top_blocks",
    ),
    "data2vec: what a probe makes the teacher say is kept": (
        "rcmae.methods.data2vec:Data2Vec._collect",
        collects_always,
        "test_data2vec.py::test_the_teacher_is_the_encoder_alone_and_probing_it_keeps_nothing",
    ),
    "data2vec: momentum rises over the run": (
        "rcmae.methods.data2vec:Data2Vec.momentum",
        lambda old: lambda self, t: 0.9998 + (0.99999 - 0.9998) * t.fraction,
        "test_data2vec.py::test_the_teachers_momentum_rises_in_a_straight_line_and_stays",
    ),
    "data2vec: one patch too few is visible": (
        "rcmae.methods.data2vec:squares_mask",
        lambda old: lambda grid, count, side, rng: old(grid, max(count - 1, 0), side, rng),
        "test_data2vec.py::test_exactly_the_patches_asked_for_are_visible",
    ),
    "data2vec: visible patches lie alone": (
        "rcmae.methods.data2vec:squares_mask",
        lambda old: lambda grid, count, side, rng: old(grid, count, 1, rng),
        "test_data2vec.py::test_visible_patches_lie_in_squares_everywhere",
    ),
    "data2vec: noise is drawn in the step": (
        "rcmae.methods.data2vec:ConvDecoder.forward",
        noise_drawn_anew,
        "test_data2vec.py::test_a_step_is_a_function_of_weights_batch_and_nothing_else",
    ),
    "data2vec: a collapse does not show": (
        "rcmae.methods.data2vec:deviation",
        lambda old: lambda x: old(x) * 0 + 1,
        "test_data2vec.py::test_all_answers_alike_show_in_what_is_logged",
    ),
}

HERE = Path(__file__).parent
