"""The bundled digits: a pure function, disjoint splits, and labels that only the shape predicts."""

import json
import pickle
import time
from importlib.metadata import version

import numpy as np
import pytest
from PIL import Image

from rcmae.data import digits as d
from rcmae.tasks.linear_probe import linear_correct
from tests.mutations import catches


@pytest.fixture(scope="module")
def train() -> d.DigitsSource:
    return d.DigitsSource("train", 1500)


def test_an_image_is_a_function_of_seed_split_and_index(train):
    for i in (0, 255, 256, 1499):
        image, label = d.digit(0, "train", i)
        assert np.array_equal(image, train.read(i)), "pixels do not depend on the batch"
        assert label == train.labels[i]
    assert not np.array_equal(d.digit(1, "train", 3)[0], train.read(3))
    assert not np.array_equal(d.digit(0, "test", 3)[0], train.read(3))
    assert d.digit(0, "train", 5, size=64)[0].shape == (64, 64, 3)
    assert np.array_equal(d.scene(0, "train", 2)[0], d.scene(0, "train", 2)[0])


def one_split(old):
    def glyphs():
        masks, labels, splits = old()
        return masks, labels, dict.fromkeys(splits, splits["train"])

    return glyphs


@catches("the test split has the glyphs of the training split", "rcmae.data.digits:_glyphs", one_split)
def test_no_handwriting_and_no_photograph_is_in_both_splits():
    masks, labels, splits = d._glyphs()
    assert not set(splits["train"]) & set(splits["test"])
    assert len(splits["train"]) + len(splits["test"]) == len(labels) == 1797
    assert all(
        np.isclose((labels[s] == k).mean(), 0.1, atol=0.01) for s in splits.values() for k in range(10)
    )
    strips = {
        split: {t[:, i].tobytes() for t in d._textures(split)[::2] for i in range(t.shape[1])}
        for split in ("train", "test")
    }
    assert not strips["train"] & strips["test"]
    assert masks.min() == 0
    assert masks.max() == 1


def test_the_bundled_images_never_change():
    """Pillow 12 rounds differently when it downsamples a photograph: some bytes of the test images differ by
    one."""
    pillow_12 = version("pillow").startswith("12.")
    expected = (
        "9137ed2263efd5bb24671d9c98ea8553fca0babd290d90259ebca74c0a91e3d7"
        if pillow_12
        else "73f6733eac0eb9bbcc40d5b3ac8abcfdeef6a95c4a45b35ef5595c7f54fe2d87"
    )
    assert (d.GENERATOR, d.set_hash()) == (1, expected), (
        "The images of the bundled set changed. If that was intended: raise GENERATOR, put the new hash here "
        "and rerun the results."
    )


def test_nuisances_do_not_predict_the_label(train):
    """With mean color, contrast, and color and position of the brightest pixels, a linear probe stays at
    chance."""
    test = d.DigitsSource("test", 800)

    def nuisances(source):
        x = source.images.astype(np.float32) / 255
        corners = x[:, [0, 0, -1, -1], [0, -1, 0, -1]].reshape(len(x), -1)
        return np.concatenate([x.mean((1, 2)), x.max((1, 2)), corners], 1)

    assert linear_correct(nuisances(train), train.labels, nuisances(test), test.labels).mean() < 0.2


def test_scenes_contain_what_their_annotations_say(tmp_path):
    for index in range(8):
        image, instances = d.scene(0, "train", index)
        assert image.shape == (128, 128, 3)
        assert 1 <= len(instances) <= 8
        assert np.stack([i.mask for i in instances]).sum(0).max() == 1, "visible masks do not overlap"
        for i in instances:
            x, y, w, h = i.box
            rows, columns = np.flatnonzero(i.mask.any(1)), np.flatnonzero(i.mask.any(0))
            assert (x, y, x + w - 1, y + h - 1) == (columns[0], rows[0], columns[-1], rows[-1])
    path = d.write_coco(tmp_path, "train", 3)
    coco = json.loads(path.read_text())
    assert len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"])
    for image in coco["images"]:
        pixels, instances = d.scene(0, "train", image["id"] - 1)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "images/train" / image["file_name"])), pixels)
        annotations = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        for a, i in zip(annotations, instances, strict=True):
            counts = a["segmentation"]["counts"]
            mask = np.repeat(np.arange(len(counts)) % 2, counts).reshape(128, 128, order="F").astype(bool)
            assert np.array_equal(mask, i.mask)
            assert (a["category_id"], a["area"]) == (i.label + 1, i.mask.sum())


@pytest.mark.parametrize("mask", [np.zeros((3, 4)), np.ones((3, 4)), np.eye(4), np.fliplr(np.eye(4))])
def test_run_lengths_cover_the_mask(mask):
    counts = d.run_lengths(mask.astype(bool))
    assert sum(counts) == mask.size
    assert np.array_equal(np.repeat(np.arange(len(counts)) % 2, counts), mask.ravel(order="F"))


def test_drawing_an_image_takes_a_fraction_of_a_millisecond(train):
    start = time.process_time()
    d.DigitsSource("train", 2048, seed=3)
    assert (time.process_time() - start) / 2048 < 1e-3


def test_it_can_be_sent_to_loader_processes(train):
    assert np.array_equal(pickle.loads(pickle.dumps(train)).read(7), train.read(7))
    assert (
        train.fingerprint()
        == d.DigitsSource("train", 1500).fingerprint()
        != d.DigitsSource("test", 1500).fingerprint()
    )
    assert train.where(7) == "bundled:digits/train/7"
