"""Splits: equal for all backbones, nested, as balanced as the classes allow, with no class left out."""

import json

import numpy as np
import pytest

from rcmae.errors import ConfigError, DataError
from rcmae.tasks.splits import held_out, read_split, splits, write_splits


def labels_of(*sizes: int) -> np.ndarray:
    """As many images of class 0, 1, ... as `sizes` says, in a random order."""
    return np.random.default_rng(7).permutation(np.repeat(np.arange(len(sizes)), sizes))


@pytest.mark.parametrize("sizes", [(100,) * 10, (500, 300, 3, 1), (1, 1, 1), (2000, 7)])
def test_splits_are_nested_and_contain_every_class(sizes):
    labels = labels_of(*sizes)
    subsets = splits(labels)
    assert list(subsets) == [1, 5, 10, 100]
    for percent, chosen in subsets.items():
        assert (
            len(chosen) == max(len(sizes), round(len(labels) * percent / 100)) and (np.diff(chosen) > 0).all()
        )
        assert (np.unique(labels[chosen]) == np.arange(len(sizes))).all()
    for small, large in ((1, 5), (5, 10), (10, 100)):
        assert set(subsets[small]) <= set(subsets[large])


@pytest.mark.parametrize("sizes", [(100,) * 10, (500, 300, 3, 1), (64, 65, 66)])
def test_classes_are_balanced_up_to_one_image(sizes):
    labels = labels_of(*sizes)
    for chosen in splits(labels, percents=(1, 3.3, 5, 10, 40, 99)).values():
        count = np.bincount(labels[chosen])
        rounds = count.max() - (
            count.max() > count[count < sizes].min(initial=count.max())
        )  # complete rounds
        assert (np.minimum(sizes, rounds) <= count).all() and (count <= np.minimum(sizes, rounds + 1)).all()


def test_splits_depend_only_on_labels_and_seed():
    labels = labels_of(80, 90, 100)
    np.random.seed(0)
    first = splits(labels, seed=3)
    np.random.seed(1)
    again, other = splits(labels.copy(), seed=3), splits(labels, seed=4)
    assert all((first[p] == again[p]).all() for p in first)
    assert (first[5] != other[5]).any()
    assert first[1].tolist() == [44, 86, 126], "published splits never change"
    assert (splits(labels, seed=3, percents=[10])[10] == first[10]).all(), "independent of other percentages"


def test_remaining_images_are_not_always_of_the_same_classes():
    """Ten images of four classes: two classes have one more, and not the same two for every seed."""
    extra = [
        tuple(
            np.bincount(labels_of(100, 100, 100, 100)[splits(labels_of(100, 100, 100, 100), s, [2.5])[2.5]])
        )
        for s in range(40)
    ]
    assert {sum(e) for e in extra} == {10} and {max(e) for e in extra} == {3}
    assert len(set(extra)) == 6


def test_images_without_a_label_are_never_chosen():
    labels = labels_of(50, 50)
    labels[::3] = -1
    subsets = splits(labels)
    assert (labels[subsets[100]] >= 0).all() and len(subsets[100]) == (labels >= 0).sum()


def test_a_fraction_of_every_class_is_held_out_and_never_all_of_one():
    labels = labels_of(100, 10, 2, 1)
    chosen = held_out(labels)
    assert np.bincount(labels[chosen], minlength=4).tolist() == [20, 2, 1, 0]
    assert (chosen == held_out(labels)).all() and (chosen != held_out(labels, seed=1)).any()


def test_split_files_are_reproducible_and_tied_to_their_labels(tmp_path):
    labels = labels_of(30, 40)
    one, two = (tmp_path / name for name in "ab")
    for folder in (one, two):
        folder.mkdir()
        write_splits(folder, labels, seed=2)
    paths = [two / f"labels-{percent}.json" for percent in (1, 5, 10, 100)]
    assert sorted(two.iterdir()) == sorted(paths)
    assert all((one / p.name).read_bytes() == p.read_bytes() for p in paths)
    assert (read_split(paths[2], labels) == splits(labels, seed=2)[10]).all()
    with pytest.raises(DataError, match=r"labels-10.json was written for other labels"):
        read_split(paths[2], 1 - labels)
    paths[0].write_text(json.dumps([1, 2]))
    with pytest.raises(DataError, match="is not a split"):
        read_split(paths[0], labels)


@pytest.mark.parametrize("percent", [0, -1, 101])
def test_an_impossible_fraction_is_refused(percent):
    with pytest.raises(ConfigError, match="at most 100"):
        splits(labels_of(5, 5), percents=[percent])
    with pytest.raises(DataError, match="none of the images has a label"):
        splits(np.full(3, -1))
