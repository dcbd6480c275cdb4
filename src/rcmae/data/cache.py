"""`--cache ram`: the decoded images in a block of memory that all loader processes share; `--cache device`:
in the memory of the GPU, which cuts out and resizes the crops, a batch at a time."""

import contextlib
import math
import mmap
import shlex
import sys
from collections.abc import Generator, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import Recipe, how_many, readable_size
from ..engine.console import Screen, clock
from ..engine.limits import free_memory
from ..errors import ConfigError
from .augment import LocalCrops
from .base import Source
from .dataset import in_processes, plain_errors
from .decode import SPARE, BadImage
from .loader import processes, sample, try_some
from .pixels import open_image
from .resample import resize
from .views import Cut, Image, Reduced, Stored, shrink

USED, DEVICE_USED = 0.8, 0.5
"Fractions of the free memory, and of that of a GPU, whose rest training needs, that a cache may take."

PIXELS = 2**23
"Pixels of the crops of a batch that are cut out at once, before or after resizing, which limits the memory."


class Decoder(Dataset):
    """Item i is the pixels to keep of image i and its original (height, width), or why it cannot be read."""

    def __init__(self, source: Source, channels: int, side: int):
        self.source, self.channels, self.side = source, channels, side

    def __getitem__(self, index: int) -> tuple[np.ndarray, tuple[int, int]] | str:
        try:
            image = open_image(self.source, index, self.channels)
            return shrink(image, self.side), image.shape[:2]
        except BadImage as e:
            return str(e)


class RamCache:
    """All images of a source, with a shorter side of at most `side`: so many pixels that the smallest crop of
    the recipe, if it is square, is not enlarged.

    Crops lie in the same place of the image as without the cache; of images that are not reduced they have
    the same pixels.
    """

    name = "--cache ram"

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        workers: int | None,
        ranks: int = 1,
        screen: Screen | None = None,
        device: torch.device = torch.device("cpu"),
    ):
        """Estimate the memory, and print it. Raises ConfigError as `check` does, and if that of all `ranks`
        of this machine is more than may be taken; `images` then fills the cache."""
        self.device, self.shape = device, recipe.images.shape
        self.check(recipe)
        views = [(min(recipe.images.shape), max(recipe.images.shape), recipe.images.crop_scale[0])]
        crops = getattr(recipe, "crops", None)
        if isinstance(crops, LocalCrops) and crops.local_crops:
            views.append((crops.local_size, crops.local_size, crops.local_scale[0]))
        self.side = math.ceil(max(size / math.sqrt(low) for _, size, low in views))
        # Larger JPEGs are decoded at a smaller scale without the cache.
        self.exact_side = min(self.side, int(2 * SPARE * min(size for size, _, _ in views)) - 1)
        self.decoder = Decoder(source, recipe.images.channels, self.side)
        self.workers, self.screen = processes(source, workers), screen or Screen(False)
        size, seconds = self._try()
        (self.limit, bound), need = self.bound(ranks), math.ceil(size * len(source))
        if need > self.limit:
            fitting = int(self.side * math.sqrt(0.95 * self.limit / need))
            data = shlex.quote(recipe.data)
            packing = f"reduce the images with `rcmae pack {data} OUT --size {fitting}`, or "
            raise ConfigError(
                f"{self.name} takes about {readable_size(need)} for {how_many(len(source), 'image')}"
                f"{f' in each of {ranks} processes' if ranks > 1 else ''}, and {readable_size(self.limit)} "
                f"may be taken ({bound}); "
                f"{packing if fitting >= max(recipe.images.shape) else ''}leave --cache out"
            )
        self.screen.say(
            f"{self.name}: about {readable_size(need)} of {readable_size(self.limit)} that may be taken, "
            f"filled in about {clock(seconds * len(source) / max(1, self.workers))}"
        )

    def check(self, recipe: Recipe) -> None:
        """Raises ConfigError for a system that it does not support."""
        if sys.platform != "linux":
            raise ConfigError(f"{self.name} needs Linux, whose loader processes share memory; leave it out")

    def bound(self, ranks: int) -> tuple[int, str]:
        """Bytes that each of `ranks` caches may take, and what they are."""
        return int(USED * free_memory() / ranks), f"{USED:.0%} of the free memory"

    def opened(self, index: int) -> Image | Stored:
        """Image `index`, for the views of a method. Raises BadImage."""
        return self.images.opened(index)

    def _try(self) -> tuple[float, float]:
        """Mean bytes, and seconds of one process, of an image."""

        def size(index: int) -> int:
            item = self.decoder[index]
            return 0 if isinstance(item, str) else item[0].nbytes

        return try_some(sample(len(self.decoder.source)), size, self.screen)

    @cached_property
    def images(self) -> "Decoded":
        """The images; the first access reads all. Raises ConfigError if they are larger than may be taken."""
        count = len(self.decoder.source)
        decoded, used = Decoded(count, self.limit), 0
        loader = DataLoader(
            self.decoder,
            batch_sampler=(list(range(i, min(i + 8, count))) for i in range(0, count, 8)),
            collate_fn=list,
            prefetch_factor=4 if self.workers else None,
            **in_processes(self.workers),
        )
        with self.screen.progress(f"filling {self.name}", count) as tick:
            index = 0
            for batch in plain_errors(loader):
                for item in batch:
                    if isinstance(item, str):
                        decoded.bad[index] = item
                    elif (end := used + item[0].nbytes) > self.limit:
                        raise ConfigError(
                            f"{self.name} takes more than the {readable_size(self.limit)} that may be taken, "
                            f"at image {index:,} of {count:,}; leave --cache out"
                        )
                    else:
                        decoded.put(index, used, *item)
                        used = end
                    index += 1
                tick(index)
        reduced = int((decoded.original != decoded.shapes[:, :2]).any(1).sum())
        self.screen.say(
            f"{self.name}: {how_many(count - len(decoded.bad), 'image')} in {readable_size(used)}; "
            + (f"{reduced:,} are reduced to {self.side} px" if reduced else "none is reduced")
        )
        return decoded

    @property
    def changes(self) -> str:
        """What it changes in the pixels of crops; "none" if nothing."""
        shorter = self.images.original.min(1)
        return "none" if shorter.max(initial=0) <= self.exact_side else f"reduced to {self.side} px"


class DeviceCache(RamCache):
    """The images of a `RamCache` on the device, from which `cut` makes a batch of crops: they equal those of
    the RamCache. The images are decoded in main memory, which must hold them too."""

    name, devices = "--cache device", ("cuda",)

    def check(self, recipe: Recipe) -> None:
        """Raises ConfigError also for a method that changes more than the place of its crops, and without a
        GPU."""
        super().check(recipe)
        if hasattr(recipe, "crops"):
            raise ConfigError(
                f"{self.name} only cuts out crops, and {recipe.method} changes their colors too: use "
                "--cache ram"
            )
        if self.device.type not in self.devices:
            raise ConfigError(f"{self.name} needs a GPU with CUDA, not {self.device.type}: use --cache ram")

    def bound(self, ranks: int) -> tuple[int, str]:
        limit, text = super().bound(ranks)
        if self.device.type != "cuda":
            return limit, text
        free = int(DEVICE_USED * torch.cuda.mem_get_info(self.device)[0])
        return min((limit, text), (free, f"{DEVICE_USED:.0%} of the free memory of the GPU"))

    @cached_property
    def images(self) -> "Decoded":
        decoded = super().images
        used = int((decoded.starts + decoded.shapes.prod(1)).max(initial=0))
        channels = self.decoder.channels
        # Images follow one another, so a pixel is a row.
        self.pixels = torch.from_numpy(decoded.block[:used]).view(-1, channels).to(self.device)
        self.starts = torch.from_numpy(decoded.starts // channels).to(self.device)
        self.widths = torch.from_numpy(decoded.shapes[:, 1]).to(self.device)
        if self.pixels.device.type != "cpu":
            decoded.block = np.zeros(0, np.uint8)  # a slice would keep the memory
        return decoded

    def opened(self, index: int) -> Stored:
        images = self.images
        if index in images.bad:
            raise BadImage(images.bad[index])
        (height, width, _), original = images.shapes[index].tolist(), images.original[index].tolist()
        return Stored(index, (height, width), (original[0], original[1]))

    def cut(self, crops: Cut) -> UInt8[Tensor, "b c h w"]:
        """The crops of a batch, on the device."""
        values = torch.stack([torch.as_tensor(v).long() for v in crops])  # [6, b]
        largest = math.prod(map(max, values[3:5].amax(1).tolist(), self.shape))
        return torch.cat([self._cut(part) for part in values.split(max(1, PIXELS // largest), 1)])

    def cut_all(self, batches: Generator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Each of the batches with its crops."""
        # After an error in `cut`, its traceback would keep the loader processes alive.
        with contextlib.closing(batches):
            for batch in batches:
                yield batch | {"image": self.cut(batch["image"])}

    def _cut(self, crops: Int[Tensor, "6 b"]) -> UInt8[Tensor, "b c h w"]:
        rows, columns = (torch.arange(int(n), device=self.device) for n in crops[3:5].amax(1))
        image, top, left, height, width, flipped = crops.to(self.device, non_blocking=True)

        def places(first: Int[Tensor, " b"], length: Int[Tensor, " b"], steps: Int[Tensor, " n"]) -> Tensor:
            return first.unsqueeze(1) + torch.minimum(steps, length.unsqueeze(1) - 1)  # [b, n]

        y, x = places(top, height, rows), places(left, width, columns)
        pixel = (self.starts[image].unsqueeze(1) + y * self.widths[image].unsqueeze(1)).unsqueeze(2)
        images = self.pixels[pixel + x.unsqueeze(1)].permute(0, 3, 1, 2)  # [b, c, rows, columns]
        resized = resize(images, height, width, self.shape)
        return torch.where(flipped.bool()[:, None, None, None], resized.flip(3), resized)


CACHES = {"ram": RamCache, "device": DeviceCache}
"By --cache."


class Decoded:
    """Images of different shapes in one block of memory, which forked processes share."""

    def __init__(self, count: int, limit: int):
        self.block = np.frombuffer(mmap.mmap(-1, limit), dtype=np.uint8)  # taken as it is filled
        self.starts = np.zeros(count, np.int64)
        self.shapes = np.zeros((count, 3), np.int64)
        self.original = np.zeros((count, 2), np.int64)
        self.bad: dict[int, str] = {}

    def put(self, index: int, start: int, pixels: np.ndarray, original: tuple[int, int]) -> None:
        self.block[start : start + pixels.size] = pixels.ravel()
        self.starts[index], self.shapes[index], self.original[index] = start, pixels.shape, original

    def opened(self, index: int) -> Image:
        """Image `index`. Raises BadImage."""
        if index in self.bad:
            raise BadImage(self.bad[index])
        start, shape = int(self.starts[index]), self.shapes[index].tolist()
        pixels = self.block[start : start + math.prod(shape)].reshape(shape)
        h, w = self.original[index].tolist()
        return pixels if shape[:2] == [h, w] else Reduced(pixels, (h, w))
