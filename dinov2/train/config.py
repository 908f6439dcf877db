"""All settings of a training run."""

from dataclasses import dataclass

from dinov2.config import at_least, by_name, one_of, required, runtime, section
from dinov2.data.augment import AugmentConfig
from dinov2.data.edits import EditConfig
from dinov2.data.masks import MaskConfig
from dinov2.exits import UserError
from dinov2.models.config import SIZES, AnyConfig, DescriptorConfig, TimmConfig, ViTConfig, vit_config
from dinov2.models.recompute import CHECKPOINTING
from dinov2.optim import UPDATES, OptimConfig, TeacherConfig
from dinov2.parallel import ShardingConfig
from dinov2.ssl.anchor import GramConfig
from dinov2.ssl.contrastive import ContrastiveConfig
from dinov2.ssl.networks import HeadsConfig
from dinov2.ssl.objective import LossConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone: our ViT, or a model of timm's, which has only size, channels and drop_path."""

    size: str = "vit_small"  # vit_tiny, vit_small, vit_base, vit_large, vit_giant, …, or timm:NAME
    patch: int = 14  # side of a patch in pixels
    channels: int = 3  # of the pictures
    registers: int = 0  # register tokens, 0 or 4 (Darcet et al. 2023)
    depth: int = 0  # number of blocks; 0 for the size's own
    ffn: str = ""  # mlp or swiglu; empty for the size's own
    layer_scale: float = 1e-5  # initial value of LayerScale
    drop_path: float = 0.3  # rate of stochastic depth, the same at every layer
    position: str = ""  # rope, or how positions are resized: release, exact, exact_antialias; "": the size's
    rope_shift: float = 0.0  # largest shift of rotary coordinates drawn in a step
    rope_jitter: float = 1.0  # largest factor drawn for each axis; 1 for none
    rope_rescale: float = 2.0  # largest factor drawn for both axes (DINOv3); 1 for none
    checkpointing: str = runtime("auto")  # what backward computes again: none, light, selective, full
    trim: bool = runtime(True)  # the last block finishes only tokens that a loss looks at; not compiled
    local_norm: bool = False  # an output norm of their own for local crops (DINOv3)

    @property
    def is_vit(self) -> bool:
        """Whether the backbone is our ViT, which alone has a mask token."""
        return not self.size.startswith("timm:")

    def network(self, image_size: int) -> ViTConfig | TimmConfig:
        """What the backbone is made of, its positions native to `image_size`."""
        if not self.is_vit:
            return TimmConfig(
                name=self.size.removeprefix("timm:"),
                channels=self.channels,
                image_size=image_size,
                drop_path=self.drop_path,
            )
        over = {"depth": self.depth} if self.depth else {}
        return vit_config(
            one_of(self.size, SIZES, "model.size"),
            patch=self.patch,
            channels=self.channels,
            registers=self.registers,
            layer_scale=self.layer_scale,
            drop_path=self.drop_path,
            position=self.position or SIZES[self.size].get("position", "exact_antialias"),
            rope_shift=self.rope_shift,
            rope_jitter=self.rope_jitter,
            rope_rescale=self.rope_rescale,
            local_norm=self.local_norm,
            image_size=image_size,
            **over,
            **({"ffn": self.ffn} if self.ffn else {}),
        )


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Classification by nearest neighbours while the run goes on, with student and teacher."""

    train: str = ""  # labelled source to look neighbours up in; empty: no k-NN
    test: str = ""  # labelled source to classify
    every: int = 0  # steps between two evaluations; 0: at the start and at the end only
    k: int = 20  # number of neighbours that vote
    size: int = 224  # side of the centre crop
    resize: int = 256  # short side before it


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and which of it stays."""

    every: int = 500  # steps between two checkpoints
    keep: int = 2  # how many of the latest stay
    keep_every: int = 0  # checkpoints at multiples of this stay for good; 0: none
    export_every: int = 0  # at multiples of this (and of every) the teacher goes to backbones/STEP; 0: never

    def exported(self, step: int) -> bool:
        """Whether the teacher's backbone is written after this step."""
        return bool(self.export_every) and step % self.export_every == 0


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What the run says of itself, and how often."""

    every: int = 100  # steps between two measurements that are not for every step: rank of the features, …
    snapshots: int = 8  # times in a run that attention and patches of fixed pictures are drawn; 0: never
    pictures: int = 4  # how many fixed pictures
    hang_limit: float = 900.0  # seconds without a step until the run ends, naming the rank; 0: never
    peak_tflops: float = 0.0  # what utilisation is a share of; 0: the maker's, or measured at the start
    watts: float = 0.0  # power of a device with its share of the machine; 0: 700 a GPU, 65 a CPU, 30 a Mac


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run of `dinov2 train`."""

    data: str = required()  # pictures: folder, tars, manifest, list, several joined by commas
    output: str = runtime()  # the run's folder
    distill: str = ""  # learn from the frozen, usually larger teacher of this run's folder
    init: str = ""  # begin from a run's folder (weights and heads) or a backbone (heads start fresh)
    method: str = "distillation"  # self-distillation (DINO to DINOv3), or contrastive (SSCD, copy detection)
    steps: int = 0  # length of the run in steps; or give epochs=
    epochs: float = 0.0  # length in passes over the data
    batch: int = 64  # pictures a step, over all processes
    accumulate: int = 1  # micro-batches that a step's gradient is added up over, to save memory
    seed: int = 0  # of initial weights, order, augmentation, masks and stochastic depth
    precision: str = "bf16"  # bf16 (autocast over float32 masters) or fp32
    mix: dict[str, float] = by_name()  # weight of each source that data= names; empty: as if all were one
    pure: dict[str, float] = by_name()  # share of the batches that are of one source alone
    window: int = 0  # blocks of pictures that shuffling mixes at a time, so that reads stay near; 0: all
    block: int = 1000  # pictures in a block of a window, about those of a shard
    model: ModelConfig = section(ModelConfig)
    heads: HeadsConfig = section(HeadsConfig)
    losses: LossConfig = section(LossConfig)
    gram: GramConfig = section(GramConfig)
    teacher: TeacherConfig = section(TeacherConfig)
    optim: OptimConfig = section(OptimConfig)
    augment: AugmentConfig = section(AugmentConfig)
    masks: MaskConfig = section(MaskConfig)
    contrastive: ContrastiveConfig = section(ContrastiveConfig)
    edits: EditConfig = section(EditConfig)
    max_skipped: int = 20  # steps in a row that may be not finite before the run goes back to a checkpoint
    max_rollbacks: int = runtime(3)  # times in a row that it goes back without progress before it gives up
    knn: KnnConfig = runtime(KnnConfig)
    checkpoint: CheckpointConfig = runtime(CheckpointConfig)
    watch: WatchConfig = runtime(WatchConfig)
    device: str = runtime("auto")  # auto, cpu, cuda, cuda:1, mps
    nproc: str = runtime("1")  # training processes on this machine; auto: one for each GPU
    workers: int = runtime(1)  # processes that read and augment pictures, beside each training process
    sharding: ShardingConfig = runtime(ShardingConfig)
    compile: bool = runtime(False)  # blocks by torch.compile; the first step takes a minute or more
    onednn: bool = runtime(True)  # linear layers on a CPU by oneDNN directly, not by torch's own way
    keep_memory: bool = runtime(True)  # on a CPU: what a step frees stays with the process for the next one
    threads: int = runtime(0)  # of torch on the CPU; 0: as torch finds
    cache: str = runtime("")  # folder for what comes from URLs, and for indexes of tars
    tensorboard: bool = runtime(True)  # write TensorBoard events
    wandb: str = runtime("")  # project at Weights & Biases to log to as well, if its package is installed
    signals: list[str] = runtime(["SIGTERM", "SIGUSR2"])  # save at the next step and leave with status 75

    def check(self) -> None:
        """Refuse what cannot be trained, in the user's terms."""
        at_least(
            1,
            self,
            "batch",
            "block",
            "model.patch",
            "checkpoint.every",
            "gram.every",
            "checkpoint.keep",
            "knn.k",
            "sharding.copies",
        )
        at_least(0, self, "steps", "epochs", "window", "workers", "threads", "knn.every")
        for head in ("heads.dino", "heads.ibot"):
            at_least(1, self, *(f"{head}.{key}" for key in ("hidden", "bottleneck", "prototypes", "layers")))
        if bool(self.steps) == bool(self.epochs):
            raise UserError(
                "give the length of the run as steps= or as epochs=, and not as both "
                "(where a recipe gives steps, write steps=0 epochs=…)"
            )
        one_of(self.precision, {"bf16", "fp32"}, "precision")
        one_of(self.sharding.gather, {"bf16", "fp32"}, "sharding.gather")
        if self.sharding.gather == "bf16" and (self.precision == "fp32" or not self.model.is_vit):
            raise UserError("sharding.gather=bf16 is for our ViTs with precision=bf16")
        one_of(self.teacher.targets, {"sinkhorn", "centering"}, "teacher.targets")
        one_of(self.teacher.update, UPDATES, "teacher.update")
        self.optim.check()
        self._check_network()
        if self.accumulate < 1:
            raise UserError(f"accumulate={self.accumulate} should be 1 or more")
        one_of(self.method, {"distillation", "contrastive"}, "method")
        self.contrastive.check()
        if self.contrasts and self.augment.deep:
            raise UserError(
                "method=contrastive edits RGB pictures of 8 bits; leave augment.mean at three values"
            )
        if not self.weights():
            raise UserError("all losses have weight 0; give one a weight, such as losses.dino=1")

    def _check_network(self) -> None:
        one_of(self.model.checkpointing, ("auto", *CHECKPOINTING), "model.checkpointing")
        if not self.model.is_vit and "ibot" in self.weights():
            raise UserError(f"model.size={self.model.size} has no mask token; set losses.ibot=0")
        if len(self.augment.mean) != self.model.channels:
            raise UserError(
                f"augment.mean and augment.std give {len(self.augment.mean)} values for "
                f"model.channels={self.model.channels}; give as many as there are channels"
            )
        if self.augment.gram_size and "gram" not in self.weights():
            raise UserError("augment.gram_size= is for losses.gram, which has weight 0")
        if self.augment.mode == "fast" and (self.contrasts or self.augment.deep):
            raise UserError("augment.mode=fast is for crops of RGB of 8 bits; take augment.mode=exact")
        if self.augment.mixed and self.contrasts:
            raise UserError("augment.mixed= is for crops; method=contrastive has edited views of one size")
        for side in (side for sizes in self.augment.mixed for side in sizes):
            if self.model.is_vit and side % self.model.patch:
                raise UserError(f"augment.mixed: {side} is no multiple of model.patch={self.model.patch}")
        if self.distill and self.contrasts:
            raise UserError("distill= is for prototypes; method=contrastive has none")
        for name in ("global_size", "local_size", "gram_size") if self.model.is_vit else ():
            side = getattr(self.augment, name)
            if side % self.model.patch:
                raise UserError(f"augment.{name}={side} is no multiple of model.patch={self.model.patch}")

    def processes(self, gpus: int) -> int:
        """How many training processes to start here; 1 inside of those that a launcher has started."""
        if self.nproc == "auto":
            return max(1, gpus)
        if not self.nproc.isdecimal() or self.nproc == "0":
            raise UserError(f"nproc={self.nproc}: give a number of processes, or auto for one a GPU")
        return int(self.nproc)

    @property
    def contrasts(self) -> bool:
        """Whether the method is contrastive: descriptors of edited views, with no teacher to learn from."""
        return self.method == "contrastive"

    def weights(self) -> dict[str, float]:
        """The losses by name with their weights."""
        return self.contrastive.weights() if self.contrasts else self.losses.weights()

    def trims(self) -> bool:
        """Whether the last block finishes only tokens that a loss looks at.

        A compiled block wants fixed shapes, and the Gram loss and descriptors look at all patches.
        """
        all_seen = self.contrasts or "gram" in self.weights()
        return self.model.trim and self.model.is_vit and not self.compile and not all_seen

    def network(self) -> AnyConfig:
        """What the backbone is made of."""
        inner = self.model.network(self.augment.global_size)
        if not self.contrasts:
            return inner
        settings = self.contrastive
        return DescriptorConfig(inner=inner, dimension=settings.dimension, pooling=settings.pooling)

    def length(self, pictures: int) -> int:
        """The number of steps over a source of so many pictures."""
        return self.steps or max(1, round(self.epochs * pictures / self.batch))
