"""Features of pictures: embedders, the embeddings folder of the contracts, and what fills it."""

from dinov2.features.embedder import PRECISIONS, BackboneEmbedder, CentreCrop, Embedder, as_tensor
from dinov2.features.extract import embed, embed_array, embed_pieces, stacked
from dinov2.features.folder import Embeddings

__all__ = [
    "PRECISIONS",
    "BackboneEmbedder",
    "CentreCrop",
    "Embedder",
    "Embeddings",
    "as_tensor",
    "embed",
    "embed_array",
    "embed_pieces",
    "stacked",
]
