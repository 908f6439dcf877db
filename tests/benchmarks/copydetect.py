"""Finding edited copies again: the built-in descriptor against backbones, on pictures that none has seen.

usage: python -m tests.benchmarks.copydetect references=SOURCE
           [backbones=SPEC,SPEC] [queries=400] [size=64] [seed=0]

Every query is a reference with one edit; the references that are not asked for are distractors. The edits are
of this file alone: what training draws is of the same kinds at the most. Prints recall at 1 by edit, and
micro-AP over all queries (the nearest references of all ranked together by similarity, as on DISC21), in
percent.
"""

import io
import sys
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.metrics import average_precision_score

from curation.descriptor import Whitening, describe
from curation.looks import THUMB
from curation.synthetic import changes
from dinov2.data.decode import decode
from dinov2.data.sources import open_source
from dinov2.features import BackboneEmbedder
from dinov2.models import load_backbone

Draw = np.random.Generator


def _cropped(image: Image.Image, draw: Draw) -> Image.Image:
    side = draw.uniform(0.5, 0.8)
    wide, high = (round(length * side) for length in image.size)
    left, top = int(draw.integers(image.width - wide + 1)), int(draw.integers(image.height - high + 1))
    return image.crop((left, top, left + wide, top + high))


def _framed(image: Image.Image, draw: Draw) -> Image.Image:
    return ImageOps.expand(
        image, round(min(image.size) * draw.uniform(0.1, 0.35)), fill=int(draw.integers(1 << 24))
    )


def _pasted(image: Image.Image, draw: Draw) -> Image.Image:
    """A third to two thirds of the side, on noise: a picture in a picture."""
    noise = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
        image.size, Image.Resampling.BICUBIC
    )
    side = draw.uniform(0.4, 0.7)
    small = image.resize((max(1, round(image.width * side)), max(1, round(image.height * side))))
    noise.paste(
        small,
        (
            int(draw.integers(image.width - small.width + 1)),
            int(draw.integers(image.height - small.height + 1)),
        ),
    )
    return noise


def _recoloured(image: Image.Image, draw: Draw) -> Image.Image:
    for quality in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = quality(image).enhance(draw.choice([draw.uniform(0.4, 0.7), draw.uniform(1.4, 2.0)]))
    return image


def _compressed(image: Image.Image, draw: Draw) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(draw.integers(4, 12)))
    return Image.open(file).convert("RGB")


def _covered(image: Image.Image, draw: Draw) -> Image.Image:
    """A bar of one colour across a quarter to 40% of the picture."""
    high = round(image.height * draw.uniform(0.25, 0.4))
    bar = Image.new("RGB", (image.width, high), tuple(int(c) for c in draw.integers(0, 256, 3)))
    image.paste(bar, (0, int(draw.integers(image.height - high + 1))))
    return image


EDITS: dict[str, Callable[[Image.Image, Draw], Image.Image]] = {
    "crop": _cropped,
    "frame": _framed,
    "pasted": _pasted,
    "colours": _recoloured,
    "jpeg": _compressed,
    "bar": _covered,
    "mirror": lambda image, draw: ImageOps.mirror(image),
    "turn 20°": lambda image, draw: image.rotate(20 * draw.choice([-1, 1]), Image.Resampling.BICUBIC),
    "blur": lambda image, draw: image.filter(
        ImageFilter.GaussianBlur(min(image.size) * draw.uniform(0.015, 0.03))
    ),
    "grey": lambda image, draw: image.convert("L").convert("RGB"),
}


def main(words: list[str]) -> None:
    given = {"backbones": "", "queries": "400", "size": "64", "seed": "0"} | dict(
        word.split("=", 1) for word in words
    )
    source = open_source(given["references"])
    references = [decode(source.read(row)) for row in range(len(source))]
    draw = np.random.default_rng(int(given["seed"]))
    asked = draw.permutation(len(references))[: int(given["queries"])]
    names = [list(EDITS)[number % len(EDITS)] for number in range(len(asked))]
    queries = [EDITS[name](references[row].copy(), draw) for name, row in zip(names, asked, strict=True)]
    print(f"{len(references):,} references, {len(queries)} queries\n")
    print("| | " + " | ".join(["micro-AP", "recall at 1", *EDITS]) + " |\n|" + "---|" * (len(EDITS) + 3))
    _report("built-in descriptor, whitened", *_described(references, queries, draw), asked, names)
    for spec in filter(None, given["backbones"].split(",")):
        embed = BackboneEmbedder(
            load_backbone(spec), size=int(given["size"]), resize=int(given["size"]), normalised=True
        )
        _report(spec, _embedded(embed, references), _embedded(embed, queries), asked, names)


def _report(name: str, references: NDArray, queries: NDArray, asked: NDArray, names: list[str]) -> None:
    similarity = queries @ references.T
    nearest = similarity.argmax(axis=1)
    hit = nearest == asked
    best = similarity[np.arange(len(queries)), nearest]
    # a query whose nearest is wrong can no longer be found: the sum of precisions is over all queries
    micro = average_precision_score(hit, best) * hit.mean() if hit.any() else 0.0
    shares = [hit[[n == edit for n in names]].mean() for edit in EDITS]
    print(
        f"| {name} | " + " | ".join(f"{100 * share:.1f}" for share in (micro, hit.mean(), *shares)) + " |",
        flush=True,
    )


def _described(
    references: list[Image.Image], queries: list[Image.Image], draw: Draw
) -> tuple[NDArray, NDArray]:
    """As curation does, whitened on the references."""
    thumbs = [
        np.asarray(image.resize((THUMB, THUMB), Image.Resampling.BICUBIC))
        for image in [*references, *queries]
    ]
    raw = np.stack([describe(thumb) for thumb in thumbs])
    known, copied = raw[: len(references)], min(1000, len(references))
    moved = changes(np.stack(thumbs[:copied]), known[:copied], draw)
    white = Whitening.fit(known, moved, 256)(raw)
    return white[: len(references)], white[len(references) :]


def _embedded(embed: BackboneEmbedder, images: list[Image.Image]) -> NDArray:
    parts = [images[start : start + 50] for start in range(0, len(images), 50)]
    return torch.cat([embed(torch.stack([embed.prepare(image) for image in part])) for part in parts]).numpy()


if __name__ == "__main__":
    main(sys.argv[1:])
