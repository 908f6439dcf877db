"""Curation: a pool of pictures in, decisions with reasons and deduplicated, retrieved, sampled shards out."""
