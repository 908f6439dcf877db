"""Less memory and compiled blocks change nothing but speed."""

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dinov2.exits import UserError
from dinov2.models.recompute import CHEAP, checkpoint_layers, compile_layers
from dinov2.models.vit import VisionTransformer
from tests.dinov2.models.weights import small_vit

CROPS = [torch.randn(4, 3, 64, 64), torch.randn(6, 3, 32, 32)]


def outputs_and_gradients(vit: VisionTransformer, seed: int = 0) -> list[Tensor]:
    vit.zero_grad()
    outputs = vit.forward_packed(CROPS, None, torch.Generator().manual_seed(seed))
    cls = [group["x_norm_clstoken"] for group in outputs]
    torch.cat(cls).sin().sum().backward()
    return cls + [parameter.grad for parameter in vit.parameters() if parameter.grad is not None]


def trained(**over: object) -> VisionTransformer:
    return small_vit(position="rope", rope_rescale=2.0, drop_path=0.5, **over).train()


def kept_bytes(vit: VisionTransformer) -> int:
    """Of what autograd holds on to after a forward, shared storages once, parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in vit.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = vit.forward_packed(CROPS, None, torch.Generator().manual_seed(0))
    assert features
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["light", "selective", "full"])
def test_what_is_computed_again_has_equal_gradients(how: str, dtype: torch.dtype) -> None:
    plain, saving = trained(), trained()
    checkpoint_layers(saving.layers(), how)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for ours, theirs in zip(outputs_and_gradients(saving), outputs_and_gradients(plain), strict=True):
            assert torch.equal(ours, theirs)


def test_full_checkpointing_keeps_less_than_a_third() -> None:
    plain, saving = trained(), trained()
    checkpoint_layers(saving.layers(), "full")
    assert kept_bytes(saving) < kept_bytes(plain) / 3


@pytest.mark.parametrize("how", ["none", "light"])
def test_light_checkpointing_keeps_no_result_of_norms_and_activations(how: str) -> None:
    vit, given = trained(), []
    checkpoint_layers(vit.layers(), how)
    for module in vit.blocks.modules():
        if isinstance(module, CHEAP):
            module.register_forward_hook(
                lambda _, inputs, output: given.append(StorageWeakRef(output.untyped_storage()))
            )
    features = vit.forward_packed(CROPS, None, torch.Generator().manual_seed(0))
    assert features
    assert len(given) == 3 * len(vit.blocks)
    assert {result.expired() for result in given} == {how == "light"}


def test_a_network_without_blocks_says_so() -> None:
    with pytest.raises(UserError, match="needs a transformer"):
        checkpoint_layers([], "full")


@pytest.mark.long
@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_compiled_blocks_equal_eager_ones(how: str) -> None:
    """With code generated for this machine; in evaluation the blocks stay as they are."""
    eager, compiled = trained(depth=2), trained(depth=2)
    checkpoint_layers(compiled.layers(), how)
    compile_layers(compiled.layers())
    outputs_and_gradients(compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        ours = outputs_and_gradients(compiled, seed=1)
        compiled.eval()(CROPS[0])
    for mine, theirs in zip(ours, outputs_and_gradients(eager, seed=1), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.detach().abs().max()))
