"""The settings of `dinov2 curate`, one section a stage."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from curation import bounds
from dinov2.config import by_name, listed, one_of, required, runtime, section
from dinov2.exits import UserError

BUILT_IN = "descriptor"
SAMPLING = {"balanced", "uniform"}
COLLISIONS = {"keep", "drop", "refill"}
MODES = {"samples", "clusters", "auto"}
CHAINS = {"whole", "direct"}
METHODS = {"components", "semdedup"}
KEEP = {"largest", "first", "most_central"}
READINGS = {"any", "kept"}
TURNED = {"mirrored", "all", "none"}  # by the built-in descriptor; others do not know turned pictures
ENGINES = {"auto", "exact", "ivf"}
FITS = {"crop", "squeeze"}
FLAGS = {"small", "blank", "aspect"}

# The stages in their order, and what each is told: a setting, or a section.
TOLD = {
    "ingest": ("pool", "seeds", "holdout", "as_is", "ingest"),
    "filters": ("filters",),
    "embed": ("backbone", "seed", "embed"),
    "calibrate": ("calibrate",),
    "duplicates": ("duplicates", "search"),
    "holdout": ("leaks",),
    "clusters": ("clusters",),
    "retrieval": ("retrieval",),
    "budget": ("budget",),
    "write": ("write",),
    "report": ("report",),
}
# Of which earlier stages' settings what a stage searches for depends, where not of all of READ.
READ = ("ingest", "filters", "embed")
READ_BY = {"filters": ("ingest",), "embed": ("ingest",)}
# Settings of later stages that a stage reads too.
ALSO = {
    "calibrate": (
        *(f"duplicates.{name}" for name in ("hash_distance", "k", "cosine", "always", "verify")),
        *(f"duplicates.{name}" for name in ("views", "view_distance", "turned", "turned_cosine")),
        *(f"duplicates.{name}" for name in ("tilted", "tilts")),
        *(f"{section}.{name}" for section in ("duplicates", "leaks") for name in ("threshold", "loosest")),
        *(f"search.{name}" for name in ("engine", "recall", "floor", "index")),
        "leaks.verify",
        "leaks.cosine",
    )
}
# What is decided with what was read or searched for; all else is for reading and searching.
DECIDING = {
    "enabled",
    "chains",
    "loosest",
    "threshold",
    "precision",
    "leaks",
    "most",
    "method",
    "keep",
    "split",
    "eps",
    "reading",
    "drop",
    "licences",
    "consents",
}


def stage_of(key: str) -> str:
    """The first stage that is told of the setting with this dotted key."""
    return next(stage for stage, told in TOLD.items() if key.partition(".")[0] in told)


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    piece: int = 512  # pictures in one resumable unit of work
    small: int = 16  # short side under this many pixels: flag "small"
    blank: float = 1.0  # spread of the luma under this many levels of 255: flag "blank"
    aspect: float = 10.0  # long side over this many short sides: flag "aspect"
    drop: list[str] = listed("small", "blank", "aspect")  # pictures with these flags are dropped
    licences: list[str] = listed()  # only pictures with one of these licences stay; []: any, or none
    consents: list[str] = listed()  # likewise of consent
    max_pixels: int = 178_956_970  # larger pictures are recorded as unreadable (decompression bombs)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """An image classifier by path; nothing is downloaded."""

    model: str = ""  # folder of a transformers or timm classifier, or a TorchScript file
    sha256: str = ""  # of its model.safetensors, or of the file
    label: str = ""  # class whose probability is the score: its name, or its number
    most: float = 0.5  # pictures with a higher score are dropped
    size: int | None = None  # side of the square that it sees; null: as its folder says, or 224
    mean: list[float] = listed(0.5, 0.5, 0.5)  # of pixels from 0 to 1, where its folder does not say
    std: list[float] = listed(0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class FacesConfig:
    blur: bool = False  # pictures with faces are written with them blurred; all others keep their bytes
    detector: str | None = None  # a cascade file of OpenCV's; null: the frontal one of opencv-python-headless
    sha256: str | None = None  # of that file
    neighbours: int = 5  # detections of one face that make it count; fewer find more, and more that is none
    smallest: float = 0.05  # side of a face, of the picture's short side
    grow: float = 0.15  # margin around a face, of its side


@dataclass(frozen=True, kw_only=True)
class FiltersConfig:
    classifiers: dict[str, ClassifierConfig] = by_name()  # such as filters.classifiers.nsfw.model=…
    faces: FacesConfig = section(FacesConfig)


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    dimension: int = 256  # of the built-in descriptor after whitening
    sample: int = 20_000  # pool pictures that its whitening is fitted on
    copied: int = 400  # of these, so many are copied to see what copying changes
    size: int | None = None  # side of the square picture that a backbone sees, pixels; null: what it learnt
    fit: str = "crop"  # a backbone sees the "crop" of the centre, or the whole picture by a "squeeze"
    token: str = "cls"  # what is taken from a backbone: "cls", "mean", "cls+mean", "cls4"
    batch: int = runtime(64)  # pictures at a time through a backbone


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """Thresholds that are null are chosen on synthetic copies of the pool's own pictures."""

    pictures: int = 0  # of the pool that are copied in 16 kinds, to see what a threshold finds; 0: none
    among: int = 20_000  # pictures of the pool that copies are looked for in
    precision: float = 0.95  # of pairs, from duplicates.threshold on, if every picture had one copy
    leaks: float = 0.8  # likewise from leaks.threshold on


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How nearest neighbours by embedding are searched."""

    engine: str = "auto"  # "exact", "ivf" (FAISS), or by the number of pictures
    memory_gib: float = runtime(4.0)  # bound on what a search holds besides 100 bytes a picture
    recall: float = 0.97  # ivf: of the ten nearest, aimed at; it decides how many lists are probed
    floor: float = 0.95  # ivf: recall on a sample under which the run stops
    index: str = "auto"  # ivf: a FAISS factory string such as OPQ64,IVF65536,PQ64x4fs
    device: str = runtime("cpu")  # exact: where products are computed


@dataclass(frozen=True, kw_only=True)
class NearConfig:
    """How pairs of near-identical pictures are found: candidates by hash and embedding, then verified."""

    hash_distance: int = 8  # candidates: perceptual or PCA hashes that differ in at most this many of 64 bits
    k: int = 64  # candidates: nearest neighbours by embedding (DINOv2 app. A)
    cosine: float = 0.4  # candidates: of these, those of at least this cosine
    always: int = 4  # candidates: so many nearest neighbours whatever their cosine
    verify: bool = True  # similarity is the alignment's score; else the cosine itself, and no views
    views: bool = True  # candidates: also turned pictures, and halves and quarters of them, by their hashes
    view_distance: int = 5  # of these hashes, bits
    turned: str = "mirrored"  # neighbours by embedding also of pictures "mirrored", in "all" turns, or "none"
    crops: bool = False  # neighbours by embedding also of five windows of each picture, by the descriptor
    turned_cosine: float = 0.5  # candidates: of these two, those of at least this cosine
    tilted: float = 0.25  # nearest pairs from this cosine on are also tried tilted and recoloured
    tilts: int = 1  # so many of the nearest of each picture
    loosest: float = 0.5  # edges are stored from this similarity on
    threshold: float | None = None  # edges count from here on; null: calibrated, or see curation.calibrate

    @property
    def turns(self) -> Sequence[int]:
        """Turns (`curation.views`) of which neighbours by embedding are asked for."""
        return {"mirrored": range(1, 2), "all": range(1, 8), "none": ()}[self.turned] if self.verify else ()


@dataclass(frozen=True, kw_only=True)
class SemDeDupConfig:
    clusters: int | None = None  # of spherical k-means; null: the square root of the pictures
    eps: float = 0.05  # who has a cosine above 1 - eps to one ranked before goes; it belongs to the embedding
    reading: str = "any"  # one ranked before counts also if it went itself; "kept": only one that stays


@dataclass(frozen=True, kw_only=True)
class DuplicatesConfig(NearConfig):
    enabled: bool = True  # off: every readable picture stays
    method: str = "components"  # "components" of near pairs (DINOv2), or "semdedup"
    keep: str = "largest"  # who stays: the "largest" (pixels, bytes), "first" (by uri) or "most_central"
    chains: str = "whole"  # "whole": one of a component stays; "direct": also who has no edge to it
    split: int | None = None  # larger components are cut at their weakest edges into ones of at most so many
    semdedup: SemDeDupConfig = section(SemDeDupConfig)


@dataclass(frozen=True, kw_only=True)
class LeaksConfig(NearConfig):
    """As for duplicates, between the pool and the holdout; looser, as a leak costs more than a picture."""

    cosine: float = 0.25
    always: int = 16
    turned_cosine: float = 0.3
    tilts: int = 3


@dataclass(frozen=True, kw_only=True)
class ClustersConfig:
    """Hierarchical k-means (arXiv 2405.15613), the finest level first."""

    levels: list[int] = (
        listed()
    )  # clusters on each level, falling; []: the square root of the pool, if needed
    resamplings: int = 0  # times that each level is fitted again to the members nearest to its centroids
    nearest: int = 3  # of each cluster, for that
    rounds: int = 50  # of k-means, at most
    memory_gib: float = 1.0  # bound on what clustering holds besides 12 bytes a picture and the centroids
    device: str = runtime("cpu")  # where products are computed


@dataclass(frozen=True, kw_only=True)
class SetConfig:
    """How one set of seeds asks; what is null is as for all sets."""

    mode: str | None = None  # "samples", "clusters" or "auto"
    k: int | None = None  # pictures for each seed
    collisions: str | None = None  # "keep", "drop" or "refill"
    minimum: float | None = None  # least cosine to the seed
    more_than: int | None = None  # seeds that a cluster holds for the set to ask for it
    each: int | None = None  # pictures of each such cluster
    cap: int | None = None  # pictures for the set


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    mode: str = "samples"  # by nearest "samples" or by "clusters"; "auto": samples for large sets of seeds
    large: int = 1_000_000  # seeds from which "auto" goes by samples (DINOv2 app. A)
    k: int = 4  # samples: pool pictures for each seed (DINOv2 app. A: 4, or 32 for ImageNet-1k)
    collisions: str = "keep"  # who gets what several seeds ask for: all ("keep"), or one: "drop", "refill"
    minimum: float = -1.0  # samples: least cosine to the seed
    clusters: int | None = None  # clusters of the pool; null: the square root of its pictures
    more_than: int = 3  # clusters: a set asks for those that hold more than so many of its seeds
    each: int = 10_000  # clusters: at most so many random pictures of each
    cap: int | None = None  # at most so many pictures for a set
    sets: dict[str, SetConfig] = by_name()  # for the set of that name (seeds=NAME=…,…) only
    only: bool = True  # what no seed asks for goes; false: it may still be drawn by budget.clustered

    def of(self, name: str, seeds: int) -> "RetrievalConfig":
        """The settings of the set of this name with so many seeds: its mode is "samples" or "clusters"."""
        own = self.sets.get(name, SetConfig())
        fields = ((field.name, getattr(own, field.name)) for field in dataclasses.fields(own))
        mine = dataclasses.replace(self, **{key: value for key, value in fields if value is not None})
        if mine.mode != "auto":
            return mine
        return dataclasses.replace(mine, mode="samples" if seeds >= self.large else "clusters")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    pictures: int | None = None  # at most so many pictures stay; null: all
    sampling: str = "balanced"  # "balanced" over clusters of the embedding, or "uniform"
    retrieved: float = 1.0  # weight of what seeds asked for (all, without seeds) in the mix
    clustered: float = 0.0  # weight of a sample of all others; with seeds it wants retrieval.only=false


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    shard: int = 1000  # pictures in a shard


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    cards: int = 20_000  # at most so many copies, leaks, groups, … are shown in the pages beside the report


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    pool: str = required()  # source of the pictures to choose from
    seeds: str | None = None  # source of pictures whose like is wanted
    holdout: str | None = None  # source of pictures that must not leak into the result
    as_is: str | None = None  # source of more pictures of the pool, that stay whatever seeds and budget say
    output: str = runtime(required())  # folder for decisions, manifest, shards and report
    backbone: str = BUILT_IN  # what embeds: "descriptor", or a backbone folder, timm:NAME, a file
    seed: int = 0  # of the sampling
    stop_after: str | None = runtime(None)  # name of the last stage to run
    from_stage: str | None = runtime(None)  # this stage and later ones run again, where settings may be new
    shard: str | None = runtime(
        None
    )  # i/n: only that part of the stage to be done; "merge": put parts together
    workers: int = runtime(0)  # processes; 0: one a core
    device: str = runtime("cpu")  # where a backbone runs
    cache: str | None = runtime(None)  # folder for tar indexes and what comes from URLs; null: the user's
    ingest: IngestConfig = section(IngestConfig)
    filters: FiltersConfig = section(FiltersConfig)
    embed: EmbedConfig = section(EmbedConfig)
    calibrate: CalibrateConfig = section(CalibrateConfig)
    duplicates: DuplicatesConfig = section(DuplicatesConfig)
    leaks: LeaksConfig = section(LeaksConfig)
    clusters: ClustersConfig = section(ClustersConfig)
    search: SearchConfig = section(SearchConfig)
    retrieval: RetrievalConfig = section(RetrievalConfig)
    budget: BudgetConfig = section(BudgetConfig)
    write: WriteConfig = section(WriteConfig)
    report: ReportConfig = section(ReportConfig)

    def check(self) -> None:
        """Raises UserError for a value that no stage could work with."""
        bounds.check(self)
        one_of(self.embed.fit, FITS, "embed.fit")
        one_of(self.search.engine, ENGINES, "search.engine")
        one_of(self.duplicates.turned, TURNED, "duplicates.turned")
        one_of(self.leaks.turned, TURNED, "leaks.turned")
        one_of(self.duplicates.chains, CHAINS, "duplicates.chains")
        one_of(self.duplicates.method, METHODS, "duplicates.method")
        one_of(self.duplicates.keep, KEEP, "duplicates.keep")
        one_of(self.duplicates.semdedup.reading, READINGS, "duplicates.semdedup.reading")
        for name, own in {"": self.retrieval, **self.retrieval.sets}.items():
            where = f"retrieval.sets.{name}" if name else "retrieval"
            if own.collisions is not None:
                one_of(own.collisions, COLLISIONS, f"{where}.collisions")
            if own.mode is not None:
                one_of(own.mode, MODES, f"{where}.mode")
        one_of(self.budget.sampling, SAMPLING, "budget.sampling")
        for flag in self.ingest.drop:
            one_of(flag, FLAGS, "ingest.drop")
        for key, stage in (("stop_after", self.stop_after), ("from_stage", self.from_stage)):
            if stage is not None:
                one_of(stage, set(TOLD), key)
        if self.seeds is not None and self.budget.clustered > 0 and self.retrieval.only:
            raise UserError("budget.clustered draws from what no seed asks for: give retrieval.only=false")
        if any(above >= below for below, above in pairwise([*self.clusters.levels, 0])):
            raise UserError(f"clusters.levels={self.clusters.levels}: give falling numbers of clusters")
        if self.budget.retrieved == self.budget.clustered == 0:
            raise UserError(
                "budget.retrieved=0 and budget.clustered=0 keep nothing; give one of them a weight"
            )
