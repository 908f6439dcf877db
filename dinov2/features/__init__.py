"""Features of pictures: embedders, the embeddings folder of the contracts, and what fills it."""

from dinov2.features.embedder import BackboneEmbedder, CentreCrop, Embedder
from dinov2.features.extract import embed, embed_array
from dinov2.features.folder import Embeddings

__all__ = ["BackboneEmbedder", "CentreCrop", "Embedder", "Embeddings", "embed", "embed_array"]
