"""Images in memory: the same crops, nothing that does not fit, and resuming says what has changed."""

import multiprocessing
from types import SimpleNamespace

import pytest
import torch

from rcmae.config import RuntimeConfig, changed
from rcmae.data import cache, loader
from rcmae.data.cache import DeviceCache, RamCache
from rcmae.data.dataset import Images
from rcmae.data.pixels import read_image
from rcmae.data.resample import _product, resize
from rcmae.data.sources import open_source
from rcmae.data.views import Cut, _resized, random_resized_crop, rng
from rcmae.errors import ConfigError
from rcmae.methods.mae import CropAndMask
from rcmae.pretraining import Pretraining, pretrain
from rcmae.report.build import rate_figures
from rcmae.trainer import Trainer
from tests.conftest import small
from tests.images import encode, photograph
from tests.mutations import catches

RECIPE = changed(small(), size=16, crop_scale=(0.25, 1.0), flip=True)
VIEW = CropAndMask(RECIPE.images, 16)


def folder(path, sizes, **options) -> str:
    path.mkdir()
    for i, (h, w) in enumerate(sizes):
        (path / f"{i:02}.jpg").write_bytes(encode(photograph(h, w), "JPEG", quality=95, **options))
    return str(path)


@catches(
    "cached images are those before",
    "rcmae.data.cache:Decoded.opened",
    lambda old: lambda self, index: old(self, max(0, index - 1)),
)
def test_crops_of_images_that_are_not_reduced_are_the_same(tmp_path):
    source = open_source(folder(tmp_path / "data", [(20 + i, 45 - i) for i in range(12)]))
    (tmp_path / "data" / "03.jpg").write_bytes(b"no image")
    for workers in (0, 2):
        cached = RamCache(source, RECIPE, workers)
        assert cached.side == 32 and cached.changes == "none"
        plain, fast = Images(source, VIEW, 7), Images(source, VIEW, 7, opened=cached.images.opened)
        for epoch in range(2):
            for i in range(len(source)):
                a, b = plain[epoch, i], fast[epoch, i]
                assert torch.equal(a["image"], b["image"]) and a["bad"] == b["bad"], i


@catches(
    "crops of reduced images lie elsewhere",
    "rcmae.data.views:Reduced.crop",
    lambda old: lambda self, box, shape: old(self, (box[0], 0, *box[2:]), shape),
)
def test_crops_of_reduced_images_lie_in_the_same_place(tmp_path):
    source = open_source(folder(tmp_path / "data", [(240, 320), (333, 250)]))
    cached = RamCache(source, RECIPE, 0)
    assert cached.changes == "reduced to 32 px"
    for i in range(2):
        assert min(cached.images.shapes[i, :2]) == 32
        pixels = read_image(source, i, 3)
        for epoch in range(20):
            crops = [
                random_resized_crop(image, (16, 16), (0.25, 1.0), rng(0, epoch, i)).int()
                for image in (pixels, cached.images.opened(i))
            ]
            assert (crops[0] - crops[1]).abs().float().mean() < 8
    tall = cached.images.opened(1)
    assert tall.shape == (333, 250, 3) and tall.crop((332, 249, 1, 1), (16, 16)).shape == (1, 1, 3)


@catches(
    "resized crops are rounded down",
    "rcmae.data.resample:_weighted",
    lambda old: lambda images, lengths, size: old(images.clamp(1) - 1, lengths, size),
)
@catches(
    "weights have fewer bits",
    "rcmae.data.resample:weights_of",
    lambda old: lambda *a: tuple(n >> 1 if n.dim() == 3 else n - 1 for n in old(*a)),
)
@pytest.mark.parametrize("shape", [(64, 64), (24, 31), (224, 160)])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_resized_batches_are_those_of_torchvision_bit_for_bit(shape, precision):
    generator = torch.Generator().manual_seed(0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)  # medium: factors may be bfloat16
    try:
        for height, width in [(4 * shape[0], 4 * shape[1]), shape, (7, 90), (1, 1), (1500, 40), (3, 4000)]:
            pixels = torch.randint(0, 256, (3, 3, height, width), generator=generator, dtype=torch.uint8)
            pixels[1:] = 255 * (pixels[1:] > 127)  # whose resized values lie outside 0 to 255
            sizes = [torch.randint((n + 1) // 2, n + 1, (3,), generator=generator) for n in (height, width)]
            for image, h, w, resized in zip(pixels, *sizes, resize(pixels, *sizes, shape), strict=True):
                assert torch.equal(resized, by_torchvision(image[:, :h, :w], shape))
    finally:
        torch.set_float32_matmul_precision(before)


@catches(
    "weights are multiplied at once",
    "rcmae.data.resample:_product",
    lambda old: lambda weights, values: (weights.float() @ values).long(),
)
def test_products_of_integers_are_exact():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(2**15 - 99, 2**15, (5, 1000), generator=generator)
    values = torch.randint(-128, 128, (1000, 7), generator=generator)
    for w, v in ((weights, values), (-weights, values), (weights, values.abs().clamp(100, 127))):
        assert torch.equal(_product(w, v.float()), w @ v)


def by_torchvision(image: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    return _resized(image.permute(1, 2, 0).numpy(), (0, 0, *image.shape[1:]), shape)


@catches(
    "crops of the device are not flipped",
    "rcmae.data.cache:DeviceCache.cut",
    lambda old: lambda self, crops: old(self, crops._replace(flipped=0 * crops.flipped)),
)
def test_a_run_with_the_device_cache_equals_one_with_the_ram_cache(tmp_path, monkeypatch, capsys):
    data = folder(tmp_path / "data", [(20 + 9 * i, 95 - 3 * i) for i in range(11)])
    (tmp_path / "data" / "03.jpg").write_bytes(b"no image")
    monkeypatch.setattr(DeviceCache, "devices", ("cpu",))  # slower than --cache ram there
    monkeypatch.setattr(cache, "PIXELS", 3000)  # a batch is cut out in several parts
    weights = {}
    for method in ("rcmae", "data2vec"):
        recipe = changed(small(method), size=16, crop_scale=(0.25, 1.0), flip=True, data=data, steps=3)
        for kind, workers in (("ram", 1), ("device", 0), ("device", 2)):
            out = tmp_path / f"{method}-{kind}-{workers}"
            pretrain(recipe, RuntimeConfig(out=out, cache=kind, workers=workers, device="cpu"))
            saved = (out / "checkpoints").glob("step_*3/model.safetensors")
            weights[method, kind, workers] = next(saved).read_bytes()
            assert (out / "bad_files.jsonl").is_file()
        assert len({v for (name, *_), v in weights.items() if name == method}) == 1
    assert not multiprocessing.active_children(), "they would keep the interpreter from exiting"
    printed = capsys.readouterr().out
    assert "--cache device: 10 images in" in printed and "are reduced to 32 px" in printed


def test_what_the_device_cache_cannot_do_is_refused(tmp_path, monkeypatch):
    source = open_source(folder(tmp_path / "data", [(240, 320)] * 8))
    with pytest.raises(ConfigError, match="only cuts out crops, and dino changes their colors too"):
        DeviceCache(source, changed(small("dino"), size=16), 0)
    with pytest.raises(ConfigError, match="needs a GPU with CUDA, not cpu"):
        DeviceCache(source, RECIPE, 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40_000, 80_000))
    message = "--cache device takes about 33 kB.*20 kB may be taken .50% of the free memory of the GPU"
    with pytest.raises(ConfigError, match=message):
        DeviceCache(source, RECIPE, 0, device=torch.device("cuda"))


def test_the_device_cache_leaves_main_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(DeviceCache, "devices", ("meta",))
    source = open_source(folder(tmp_path / "data", [(24, 32)] * 3))
    cached = DeviceCache(source, RECIPE, 0, device=torch.device("meta"))
    assert cached.images.block.base is None and len(cached.images.block) == 0
    assert cached.pixels.shape == (3 * 24 * 32, 3) and cached.opened(2).stored == (24, 32)


def test_parts_of_a_batch_are_limited_before_and_after_resizing(tmp_path, monkeypatch):
    parts: list[int] = []
    monkeypatch.setattr(DeviceCache, "devices", ("cpu",))
    monkeypatch.setattr(DeviceCache, "_cut", lambda self, crops: parts.append(crops.shape[1]) or crops[0])
    monkeypatch.setattr(cache, "PIXELS", 512)
    source = open_source(folder(tmp_path / "data", [(24, 32)] * 3))
    cached = DeviceCache(source, RECIPE, 0)
    for side, expected in ((4, [2, 2, 1]), (20, [1] * 5)):  # enlarged to 16, reduced
        cached.cut(Cut(torch.arange(5), *torch.tensor([0, 0, side, side, 0]).unsqueeze(1).expand(5, 5)))
        assert parts == expected
        parts.clear()


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    source = open_source(folder(tmp_path / "data", [(240, 320)] * 8))
    monkeypatch.setattr(cache, "free_memory", lambda: 25_000)
    message = (
        r"takes about 33 kB for 8 images, and 20 kB may be taken.*`rcmae pack .* OUT --size 24`, or leave"
    )
    with pytest.raises(ConfigError, match=message):
        RamCache(source, RECIPE, 0)
    monkeypatch.setattr(cache, "free_memory", lambda: 100_000)
    with pytest.raises(ConfigError, match="in each of 3 processes"):
        RamCache(source, RECIPE, 0, ranks=3)
    full = RamCache(source, RECIPE, 0)
    full.limit = 30_000  # the estimate was too low
    with pytest.raises(ConfigError, match="takes more than the 30 kB that may be taken, at image 7 of 8"):
        _ = full.images


@catches(
    "a resumed run does not notice another cache", "rcmae.data.cache:RamCache.changes", lambda old: "none"
)
def test_a_run_with_the_cache_is_the_same_and_another_one_says_what_changes(tmp_path, capsys):
    recipe = changed(RECIPE, data=folder(tmp_path / "data", [(20, 30)] * 8), steps=2)
    weights = {}
    for kind in ("none", "ram"):
        pretrain(recipe, RuntimeConfig(out=tmp_path / kind, cache=kind, workers=1, device="cpu"))
        weights[kind] = next((tmp_path / kind / "checkpoints").glob("step_*2/model.safetensors")).read_bytes()
    assert weights["none"] == weights["ram"]
    assert "--cache ram: 8 images in 14 kB; none is reduced" in capsys.readouterr().out
    recipe = changed(recipe, data=folder(tmp_path / "large", [(40, 60)] * 8), steps=1)
    for kind in ("ram", "none"):
        pretrain(recipe, RuntimeConfig(out=tmp_path / "large run", cache=kind, workers=0, device="cpu"))
    printed = capsys.readouterr().out
    assert "8 are reduced to 32 px" in printed
    assert not multiprocessing.active_children(), "they would keep the interpreter from exiting"
    assert "note: cache was reduced to 32 px and is now none: the resumed run will not be bitwise" in printed


@catches(
    "the start method is Python's default",
    "rcmae.data.loader:in_processes",
    lambda old: lambda workers: {"num_workers": workers},
)
def test_loader_processes_share_the_cache_whatever_the_default_start_method(tmp_path):
    """From Python 3.14 on it is not fork."""
    recipe = changed(RECIPE, data=folder(tmp_path / "data", [(40, 40)] * 12), steps=1, batch_size=4)
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        pretrain(recipe, RuntimeConfig(out=tmp_path / "run", cache="ram", workers=1, device="cpu"))
    finally:
        multiprocessing.set_start_method(None, force=True)


@catches(
    "the cache is filled later", "rcmae.pretraining:Pretraining.fill_cache", lambda old: lambda self: None
)
def test_all_ranks_fill_the_cache_at_once_and_a_finished_run_does_not(tmp_path, monkeypatch, capsys):
    """Rank 0 alone measures the baselines and saves, so the cache is full before that on every rank."""
    recipe = changed(RECIPE, data=folder(tmp_path / "data", [(40, 60)] * 8), steps=1)
    runtime = RuntimeConfig(out=tmp_path / "run", cache="ram", workers=0, device="cpu")
    full, environment = [], Pretraining.environment
    monkeypatch.setattr(Pretraining, "environment", lambda run: full.append(run.reduced) or environment(run))
    pretrain(recipe, runtime)
    assert full and set(full) == {"reduced to 32 px"}
    capsys.readouterr()
    pretrain(recipe, runtime)
    printed = capsys.readouterr().out
    assert "is finished at step 1" in printed and "reduced" not in printed and "note: cache" not in printed


@catches(
    "a process for each core, for any number of images",
    "rcmae.data.loader:processes",
    lambda old: lambda source, workers: loader.usable_cores() - 1,
)
def test_small_sets_have_few_loader_processes(monkeypatch):
    for cores, images, expected in ((64, 10, 1), (64, 640, 20), (64, 10**6, 63), (1, 640, 1)):
        monkeypatch.setattr(loader, "usable_cores", lambda cores=cores: cores)
        source = type("source", (), {"in_memory": False, "__len__": lambda self, n=images: n})()
        assert loader.processes(source, None) == expected
        assert loader.processes(source, 99) == 99


@pytest.mark.parametrize(
    ("workers", "load", "advice"),
    [(2, 1.0, "give --workers 7"), (7, 1.0, "pack"), (2, 9.0, "pack"), (None, 1.0, "give --workers 7")],
)
def test_advice_on_slow_loading(workers, load, advice, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "usable_cores", lambda: 8)
    monkeypatch.setattr(loader.os, "getloadavg", lambda: (load, load, load))
    source = open_source(folder(tmp_path / "data", [(9, 9)]))
    assert loader.faster(source, workers, "pack") == advice


def test_waiting_for_data_is_noted_once():
    notes, events = [], []
    run = SimpleNamespace(
        waits=[],
        faster_loading=lambda: "try packing",
        screen=SimpleNamespace(say=notes.append),
        write=lambda kind, **values: events.append({"kind": kind, **values}),
    )
    for fraction in (0.3, 0.0, 0.0, 0.0, 0.1, 0.0, 0.5, 0.5, 0.9, 0.9):
        Trainer.note_waiting(run, fraction)
    assert notes == ["note: 12% of the time is spent waiting for data; try packing"]
    train = [{"step": 1, "lr": 1.0, "images_per_s": 1.0, "data_wait": 0.5, "grad_norm": 1.0}]
    assert any("To shorten it, try packing." in caption for caption in rate_figures(train, events))
    assert not any("shorten" in caption for caption in rate_figures(train, []))
