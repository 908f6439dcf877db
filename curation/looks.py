"""What curation keeps of a decoded picture: a thumbnail, two 64-bit hashes, and quality flags.

Everything here is a function of the pixels alone, so it is the same on every machine, in every pool, and
whether or not the run was interrupted.
"""

import hashlib
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMB = 64  # side of the square thumbnail (the aspect ratio is not kept), pixels
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # Rec. 601, as JPEG uses it


def pixel_sha256(image: Image.Image) -> str:
    """Hash of the decoded RGB pixels and the size: equal for any two lossless encodings of one picture."""
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """[64, 64, 3] RGB. A triangle filter as wide as the shrinking asks for, so that resized copies agree."""
    small = image.resize((THUMB, THUMB), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return np.asarray(small, dtype=np.uint8)


def luma(thumb: NDArray[np.uint8], weights: NDArray[np.float32] = LUMA) -> NDArray[np.float32]:
    """[h, w] or [n, h, w] brightness of RGB [h, w, 3] or [n, h, w, 3], 0 to 255; or otherwise weighted."""
    if thumb.ndim == 3:
        return thumb.astype(np.float32) @ weights
    found = np.empty(thumb.shape[:-1], np.float32)
    for at in range(0, len(thumb), 64):  # as much as the cache holds: three times as fast
        found[at : at + 64] = thumb[at : at + 64].astype(np.float32) @ weights
    return found


def perceptual_hash(grey: NDArray[np.float32]) -> int:
    """64 bits: which of the 64 lowest DCT frequencies, the mean left out, exceed their median.

    Of the 64 x 64 luma averaged to 32 x 32. Frequencies are taken by rising u^2 + v^2. Bit i is frequency
    i. Invariant to gain and offset of the luma; a few bits change under re-encoding and resizing.
    """
    return int(_bits(_low_frequencies(grey), True))


def pca_hash(grey: NDArray[np.float32]) -> int:
    """64 bits: signs of whitened projections on fixed orthogonal patterns (DINOv2 app. A names a PCA hash).

    The principal components of natural pictures are, because their statistics do not change under shifts,
    close to the DCT patterns with amplitude 1/frequency. So each of the 64 lowest DCT coefficients is
    multiplied by its frequency (whitening), and the vector is turned by a fixed sign-flipped Hadamard
    matrix, which gives every bit the same variance. Nothing is fitted: hashes of different pools can be
    compared.
    """
    order = _frequencies()
    white = _low_frequencies(grey) * np.hypot(order[:, 0], order[:, 1])
    return int(_bits(_rotation() @ white, False))


def hashes_of_waves(waves: NDArray[np.floating]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """[n] perceptual and PCA hashes from frequencies (down, across) [n, 12, 12] of 32 x 32 lumas."""
    order = _frequencies()
    values = waves[:, order[:, 0], order[:, 1]].astype(np.float64)
    return _bits(values, True), _bits((values * np.hypot(order[:, 0], order[:, 1])) @ _rotation().T, False)


def waves() -> NDArray[np.float64]:
    """[12, 32] the patterns that hashes are made of, along one axis."""
    return _dct()


def flags(
    thumb: NDArray[np.uint8], width: int, height: int, *, small: int, blank: float, aspect: float
) -> list[str]:
    """Quality flags: `small` (short side), `blank` (spread of luma), `aspect` (long / short)."""
    found = []
    if min(width, height) < small:
        found.append("small")
    if float(luma(thumb).std()) < blank:
        found.append("blank")
    if max(width, height) > aspect * min(width, height):
        found.append("aspect")
    return found


def _low_frequencies(grey: NDArray[np.float32]) -> NDArray[np.float64]:
    halved = grey.reshape(32, 2, 32, 2).mean(axis=(1, 3), dtype=np.float64)
    basis = _dct()
    order = _frequencies()
    return (basis @ halved @ basis.T)[order[:, 0], order[:, 1]]


def _bits(values: NDArray[np.float64], median: bool) -> NDArray[np.uint64]:
    """[...] of [..., 64]."""
    # Rounding makes exact ties of symmetric pictures fall the same way whatever the order of summation.
    values = np.round(values, 3)
    set_bits = values > (np.median(values, axis=-1, keepdims=True) if median else 0.0)
    packed = np.packbits(set_bits, axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u8")[..., 0]


@cache
def _dct() -> NDArray[np.float64]:
    """[12, 32] orthonormal DCT-II patterns; 12 rows hold the 64 lowest two-dimensional frequencies."""
    rows, columns = np.arange(12)[:, None], np.arange(32)[None, :]
    basis = np.cos(np.pi * rows * (2 * columns + 1) / 64) * np.sqrt(2 / 32)
    basis[0] /= np.sqrt(2)
    return basis


@cache
def _frequencies() -> NDArray[np.int64]:
    pairs = [(u, v) for u in range(12) for v in range(12) if u or v]
    return np.array(sorted(pairs, key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, pair))[:64])


@cache
def _rotation() -> NDArray[np.float64]:
    matrix = np.ones((1, 1))
    for _ in range(6):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    flips = np.frombuffer(hashlib.sha512(b"pca_hash 1").digest(), dtype=np.uint8)[:64] % 2
    return matrix * (1.0 - 2.0 * flips)[None, :] / 8.0
