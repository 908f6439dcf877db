"""Curation: a pool of pictures in; decisions with reasons, and deduplicated, retrieved, sampled shards out.

What a run leaves in its folder:

    decisions.parquet  manifest.parquet  shards/  edges/KIND.parquet  clusters.parquet
    report.html        what was chosen and why, by samples; all of it in report/
    leaks.parquet      which holdout pictures are in the pool, and as what
    takedowns.parquet  what was taken out afterwards
    stages/ingest/ROLE/NNNNN.parquet, .thumbs.npy, .raw.npy   what was read of pool, seeds and holdout
    stages/embed/ROLE/                                        embeddings
    stages/duplicates/ and holdout/                           search/, candidates.parquet, aligned/ (scores)
    stages/duplicates/components.parquet                      groups of copies, and how alike they are
    stages/NAME/dropped.parquet, done.json                    whom a stage dropped; its counts, when done
"""
