"""The vision transformer of DINOv2 (arXiv 2304.07193), with registers (arXiv 2309.16588).

Parameter names are those of the published weights. All crops of all sizes go through the blocks as one flat
token sequence; what spans a crop is attention alone, which is block-diagonal.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dinov2.models.attention import Groups, choose_backend
from dinov2.models.backbone import Backbone, Features, Images, Masks
from dinov2.models.blocks import Block, Keep, Tokens, draw_depth
from dinov2.models.config import ViTConfig
from dinov2.models.initial import init_own
from dinov2.models.positions import resized_positions
from dinov2.models.rope import Turns, draw_box, packed_turns, turn


class PatchEmbed(nn.Module):
    """Patches to tokens: a convolution by its parameters, computed as one matrix product over all crops."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.proj = nn.Conv2d(config.channels, config.dim, config.patch, stride=config.patch)

    def forward(self, crops: Sequence[Images]) -> list[Float[Tensor, "batch patches dim"]]:
        patches = [self._cut(images) for images in crops]
        flat = patches[0] if len(patches) == 1 else torch.cat(patches)
        tokens = F.linear(flat, self.proj.weight.flatten(1), self.proj.bias)
        parts = tokens.split([len(part) for part in patches])
        return [part.unflatten(0, (len(images), -1)) for part, images in zip(parts, crops, strict=True)]

    def _cut(self, images: Images) -> Float[Tensor, "all_patches pixels"]:
        rows, columns = self.grid(images)
        cells = images.unflatten(3, (columns, self.patch)).unflatten(2, (rows, self.patch))
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)

    def grid(self, images: Images) -> tuple[int, int]:
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"{height} x {width} pixels do not divide into patches of {self.patch}")
        return height // self.patch, width // self.patch


class VisionTransformer(Backbone):
    """A ViT with the published parameter names and interface.

    Build it on the meta device for free, then `to_empty(device=…)` and `init_weights()`.

    Attributes:
        attention_backend: a key of `dinov2.models.attention.BACKENDS`, or None for the best that there is.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = self.num_features = config.dim
        self.patch_size = config.patch
        self.image_size = config.image_size
        self.num_register_tokens = config.registers
        self.num_heads, self.n_blocks = config.heads, config.depth
        self.attention_backend: str | None = None

        dim = config.dim
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        positions = None if config.position == "rope" else torch.empty(1, 1 + config.grid**2, dim)
        self.pos_embed = None if positions is None else nn.Parameter(positions)
        registers = torch.empty(1, config.registers, dim)
        self.register_tokens = nn.Parameter(registers) if config.registers else None
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.local_norm = nn.LayerNorm(dim, eps=config.norm_eps) if config.local_norm else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """As `dinov2.models.initial`; normals of 1e-6 for registers and CLS; the mask token 0."""
        if not self.cls_token.is_meta:
            for module in self.modules():
                init_own(module, generator)

    def init_own(self, generator: torch.Generator | None = None) -> None:
        """Tokens and positions alone."""
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02, generator=generator)
        nn.init.normal_(self.cls_token, std=1e-6, generator=generator)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6, generator=generator)
        nn.init.zeros_(self.mask_token)

    def forward_packed(
        self,
        crops: Sequence[Images],
        masks: Sequence[Masks | None] | None = None,
        generator: torch.Generator | None = None,
        looked_at: Int[Tensor, " some"] | None = None,
    ) -> list[Features]:
        """As for every backbone. In training, a local norm is that of all but the first of `crops`.

        Args:
            looked_at: places, among all patches of the first crops, of those whose features are used. With
                them the last block finishes these patches and CLS tokens alone; other features mean nothing.
        """
        masks = masks if masks is not None else [None] * len(crops)
        x, groups = self._pack(crops, masks)
        keeps = self._depth(groups, x.device, generator)
        turns = self._turns(crops, x.device, generator)
        wanted = None if looked_at is None else self._wanted(groups, looked_at)
        x = self._run(x, groups, keeps, turns, wanted=wanted)[0]
        outputs = zip(
            self._unpack(self._normed(x, groups), groups), self._unpack(x, groups), masks, strict=True
        )
        return [self._features(normed, prenorm, mask) for normed, prenorm, mask in outputs]

    def get_intermediate_layers(
        self,
        x: Images,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        depth = len(self.blocks)
        wanted = range(depth - n, depth) if isinstance(n, int) else n
        rows_columns = self.patch_embed.grid(x)
        packed, groups = self._pack([x], [None])
        layers = []
        turns = self._turns([x], x.device)
        for tokens in self._run(packed, groups, [None] * depth, turns, wanted):
            layer = self._unpack(self.norm(tokens) if norm else tokens, groups)[0]
            patches = layer[:, 1 + self.num_register_tokens :]
            if reshape:
                patches = patches.transpose(1, 2).unflatten(2, rows_columns).contiguous()
            layers.append((patches, layer[:, 0]) if return_class_token else patches)
        return tuple(layers)

    def get_last_selfattention(self, x: Images) -> Float[Tensor, "batch heads tokens tokens"]:
        """Attention weights of the last block (by DINO's name). Tokens: CLS, registers, patches."""
        packed, groups = self._pack([x], [None])
        turns = self._turns([x], x.device)
        packed = self._run(packed, groups, [None] * (len(self.blocks) - 1), turns)[0]
        last = self.blocks[-1]
        assert isinstance(last, Block)
        q, k, _ = last.attn.qkv(last.norm1(packed)).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        if turns is not None:
            q, k = turn(q, turns), turn(k, turns)
        q, k = (part.unflatten(0, groups[0]).transpose(1, 2) for part in (q, k))
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1)

    def layers(self) -> list[nn.Module]:
        return list(self.blocks)

    def architecture(self) -> dict[str, Any]:
        return {"kind": "vit", **asdict(self.config)}

    def _pack(self, crops: Sequence[Images], masks: Sequence[Masks | None]) -> tuple[Tokens, Groups]:
        """All crops' tokens (CLS, registers, patches) in one sequence, and how it is made up."""
        parts = []
        for images, patches, mask in zip(crops, self.patch_embed(crops), masks, strict=True):
            if mask is not None:
                patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
            prefix: list[Tensor] = [self.cls_token]
            if self.pos_embed is not None:
                prefix = [self.cls_token + self.pos_embed[:, :1]]
                grid = self.patch_embed.grid(images)
                positions = resized_positions(self.pos_embed[:, 1:], grid, self.config.position)
                patches = patches + positions.to(self.cls_token.dtype)
            if self.register_tokens is not None:
                prefix.append(self.register_tokens)
            start = torch.cat(prefix, dim=1).expand(len(images), -1, -1)
            parts.append(torch.cat([start, patches.to(start.dtype)], dim=1))
        groups = tuple((part.shape[0], part.shape[1]) for part in parts)
        flat = [part.flatten(0, 1) for part in parts]
        return flat[0] if len(flat) == 1 else torch.cat(flat), groups

    def _unpack(self, x: Tokens, groups: Groups) -> list[Float[Tensor, "batch tokens dim"]]:
        parts = x.split([count * length for count, length in groups])
        return [part.unflatten(0, group) for part, group in zip(parts, groups, strict=True)]

    def _normed(self, x: Tokens, groups: Groups) -> Tokens:
        if self.local_norm is None or not self.training or len(groups) == 1:
            return self.norm(x)
        first = groups[0][0] * groups[0][1]
        return torch.cat([self.norm(x[:first]), self.local_norm(x[first:])])

    def _turns(
        self, crops: Sequence[Images], device: torch.device, generator: torch.Generator | None = None
    ) -> Turns | None:
        """Rotary positions, where the config wants them; in training in a box that the step draws."""
        if self.config.position != "rope":
            return None
        drawn = self.training and self.config.draws_box
        box = draw_box(self.config, device, generator) if drawn else None
        grids = [self.patch_embed.grid(images) for images in crops]
        return packed_turns(grids, [len(images) for images in crops], self.config, device, box)

    def _depth(
        self, groups: Groups, device: torch.device, generator: torch.Generator | None
    ) -> Sequence[Keep | None]:
        if not self.training or not self.config.drop_path:
            return [None] * len(self.blocks)
        return draw_depth(groups, self.config.drop_path, len(self.blocks), device, generator)

    def _run(
        self,
        x: Tokens,
        groups: Groups,
        keeps: Sequence[Keep | None],
        turns: Turns | None,
        outputs_of: Iterable[int] = (),
        wanted: Bool[Tensor, " tokens"] | None = None,
    ) -> list[Tokens]:
        """Run as many blocks as there are `keeps`; give what some of them, or else the last, put out.

        Args:
            wanted: the tokens that the last block finishes, if not all.
        """
        backend = self.attention_backend or choose_backend(x.device, self._compute_dtype(x))
        chosen = {index % len(self.blocks) for index in outputs_of}
        outputs = []
        for index, keep in enumerate(keeps):
            last = () if wanted is None or index + 1 < len(keeps) else (wanted,)
            x = self.blocks[index](x, groups, backend, keep, turns, *last)
            if index in chosen:
                outputs.append(x)
        return outputs or [x]

    def _wanted(self, groups: Groups, looked_at: Int[Tensor, " some"]) -> Bool[Tensor, " tokens"]:
        """Which tokens are CLS tokens or patches that are looked at."""
        parts = [torch.zeros(group, dtype=torch.bool, device=looked_at.device) for group in groups]
        for part in parts:
            part[:, 0] = True
        before = 1 + self.num_register_tokens
        patches = groups[0][1] - before
        parts[0][looked_at // patches, looked_at % patches + before] = True
        return torch.cat([part.flatten() for part in parts])

    def _compute_dtype(self, x: Tokens) -> torch.dtype:
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return x.dtype

    def _features(self, normed: Tensor, prenorm: Tensor, mask: Masks | None) -> Features:
        registers = self.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1 : 1 + registers],
            "x_norm_patchtokens": normed[:, 1 + registers :],
            "x_prenorm": prenorm,
            "masks": mask,
        }
