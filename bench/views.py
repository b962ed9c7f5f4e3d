"""Images a second with two views each, beside MoCo's own pipeline and lightly's: `python -m bench.views`.

All read the same JPEG files, of ImageNet's usual size, on the same cores, and take turns: a round has every
pipeline once, so that other load on the machine is everyone's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from bench.files import result_file
from train_ref import colours
from train_ref.augmentations import Crop, SeveralViews, augmentation, resized
from train_ref.convert import pack
from train_ref.data import DrawnViews, finished_together, together
from train_ref.images import open_image, read_image
from train_ref.machine import describe
from train_ref.markdown import table
from train_ref.stored import Folder, StoredImages, open_images

SIZE = 224  # pixels of a view
WIDTH, HEIGHT, QUALITY = 500, 375, 90  # most of ImageNet's files
NORMALIZE = transforms.Normalize(colours.MEAN, colours.STD)


def make_images(folder: Path, count: int) -> None:
    """JPEG files of photographs: parts of the two that come with scikit-learn, in two classes."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    numbers = np.random.default_rng(0)
    for i in range(count):
        photograph = photographs[i % 2]
        height = int(numbers.uniform(0.6, 1.0) * photograph.height)
        width = height * WIDTH // HEIGHT
        left, top = (
            numbers.integers(0, whole - part + 1)
            for whole, part in ((photograph.width, width), (photograph.height, height))
        )
        part = photograph.crop((left, top, left + width, top + height)).resize((WIDTH, HEIGHT), Image.BICUBIC)
        path = folder / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        part.save(path, quality=QUALITY)


class PillowBlur:
    """MoCo's: Pillow's filter, with a σ from 0.1 to 2."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def moco() -> Callable[[Image.Image], Any]:
    """Two views by MoCo v2's transforms: torchvision's on Pillow's images, as its repository has them."""
    return SeveralViews(
        *[
            transforms.Compose(
                [
                    transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
                    transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                    transforms.RandomGrayscale(p=0.2),
                    transforms.RandomApply([PillowBlur()], p=0.5),
                    transforms.RandomHorizontalFlip(),
                    transforms.ToTensor(),
                    NORMALIZE,
                ]
            )
        ]
        * 2
    )


def torchvision_v2() -> Callable[[Image.Image], Any]:
    """The same by the transforms of torchvision's second version, which this trainer began with."""
    return SeveralViews(
        *[
            v2.Compose(
                [
                    v2.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
                    v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                    v2.RandomGrayscale(p=0.2),
                    v2.RandomApply([v2.GaussianBlur(13, sigma=(0.1, 2.0))], p=0.5),
                    v2.RandomHorizontalFlip(),
                    v2.ToImage(),
                    v2.ToDtype(torch.float32, scale=True),
                    v2.Normalize(colours.MEAN, colours.STD),
                    v2.ToPureTensor(),
                ]
            )
        ]
        * 2
    )


def lightly() -> Callable[[Image.Image], Any]:
    from lightly.transforms import MoCoV2Transform

    return MoCoV2Transform(input_size=SIZE)


def ours(images: StoredImages, collate: Callable[..., Any]) -> dict[str, Any]:
    """A loader's arguments for this trainer's views."""
    drawing = augmentation("moco_v2", SIZE)
    views = DrawnViews(images, SeveralViews(drawing, drawing), seed=0)
    return {"dataset": views, "sampler": [(0, i) for i in range(len(images))], "collate_fn": collate}


def pipelines(folder: Path, packed: Path) -> dict[str, dict[str, Any]]:
    """Of each pipeline, arguments of its loader.

    Args:
        folder: of files.
        packed: where they will be decoded once.
    """
    opened = Folder(folder)
    pack(str(folder), str(packed))
    others = {"MoCo v2": moco, "lightly": lightly, "torchvision v2": torchvision_v2}
    return {
        **{
            name: {"dataset": ImageFolder(str(folder), transform(), loader=open_image)}
            for name, transform in others.items()
        },
        "ours, on CPUs alone": ours(opened, finished_together),
        "ours, without colours": ours(opened, together),
        "ours, decoded once, on CPUs alone": ours(open_images(packed), finished_together),
        "ours, decoded once, without colours": ours(open_images(packed), together),
    }


def measure(loaders: dict[str, DataLoader], rounds: int) -> dict[str, list[float]]:
    """Images a second of each loader, round by round, the first of which does not count."""
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(rounds + 1):
        for name, loader in loaders.items():
            start, batches = time.perf_counter(), iter(loader)
            images = sum(loader.batch_size for _ in batches)
            if number:
                speeds[name].append(images / (time.perf_counter() - start))
        print(f"round {number} of {rounds}", flush=True)
    return speeds


def milliseconds(step: Callable[[Any], Any], inputs: Sequence[Any], repeats: int = 5) -> float:
    """Of one call, on one thread: the shortest of the means over all inputs, in time of the processor."""
    means = []
    for _ in range(repeats):
        start = time.process_time()
        for each in inputs:
            step(each)
        means.append((time.process_time() - start) / len(inputs))
    return 1000 * min(means)


def steps(folder: Path) -> Iterator[tuple[str, float, float]]:
    """The steps of MoCo's pipeline: milliseconds each time that it is taken, MoCo's and ours."""
    torch.set_num_threads(1)
    paths = [path for path, _ in ImageFolder(str(folder)).samples][:48]
    pillow, tensors = [open_image(path) for path in paths], [read_image(path) for path in paths]
    yield "read and decode", milliseconds(open_image, paths), milliseconds(read_image, paths)

    crop = transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0))
    yield "crop", milliseconds(crop, pillow), milliseconds(Crop(SIZE, scale=(0.2, 1.0)), tensors)

    pillow = [image.resize((SIZE, SIZE)) for image in pillow]
    crops = [resized(image, SIZE, SIZE) for image in tensors]
    values = [crop[None].float() for crop in crops]

    def changed(change: Callable[[Tensor, np.ndarray], None], number: float) -> float:
        numbers = np.array([number], dtype=np.float32)
        return milliseconds(lambda each: change(each, numbers), [each.clone() for each in values])

    for name, theirs, change, number in (
        ("brightness", {"brightness": 0.4}, colours.brightness_, 1.2),
        ("contrast", {"contrast": 0.4}, colours.contrast_, 1.2),
        ("saturation", {"saturation": 0.4}, colours.saturation_, 1.2),
        ("hue", {"hue": 0.1}, colours.hue_, 0.05),
    ):
        yield name, milliseconds(transforms.ColorJitter(**theirs), pillow), changed(change, number)
    gray = changed(colours.saturation_, 0.0)
    yield "gray", milliseconds(transforms.Grayscale(3), pillow), gray

    taps = [
        colours.Colours.together([colours.Colours((), (), augmentation("moco_v2", SIZE).steps[3].draw())])
        for _ in range(8 * len(values))
    ]
    taps = [each.taps.numpy() for each in taps if each.taps[0, 0] < 1][: len(values)]
    blurred = list(zip(values, taps, strict=True))
    blur = milliseconds(lambda each: colours.blur_(*each), blurred)
    yield "blur", milliseconds(PillowBlur(), pillow), blur

    flip = milliseconds(v2.RandomHorizontalFlip(p=1), crops)
    yield "mirror", milliseconds(transforms.RandomHorizontalFlip(p=1), pillow), flip
    to_tensor = transforms.Compose([transforms.ToTensor(), NORMALIZE])
    yield "to normalised floats", milliseconds(to_tensor, pillow), milliseconds(colours.normalized, crops)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.views", description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="JSON file (default: in bench/results)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory, "files")
        make_images(folder, arguments.images)
        loaders = {
            name: DataLoader(
                batch_size=32, num_workers=arguments.workers, persistent_workers=True, **settings
            )
            for name, settings in pipelines(folder, Path(directory, "packed")).items()
        }
        speeds = measure(loaders, arguments.rounds)
        of_steps = list(steps(folder))
    reference = speeds["MoCo v2"]
    rows = [
        (
            name,
            f"{median(each):.0f}",
            f"{median(one / other for one, other in zip(each, reference, strict=True)):.2f} ×",
        )
        for name, each in speeds.items()
    ]
    print(f"\nImages a second, two views of {SIZE}² each, {arguments.workers} processes:\n")
    print(table(("pipeline", "images a second", "of MoCo's"), rows))
    print("\nMilliseconds of a step, one thread:\n")
    print(table(("step", "MoCo's", "ours"), [(name, f"{a:.2f}", f"{b:.2f}") for name, a, b in of_steps]))
    machine = describe("cpu", ("torchvision", "pillow", "lightly"))
    output = arguments.output or result_file(machine, "-views")
    output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine,
        "workers": arguments.workers,
        "images": arguments.images,
        "images_per_second": speeds,
        "milliseconds": {name: {"MoCo v2": a, "ours": b} for name, a, b in of_steps},
    }
    output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
