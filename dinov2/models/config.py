"""What a backbone is made of: our vision transformer with its named sizes, or a model of timm's."""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

from dinov2.exits import UserError

POSITIONS = ("release", "exact", "exact_antialias", "rope")
FFNS = ("mlp", "swiglu")


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """The architecture of a `VisionTransformer`: all that is needed to build it before its weights are read.

    `position` names how the learned position embedding is resized to another grid; the three conventions
    in use differ by more than rounding, see `dinov2.models.positions`. With `rope` there is none, and
    attention turns by the place instead, see `dinov2.models.rope`.
    """

    dim: int
    depth: int
    heads: int
    patch: int = 14
    registers: int = 0
    channels: int = 3
    image_size: int = 224  # the position embedding's own grid is image_size // patch, squared
    ffn: str = "mlp"
    ffn_ratio: float = 4.0
    qkv_bias: bool = True
    position: str = "release"
    layer_scale: float = 1e-5  # the initial value; 0 leaves LayerScale out, as in DINO
    drop_path: float = 0.0
    norm_eps: float = 1e-6
    local_norm: bool = False  # a norm of its own for the output of local crops in training (DINOv3)
    rope_base: float = 100.0  # the longest period, in halves of a crop's side
    rope_shift: float = 0.0  # largest shift of the coordinates that a training step draws
    rope_jitter: float = 1.0  # largest factor that it draws for each axis; 1 for none
    rope_rescale: float = 1.0  # largest factor that it draws for both; DINOv3: 2

    def __post_init__(self) -> None:
        if self.position not in POSITIONS:
            raise UserError(f"position={self.position} is unknown; known are {', '.join(POSITIONS)}")
        if self.ffn not in FFNS:
            raise UserError(f"ffn={self.ffn} is unknown; known are {', '.join(FFNS)}")
        if min(self.dim, self.depth, self.heads, self.patch, self.channels) < 1 or self.dim % self.heads:
            raise UserError(f"dim={self.dim} must be a positive multiple of heads={self.heads}")
        if self.image_size < self.patch:
            raise UserError(f"image_size={self.image_size} is smaller than one patch of {self.patch}")
        if self.registers < 0:
            raise UserError(f"registers={self.registers}: give 0 or more")
        if self.position == "rope" and self.dim // self.heads % 4:
            raise UserError(f"position=rope needs heads whose width {self.dim // self.heads} is divided by 4")
        if min(self.rope_jitter, self.rope_rescale) < 1 or self.rope_shift < 0:
            raise UserError("rope_jitter and rope_rescale must be at least 1, rope_shift at least 0")
        if not 0 <= self.drop_path < 1:
            raise UserError(f"drop_path={self.drop_path} must be at least 0 and less than 1")

    @property
    def grid(self) -> int:
        """Patches along a side of the position embedding's own grid."""
        return self.image_size // self.patch

    @property
    def hidden(self) -> int:
        """Width inside the feed-forward layer. SwiGLU keeps two thirds, rounded up to a multiple of 8."""
        if self.ffn == "mlp":
            return round(self.dim * self.ffn_ratio)
        return -(-int(round(self.dim * self.ffn_ratio) * 2 / 3) // 8) * 8

    def still(self) -> Self:
        """The same network without what is drawn in training: a teacher's."""
        return replace(self, drop_path=0.0, rope_shift=0.0, rope_jitter=1.0, rope_rescale=1.0)

    @property
    def draws_box(self) -> bool:
        """Whether training moves the box of rotary coordinates."""
        moved = self.rope_shift > 0 or max(self.rope_jitter, self.rope_rescale) > 1
        return self.position == "rope" and moved


@dataclass(frozen=True, kw_only=True)
class TimmConfig:
    """A model of timm's, by timm's name."""

    name: str
    channels: int = 3
    image_size: int = 0  # pixels along a side that it is trained at; 0: what timm says
    drop_path: float = 0.0

    def still(self) -> Self:
        """The same network without what is drawn in training: a teacher's."""
        return replace(self, drop_path=0.0)


@dataclass(frozen=True, kw_only=True)
class DescriptorConfig:
    """A backbone with a descriptor in place of its CLS token (`dinov2.models.descriptor`)."""

    inner: ViTConfig | TimmConfig
    dimension: int
    pooling: str

    def still(self) -> Self:
        """The same network without what is drawn in training: a teacher's."""
        return replace(self, inner=self.inner.still())


AnyConfig = ViTConfig | TimmConfig | DescriptorConfig

SIZES: dict[str, dict[str, Any]] = {
    "vit_tiny": {"dim": 192, "depth": 12, "heads": 3},
    "vit_small": {"dim": 384, "depth": 12, "heads": 6},
    "vit_base": {"dim": 768, "depth": 12, "heads": 12},
    "vit_large": {"dim": 1024, "depth": 24, "heads": 16},
    # SoViT-400m (arXiv 2305.13035): the width of its feed-forward layer is 4304.
    "vit_so400m": {"dim": 1152, "depth": 27, "heads": 18, "ffn_ratio": 4304 / 1152},
    # DINOv3 (arXiv 2508.10104, model table): 0.84 billion parameters come from a SwiGLU width of 5120.
    "vit_huge_plus": {
        "dim": 1280, "depth": 32, "heads": 20, "ffn": "swiglu", "ffn_ratio": 6.0, "position": "rope",
    },
    "vit_giant": {"dim": 1536, "depth": 40, "heads": 24, "ffn": "swiglu"},
    "vit_7b": {
        "dim": 4096, "depth": 40, "heads": 32, "ffn": "swiglu", "ffn_ratio": 3.0, "qkv_bias": False,
        "position": "rope",
    },
}  # fmt: skip


def vit_config(size: str, **over: Any) -> ViTConfig:
    """The config of a named size with single fields replaced.

    Raises:
        UserError: the size or a field is unknown.
    """
    if size not in SIZES:
        raise UserError(f"unknown architecture {size!r}; known are {', '.join(SIZES)}")
    known = [field.name for field in fields(ViTConfig)]
    for name in over:
        if name not in known:
            raise UserError(f"unknown setting {name!r} of an architecture; known are {', '.join(known)}")
    return ViTConfig(**{**SIZES[size], **over})
