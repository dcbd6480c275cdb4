"""Using a backbone: features in files, feature maps, pictures of what it sees, and lists of runs."""

import html
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import timm
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

import rcmae
from rcmae.cli import main
from rcmae.config import RuntimeConfig, to_toml
from rcmae.data.views import center
from rcmae.engine.run import run_lock
from rcmae.engine.step import DIVERGED
from rcmae.errors import ConfigError, DataError
from rcmae.interop.imports import import_weights
from rcmae.interop.load import load, load_method
from rcmae.interop.timm_export import export
from rcmae.report import pictures
from rcmae.report.look import (
    CELL,
    GAP,
    Cell,
    Sheet,
    component_colors,
    draw_sheet,
    look,
    short_names,
    shortened,
)
from rcmae.report.runs import compare_runs, find_runs
from rcmae.tasks.embed import embed
from tests.conftest import GOLDEN, batch_for, method_for, small
from tests.images import bad, odd
from tests.mutations import catches
from tests.test_report import run_directory

CPU = {"device": "cpu", "precision": "fp32", "workers": 0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Images of two classes, 20 px, one of which cannot be read."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(5):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    (root / "dog" / "4.png").write_bytes(b"hello")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos) -> Path:
    """A run of two steps."""
    out = tmp_path_factory.mktemp("run") / "tiny"
    recipe = small(data=str(photos / "cat"), steps=2, batch_size=4)
    rcmae.pretrain(recipe, RuntimeConfig(out=out, device="cpu", workers=0, monitor=False))
    return out


def centers(files: list[Path], size: int = 16) -> torch.Tensor:
    """The evaluation view of the images, in 0 to 1."""
    views = [center(np.asarray(Image.open(file).convert("RGB")), (size, size)) for file in files]
    return torch.stack(views).float() / 255


# --- features in a file -------------------------------------------------------------------------------------


@catches("the wrong feature", "rcmae.tasks.embed:pooled", lambda f: lambda x, pool: f(x, "mean"))
@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_a_file_holds_the_features_names_labels_and_metadata(run, photos, tmp_path, ending, capsys):
    out = tmp_path / f"features.{ending}"
    result = embed(str(run), str(photos), out, pool="cls+mean", cache=tmp_path / "cache", **CPU)
    files = sorted(photos.glob("*/*.png"))[:9]
    features = load(run)(centers(files))
    expected = torch.cat([features.cls, features.mean], 1).detach()
    if ending == "npz":
        content = np.load(out)
        values, names, about = content["features"], content["name"].tolist(), str(content["rcmae"])
        classes = content["classes"][content["label"]].tolist()
    else:
        table = pyarrow.parquet.read_table(out)
        values, names = np.stack(table["features"].to_numpy()), table["name"].to_pylist()
        about, classes = table.schema.metadata[b"rcmae"], table["class"].to_pylist()
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected, atol=1e-5)
    assert names == [str(file) for file in files]
    assert classes == [file.parent.name for file in files]
    about = json.loads(about)
    assert about["pool"] == "cls+mean" and about["network"] == "teacher" and about["size"] == [16, 16]
    assert about["backbone"] == str(run) and about["data_fingerprint"] and about["images"] == 9
    assert result["unreadable"] == [{"where": str(photos / "dog" / "4.png"), "reason": "not an image"}]
    assert "dog/4.png cannot be read (not an image): left out" in capsys.readouterr().out.replace("\n", "")


def test_the_same_command_replaces_the_file_and_reads_from_the_cache(run, photos, tmp_path, monkeypatch):
    out, arguments = tmp_path / "x.npz", {"cache": tmp_path / "cache", **CPU}
    embed(str(run), str(photos / "cat"), out, **arguments)
    before = np.load(out)["features"]
    monkeypatch.setattr(rcmae.models.backbone.Backbone, "forward", None)  # no image may pass the network
    embed(str(run), str(photos / "cat"), out, **arguments)
    np.testing.assert_array_equal(np.load(out)["features"], before)


def test_all_kinds_of_sources(run, photos, tmp_path):
    """Tar shards and lists of files give the same features as a folder."""
    cats = sorted((photos / "cat").glob("*.png"))
    with tarfile.open(tmp_path / "a-000.tar", "w") as tar:
        for file in cats:
            tar.add(file, file.name)
    (tmp_path / "list.txt").write_text("".join(f"{file}\n" for file in cats))
    features = {}
    for data in (str(photos / "cat"), str(tmp_path / "list.txt"), str(tmp_path / "a-000.tar")):
        embed(str(run), data, tmp_path / "x.npz", cache=tmp_path / "cache", **CPU)
        content = np.load(tmp_path / "x.npz")
        features[data] = content["features"]
        names = zip(content["name"], cats, strict=True)
        assert all(name.endswith((f"/{file.name}", f"!{file.name}")) for name, file in names)
        assert "label" not in content
    first, *others = features.values()
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-5)


def test_features_at_another_size_and_the_pool_of_the_method(run, photos, tmp_path):
    out, files = tmp_path / "x.npz", sorted((photos / "cat").glob("*.png"))
    result = embed(str(run), str(photos / "cat"), out, size=32, cache=tmp_path / "cache", **CPU)
    assert result["pool"] == "mean" and result["size"] == [32, 32]
    larger = load(run).resized((32, 32))
    np.testing.assert_allclose(np.load(out)["features"], larger(centers(files, 32)).mean.detach(), atol=1e-5)
    export(load(run), tmp_path / "dino", {"method": "dino"})
    result = embed(str(tmp_path / "dino"), str(photos / "cat"), out, cache=tmp_path / "cache", **CPU)
    assert result["pool"] == "cls"
    np.testing.assert_allclose(np.load(out)["features"], load(run)(centers(files)).cls.detach(), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "out", "message"),
    [
        ({}, "x.csv", "ends in .parquet or .npz"),
        ({}, "none/x.npz", "there is no folder"),
        ({"size": 18}, "x.npz", "18 x 18 is not a multiple of the patch, 4 x 4"),
        ({"batch_size": 0}, "x.npz", "batch_size must be 1 or more, not 0"),
        ({"height": 8}, "x.npz", "height needs size"),
    ],
)
def test_what_cannot_be_embedded_is_refused(run, photos, tmp_path, options, out, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        embed(str(run), str(photos), tmp_path / out, device="cpu", **options)
    assert not list(tmp_path.iterdir())


# --- feature maps -------------------------------------------------------------------------------------------


@catches(
    "maps in another order",
    "rcmae.models.backbone:Backbone.intermediate",
    lambda f: lambda *a, **k: dict(zip(f(*a, **k), reversed(f(*a, **k).values()), strict=True)),
)
def test_feature_maps_are_those_of_timm(run):
    """timm reads the exported folder with `features_only`."""
    backbone, images = load(run), torch.rand(2, 3, 16, 16)
    folder = f"local-dir:{run / 'export' / 'teacher'}"
    network = timm.create_model(folder, pretrained=True, features_only=True, out_indices=[0, 1]).eval()
    maps = backbone.intermediate(images, blocks=[0, -1])
    assert list(maps) == ["blocks.0", "blocks.1"]
    for ours, timms in zip(maps.values(), network(backbone._standardize(images)), strict=True):
        assert ours.shape == (2, 24, 4, 4)
        torch.testing.assert_close(ours, timms)
    last = backbone.intermediate(images, [-1], norm=True)["blocks.1"]
    torch.testing.assert_close(last, backbone(images).patches)
    with pytest.raises(IndexError, match="blocks 0 to 1, not 2"):
        backbone.intermediate(images, [2])


@catches(
    "attention of another token",
    "rcmae.models.backbone:Backbone.class_attention",
    lambda f: lambda self, images: f(self, images.flip(3)),
)
def test_class_attention_is_that_of_the_last_block(run):
    backbone, images, weights = load(run), torch.rand(2, 3, 16, 16), []
    attention = backbone.vit.blocks[-1].attn
    attention.fused_attn = False
    attention.attn_drop.register_forward_pre_hook(lambda _, args: weights.append(args[0]))
    backbone(images)  # [b, heads, t, t]
    torch.testing.assert_close(
        backbone.class_attention(images), weights[0][:, :, 0, 1:].mean(1).unflatten(1, (4, 4))
    )


# --- pictures -----------------------------------------------------------------------------------------------


def test_a_snapshot_at_another_ratio_hides_nested_patches():
    method = method_for(small("rcmae")).eval()
    batch = batch_for(method)
    (most, _), (least, facts) = (method.snapshot(batch, ratio) for ratio in (0.75, 0.25))
    assert most["visible"].shape == (3, 4) and least["visible"].shape == (3, 12)
    assert torch.equal(most["visible"], least["visible"][:, :4])
    assert least["student"].shape == least["teacher"].shape == (3, 4, 48)
    default, _ = method.snapshot(batch)
    torch.testing.assert_close(default["teacher"], most["teacher"])
    s = pictures.snapshot_of({k: v.numpy() for k, v in least.items()}, facts | {"step": "0"})
    shown = pictures.cut(pictures.picture(s, 0, "student"), 4)[s.visible[0]]
    np.testing.assert_array_equal(shown, pictures.cut(s.image[0].transpose(1, 2, 0), 4)[s.visible[0]])


@pytest.mark.parametrize("name", ["rcmae", "mae"])
def test_the_decoder_of_a_run_and_of_an_imported_folder(run, tmp_path, name):
    """Its encoders are those of the exported backbones."""
    folder = tmp_path / "imported"
    import_weights(GOLDEN / f"{name}_official_layout.pth", folder, heads=3, decoder_heads=2)
    for path in (folder, run):
        method = load_method(path, load(path).statistics)
        for network in method.networks:
            expected = load(path, network).vit.state_dict()
            actual = method.backbone(network).vit.state_dict()
            assert all(torch.equal(actual[key], value) for key, value in expected.items())


@catches(
    "components of each image alone",
    "rcmae.report.look:component_colors",
    lambda f: lambda p: (np.concatenate([f(x[None])[0] for x in p]), f(p)[1]),
)
def test_similar_patches_have_similar_colors_in_all_images():
    """The first image holds two kinds of patches, the second one only one of them."""
    kinds = torch.randn(2, 6)
    which = torch.tensor([[[0, 0], [1, 1]], [[1, 1], [1, 1]]])  # [k, gh, gw]
    patches = (kinds[which] + 1e-3 * torch.randn(2, 2, 2, 6)).permute(0, 3, 1, 2)
    colors, explained = component_colors(patches)
    first, second = (colors[which.numpy() == i][:, 0].astype(int) for i in (0, 1))
    assert np.ptp(first) < 20 and np.ptp(second) < 20 and abs(first.mean() - second.mean()) > 200
    assert explained[0] > 0.99 and len(explained) == 3 and sum(explained) <= 1 + 1e-9


def test_a_page_shows_every_section_without_network_access(run, photos, tmp_path):
    other = tmp_path / "others"
    other.mkdir()
    for i, file in enumerate(sorted(photos.glob("*/*.png"))[:8]):
        (other / f"image {i}.png").write_bytes(file.read_bytes())
    (other / "image copy.png").write_bytes((other / "image 3.png").read_bytes())
    chosen = [other / "image 3.png", other / "image 5.png"]
    result = look(str(run), chosen, tmp_path / "out", data=str(other), cache=tmp_path / "cache", **CPU)
    names = ["reconstruction-01", "reconstruction-02", "features", "neighbors"]
    assert [Path(file).stem for file in result["files"]] == names
    for file in result["files"]:
        with Image.open(file) as picture:
            assert picture.width <= 1600 and picture.height > CELL
    first = [Path(n["name"]).name for n in result["neighbors"][0]["neighbors"]]
    assert first[0] == "image copy.png" and "image 3.png" not in first and len(first) == 6
    assert result["neighbors"][0]["neighbors"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    page = (tmp_path / "out" / "look.html").read_text()
    assert "http" not in page and "<script" not in page
    images = re.findall(r'<img src="data:image/webp[^"]+" alt="([^"]+)"', page)
    # two images: 3 ratios x 4 pictures, 3 of the features, and 1 + 6 of the neighbors
    assert len(images) == page.count("<img") == 2 * (3 * 4 + 3 + 7)
    assert "image 3.png, 90 % hidden, as the teacher reconstructs it" in images
    assert all(title in page for title in ("Reconstructions", "Patch features", "Nearest neighbors"))


def test_odd_images_are_shown_and_unreadable_ones_named(run, tmp_path, capsys):
    """Turned, 16-bit, gray and transparent images; a folder shows its first eight."""
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in ("exif.jpg", "16 bit.png", "gray alpha.png", "rgba.png", "palette.png"):
        (folder / name).write_bytes(odd()[name][0])
    (folder / "cut.png").write_bytes(bad()["cut.png"][0])
    for i in range(4):
        (folder / f"z{i}.png").write_bytes(odd()["gray.png"][0])
    result = look(str(run / "export" / "student"), [folder], tmp_path / "out", ratios=(0.5,), **CPU)
    assert len(result["images"]) == 7 and result["unreadable"][0]["where"].endswith("cut.png")
    assert result["notes"] == [f"the first 8 of 10 images in {folder} are shown"]
    output = capsys.readouterr().out
    assert "cut.png cannot be read" in output and "the first 8 of 10" in output
    assert html.escape("cut.png") in (tmp_path / "out" / "look.html").read_text()


def test_a_network_without_a_decoder_has_no_reconstructions(run, photos, tmp_path, capsys):
    weights = tmp_path / "elsewhere"
    (run / "export" / "student").rename(weights)
    try:
        result = look(str(weights), [photos / "cat" / "0.png"], tmp_path / "out", **CPU)
    finally:
        weights.rename(run / "export" / "student")
    assert [Path(file).stem for file in result["files"]] == ["features"]
    assert "no reconstructions" in result["notes"][0] and "no reconstructions" in capsys.readouterr().out
    assert "<h2" in (page := (tmp_path / "out" / "look.html").read_text()) and "Reconstructions" not in page


def test_pictures_of_nothing_are_refused(run, photos, tmp_path):
    with pytest.raises(ConfigError, match="no images given"):
        look(str(run), [], tmp_path / "out")
    with pytest.raises(DataError, match="nothing.png does not exist"):
        look(str(run), [tmp_path / "nothing.png"], tmp_path / "out", device="cpu")
    with pytest.raises(DataError, match="none of 1 image can be read"):
        look(str(run), [photos / "dog" / "4.png"], tmp_path / "out", device="cpu")
    with pytest.raises(ConfigError, match="ratios must lie between 0 and 1, not 1"):
        look(str(run), [photos], tmp_path / "out", ratios=(1.0,), device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_sheet_has_equal_gaps():
    cell = Cell(np.zeros((16, 16, 3), np.uint8), "a caption that is much longer than its picture", "")
    picture = np.asarray(draw_sheet(Sheet("x", "", [[cell] * 3] * 2)))
    assert picture.shape[1] == 3 * CELL + 4 * GAP
    columns = np.flatnonzero((picture == 0).all(2).any(0))  # those with black pixels of pictures
    assert columns[0] == GAP + 1 and columns[-1] == picture.shape[1] - GAP - 2


def test_names():
    assert short_names(["a/x.png", "b/x.png", "c/y.png"]) == ["a/x.png", "b/x.png", "y.png"]
    assert shortened("0123456789", 5, len) == "01…89" and shortened("01234", 5, len) == "01234"


# --- runs ---------------------------------------------------------------------------------------------------


def with_steps(run: Path, total: int, event: str | None = None) -> Path:
    (run / "machine.json").write_text(json.dumps({"steps": total, "recipe_hash": "0123456789ab"}))
    if event:
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "event", "step": 60, "text": event}) + "\n")
    return run


def test_runs_are_listed_with_their_state(run, tmp_path):
    finished = run_directory(tmp_path / "a" / "finished")
    with_steps(run_directory(tmp_path / "a" / "diverged"), 100, DIVERGED)
    with_steps(run_directory(tmp_path / "b" / "stopped", teacher=False), 100)
    running = with_steps(run_directory(tmp_path / "b" / "running", labeled=False), 100)
    import_weights(GOLDEN / "mae_official_layout.pth", tmp_path / "imported", heads=3, decoder_heads=2)
    with run_lock(running):
        runs, left_out = find_runs([tmp_path / "b", tmp_path / "a", tmp_path / "imported", run])
    states = {listed["name"]: listed["state"] for listed in runs}
    assert states == {name: name for name in ("finished", "diverged", "stopped", "running", "imported")} | {
        "tiny": "finished"
    }
    assert not left_out
    by_name = {listed["name"]: listed for listed in runs}
    assert by_name["finished"]["linear"] == {
        "accuracy": 50.0,
        "margin": pytest.approx(6.9, abs=0.1),
        "images": 200,
        "network": "teacher",
    }
    assert by_name["stopped"]["linear"]["network"] == "student" and by_name["running"]["linear"] is None
    assert (by_name["stopped"]["steps"], by_name["stopped"]["total"]) == (60, 100)
    assert by_name["stopped"]["recipe"] == "0123456789ab" and by_name["stopped"]["method"] == "mae"
    assert by_name["finished"]["loss"] == pytest.approx(1 / 60)
    assert by_name["finished"]["bytes"] == sum(f.stat().st_size for f in finished.rglob("*") if f.is_file())
    assert by_name["tiny"]["seconds"] > 0 and by_name["tiny"]["steps"] == 2


def test_damaged_and_foreign_folders_are_named(tmp_path, capsys):
    damaged, foreign, lost = (tmp_path / name for name in ("damaged", "foreign", "lost"))
    for folder in (damaged, foreign, lost, tmp_path / "empty"):
        folder.mkdir()
    (damaged / "recipe.toml").write_text("method = [")
    (foreign / "recipe.toml").write_text("flour = 500")
    (lost / "metrics.jsonl").write_text("{}\n")
    binary = run_directory(tmp_path / "binary")
    (binary / "metrics.jsonl").write_bytes(b"\xff\xfe\0{")
    (binary / "machine.json").write_bytes(b"\xff")
    folders = [damaged, foreign, lost, tmp_path / "empty", tmp_path / "none", binary]
    runs, left_out = find_runs(folders)
    assert [listed["state"] for listed in runs] == ["stopped"] and runs[0]["loss"] is None
    reasons = {Path(path).name: reason for path, reason in left_out}
    assert reasons["damaged"].startswith("damaged, or of another program")
    assert "not that of a run" in reasons["foreign"] and reasons["lost"] == "recipe.toml is missing"
    assert reasons["empty"] == "holds no run" and reasons["none"] == "does not exist"
    assert main(["runs", str(damaged)]) == 2
    captured = capsys.readouterr()
    assert f"there is no run ({damaged}: damaged, or of another program" in captured.err
    assert not captured.out
    assert main(["runs", "--json", *map(str, folders)]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line)["name"] == "binary"


@catches("the wrong sign", "rcmae.report.runs:paired", lambda f: lambda one, other: f(other, one))
@pytest.mark.usefixtures("drawn")
def test_runs_are_compared(tmp_path):
    first, second = run_directory(tmp_path / "first"), run_directory(tmp_path / "second", teacher=False)
    (second / "recipe.toml").write_text(to_toml(small("mae", batch_size=16, base_lr=0.5)))
    # The second run classifies every test image correctly, and the first one half of them.
    for folder in (first, second):
        for file in (folder / "probes").iterdir():
            tensors = load_file(file)
            if folder is second:
                tensors = {name: np.ones_like(values) for name, values in tensors.items()}
            save_file(tensors, file, {"test": "same images"})
    result = compare_runs([first, second], tmp_path / "out")
    assert result["settings"]["base_lr"] == [0.03, 0.5] and result["settings"]["method"] == ["rcmae", "mae"]
    assert "seed" not in result["settings"] and result["settings"]["batch_size"] == [8, 16]
    assert [row["images"] for row in result["runs"]] == [480, 960]
    difference = result["runs"][1]["against_first"]
    assert difference.startswith("+50.0 points, +4") and result["runs"][0]["against_first"] is None
    page = (tmp_path / "out" / "runs.html").read_text()
    assert "reconstruction loss" in page and "http" not in page and ">images<" in page
    assert page.count("<svg") == 2 and page.count('role="img"') == 2
    assert "Losses are not comparable: the runs differ in data" in page
    with Image.open(result["picture"]) as picture:
        assert picture.size == (840, 1100)
    assert ">steps<" in Path(compare_runs([first, second], tmp_path / "out", "steps")["page"]).read_text()
    with pytest.raises(ConfigError, match="--compare needs two runs of pre-training"):
        compare_runs([first], tmp_path / "out")


# --- commands -----------------------------------------------------------------------------------------------


def test_commands(run, photos, tmp_path, capsys):
    cache = ["--feature-cache", str(tmp_path / "cache"), "--device", "cpu"]
    out = tmp_path / "x.parquet"
    assert main(["embed", str(run), "--data", str(photos), "--out", str(out), *cache]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "9 images x 24 values (teacher, mean); left out 1 unreadable image" in text
    shown = [str(photos / "cat" / "0.png"), "--out", str(tmp_path / "look"), "--ratios", "0.5", *cache]
    assert main(["look", str(run), *shown]) == 0
    assert f"2 pictures of 1 image. Open {tmp_path / 'look' / 'look.html'}" in capsys.readouterr().out
    assert main(["runs", str(run)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert str(run) in line and "rcmae" in line and "2 of 2" in line and "finished" in line
    assert main(["runs", str(run), "--axis", "steps"]) == 2
