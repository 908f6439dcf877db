"""Embed pictures with a backbone: a folder of vectors for search, curation and analysis.

usage: dinov2 embed BACKBONE SOURCE output=DIR [key=value …]

BACKBONE is a backbone folder, timm:NAME, or a weights file with ?architecture=…; SOURCE a folder of pictures,
tars, a manifest or a list. The folder holds fp16 rows (00000.npy …), ids.parquet and meta.json. A killed
command continues when it is run again.
"""

from dataclasses import dataclass
from pathlib import Path

from dinov2.config import at_least, one_of, read, required, runtime
from dinov2.console import run
from dinov2.data.sources import open_source
from dinov2.features import PRECISIONS, BackboneEmbedder, embed
from dinov2.folders import claim
from dinov2.models import load_backbone
from dinov2.parallel import pick_device


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    backbone: str = required()  # a backbone folder, timm:NAME, or weights?architecture=…; or the first word
    source: str = required()  # the pictures; or the second word
    output: str = runtime(required())  # the folder to write
    size: int = 224  # pixels along a side of what the backbone sees
    resize: int | None = None  # pixels of the short side before the crop; null: 256 for 224, in proportion
    token: str = "cls"  # parts joined by +: cls, cls4 (of the last four blocks), mean (of the patch tokens)
    normalised: bool = False  # vectors of length 1
    precision: str = "float32"  # or bfloat16, float16: what autocast uses
    rows_per_file: int = 8192  # also what a killed command loses at most
    at_least: int | None = None  # short side of JPEGs decoded at a reduced scale; faster, not equal
    batch: int = runtime(64)  # pictures at once
    workers: int = runtime(0)  # processes that decode
    device: str = runtime("auto")  # auto, cpu, cuda, cuda:1, …
    cache: str | None = runtime(None)  # folder for tar indexes; null: ~/.cache/dinov2


def main(words: list[str]) -> None:
    """Run the command; the first two words without = are backbone and source."""
    config = read(EmbedConfig, _named(words), doc=__doc__ or "")
    one_of(config.precision, PRECISIONS, "precision")
    at_least(1, config, "rows_per_file", "batch", "size")
    at_least(0, config, "workers")
    device = pick_device(config.device)
    source = open_source(config.source, cache=Path(config.cache) if config.cache else None)
    embedder = BackboneEmbedder(
        load_backbone(config.backbone, device=device),
        size=config.size,
        resize=config.resize,
        token=config.token,
        normalised=config.normalised,
        device=device,
        dtype=PRECISIONS[config.precision],
    )
    with claim(config.output, config) as folder:
        found = embed(
            source,
            embedder,
            folder,
            rows_per_file=config.rows_per_file,
            batch=config.batch,
            workers=config.workers,
            at_least=config.at_least,
            what=f"embed {source.name}",
        )
    unreadable = len(found.meta["unreadable"])
    note = f"; {unreadable:,} unreadable pictures are named in meta.json" if unreadable else ""
    print(f"{config.output}: {len(found):,} vectors of {found.shape[1]} dimensions{note}")


def _named(words: list[str]) -> list[str]:
    """`BACKBONE SOURCE` as `backbone=… source=…`."""
    named = []
    for key, word in zip(("backbone", "source"), words, strict=False):
        if word.startswith("-") or word.partition("=")[0] in EmbedConfig.__dataclass_fields__:
            break
        named.append(f"{key}={word}")
    return named + words[len(named) :]


if __name__ == "__main__":
    run(main, "embed")
