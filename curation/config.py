"""The settings of `dinov2 curate`, one section a stage."""

from dataclasses import dataclass

from dinov2.config import at_least, listed, one_of, required, runtime, section
from dinov2.exits import UserError

BUILT_IN = "descriptor"
SAMPLING = {"balanced", "uniform"}
COLLISIONS = {"keep", "drop", "refill"}
CHAINS = {"whole", "direct"}
FLAGS = {"small", "blank", "aspect"}


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    piece: int = 512  # pictures in one resumable unit of work
    small: int = 16  # short side under this many pixels: flag "small"
    blank: float = 1.0  # spread of the luma under this many levels of 255: flag "blank"
    aspect: float = 10.0  # long side over this many short sides: flag "aspect"
    drop: list[str] = listed("small", "blank", "aspect")  # pictures with these flags are dropped
    max_pixels: int = 178_956_970  # larger pictures are recorded as unreadable (decompression bombs)


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    dimension: int = 256  # of the built-in descriptor after whitening
    sample: int = 20_000  # pool pictures that its whitening is fitted on
    copied: int = 400  # of these, so many are copied to see what copying changes
    size: int | None = None  # side of the square picture that a backbone sees, pixels; null: what it learnt
    token: str = "cls"  # what is taken from a backbone: "cls", "mean", "cls+mean", "cls4"
    batch: int = runtime(64)  # pictures at a time through a backbone


@dataclass(frozen=True, kw_only=True)
class NearConfig:
    """How pairs of near-identical pictures are found: candidates by hash and embedding, then verified."""

    hash_distance: int = 8  # candidates: perceptual or PCA hashes that differ in at most this many of 64 bits
    k: int = 64  # candidates: nearest neighbours by embedding (DINOv2 app. A)
    cosine: float = 0.2  # candidates: of these, those of at least this cosine
    always: int = 16  # candidates: so many nearest neighbours whatever their cosine
    verify: bool = True  # similarity is the alignment's score; else the cosine itself
    loosest: float = 0.5  # edges are stored from this similarity on
    threshold: float = 0.75  # edges count from this similarity on

    @property
    def stored_from(self) -> float:
        """Least similarity of an edge that is stored."""
        return min(self.loosest, self.threshold)


@dataclass(frozen=True, kw_only=True)
class DuplicatesConfig(NearConfig):
    enabled: bool = True  # off: every readable picture stays
    chains: str = "whole"  # "whole": one of a component stays; "direct": also who has no edge to it


@dataclass(frozen=True, kw_only=True)
class LeaksConfig(NearConfig):
    threshold: float = 0.7  # looser than for duplicates: a leak costs more than a picture


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    k: int = 4  # pool pictures for each seed (DINOv2 app. A: 4, or 32 for few seeds)
    collisions: str = "keep"  # who gets what several seeds ask for: all ("keep"), or one: "drop", "refill"
    minimum: float = -1.0  # least cosine to the seed


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    pictures: int | None = None  # at most so many pictures stay; null: all
    sampling: str = "balanced"  # "balanced" over clusters of the embedding, or "uniform"
    clusters: int | None = None  # number of k-means clusters; null: the square root of the pool
    rounds: int = 20  # of k-means


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    shard: int = 1000  # pictures in a shard


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    pool: str = required()  # source of the pictures to choose from
    seeds: str | None = None  # source of pictures whose like is wanted
    holdout: str | None = None  # source of pictures that must not leak into the result
    output: str = runtime(required())  # folder for decisions, manifest, shards and report
    backbone: str = BUILT_IN  # what embeds: "descriptor", or a backbone folder, timm:NAME, a weights file
    seed: int = 0  # of the sampling
    stop_after: str | None = runtime(None)  # name of the last stage to run
    workers: int = runtime(0)  # processes; 0: one a core
    device: str = runtime("cpu")  # where a backbone runs
    cache: str | None = runtime(None)  # folder for tar indexes and what comes from URLs; null: the user's
    ingest: IngestConfig = section(IngestConfig)
    embed: EmbedConfig = section(EmbedConfig)
    duplicates: DuplicatesConfig = section(DuplicatesConfig)
    leaks: LeaksConfig = section(LeaksConfig)
    retrieval: RetrievalConfig = section(RetrievalConfig)
    budget: BudgetConfig = section(BudgetConfig)
    write: WriteConfig = section(WriteConfig)

    def check(self, stages: list[str]) -> None:
        """Raises UserError for a value that no stage could work with."""
        one_of(self.duplicates.chains, CHAINS, "duplicates.chains")
        one_of(self.retrieval.collisions, COLLISIONS, "retrieval.collisions")
        one_of(self.budget.sampling, SAMPLING, "budget.sampling")
        for flag in self.ingest.drop:
            one_of(flag, FLAGS, "ingest.drop")
        if self.stop_after is not None:
            one_of(self.stop_after, set(stages), "stop_after")
        at_least(1, self, "ingest.piece", "embed.copied", "embed.dimension", "embed.sample", "embed.batch")
        at_least(1, self, "duplicates.k", "leaks.k", "retrieval.k", "budget.rounds", "write.shard")
        at_least(0, self, "workers")
        if self.budget.pictures is not None and self.budget.pictures < 1:
            raise UserError(
                f"budget.pictures={self.budget.pictures} would keep nothing; give at least 1, or null"
            )
