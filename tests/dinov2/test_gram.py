"""Gram anchoring against plain loops in float64."""

import torch
from torch import Tensor

from dinov2.losses.gram import downsampled, gram


def _plain(student: Tensor, anchor: Tensor) -> Tensor:
    """Entry by entry, as the paper writes it: X X^T with rows of length one."""
    total = torch.zeros((), dtype=torch.float64)
    crops, patches, _ = student.shape
    for crop in range(crops):
        for i in range(patches):
            for j in range(patches):
                cosines = [
                    torch.dot(x[crop, i], x[crop, j]) / x[crop, i].norm() / x[crop, j].norm()
                    for x in (student, anchor)
                ]
                total = total + (cosines[0] - cosines[1]) ** 2
    return total / (crops * patches**2)


def test_gram_equals_the_formula_in_value_and_gradient():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 5, 6, generator=generator)
    anchor = torch.randn(3, 5, 4, generator=generator)  # of another width
    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    loss, plain = gram(ours, anchor.requires_grad_()), _plain(theirs, anchor.detach().double())
    torch.testing.assert_close(loss.double(), plain, rtol=1e-5, atol=1e-7)
    loss.backward()
    plain.backward()
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-7)
    assert anchor.grad is None


def test_gram_sees_neither_length_nor_rotation_and_stays_in_float32():
    x = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1))
    turned = torch.linalg.qr(torch.randn(6, 6))[0]
    assert gram(x, 3 * x @ turned) < 1e-10
    with torch.autocast("cpu", torch.bfloat16):
        loss = gram(x.bfloat16().requires_grad_(), x.bfloat16())
    assert loss.dtype == torch.float32 and loss < 1e-10
    zeros = torch.zeros(1, 3, 4, requires_grad=True)
    gram(zeros, x[:1, :3]).backward()
    assert zeros.grad is not None and zeros.grad.isfinite().all()


def test_downsampling_keeps_a_plane_of_features_and_the_order_of_patches():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
    fine = torch.stack([rows, columns], dim=-1).flatten(0, 1)[None]
    coarse = downsampled(fine, (8, 12), (4, 6)).unflatten(1, (4, 6))[0, 1:-1, 1:-1]  # away from the edges
    expected = torch.stack(
        torch.meshgrid(torch.arange(4.0) * 2 + 0.5, torch.arange(6.0) * 2 + 0.5, indexing="ij"), dim=-1
    )
    torch.testing.assert_close(coarse, expected[1:-1, 1:-1], rtol=0, atol=0.05)
    assert downsampled(fine, (8, 12), (8, 12)) is fine
