"""The page's account of curation: how many pictures went where, and whether that was right."""

from typing import Any

from demo.made import Made, spread
from demo.truth import Decisions, Verdict, judge, read_truth
from dinov2.pages import Card, Page

SHOWN = 6  # pairs of each kind in a gallery
STAGES = {
    "ingest": "cannot be read, or hold nothing to see",
    "duplicates": "lost to a copy that stays",
    "holdout": "like a test picture, or a copy of one that is",
    "retrieval": "not among the nearest to any seed",
    "budget": "over the budget",
}
KINDS = {
    "exact": "exact copies",
    "re-encoded": "re-encoded, JPEG 30 to 90",
    "resized": "resized to 50–150%",
    "cropped": "cropped to 50–90% of the area",
    "recoloured": "recoloured",
    "leaked": "copies of test pictures",
    "corrupt": "corrupt files",
}
SORTS = {
    "wanted": "originals of scenes that have seeds",
    "unwanted": "originals of scenes without seeds",
    "drawing": "drawings of no scene",
    "copy": "planted copies and corrupt files",
}


def verdict_of(made: Made) -> Verdict | None:
    """Curation against the truth, where there is one."""
    if made.inputs.truth is None:
        return None
    decisions = Decisions.read(made.curated, made.inputs.pool, made.inputs.test)
    return judge(read_truth(made.inputs.truth), decisions)


def draw_flow(page: Page, made: Made) -> None:
    """From the pool to the shards."""
    dropped = [row["dropped_by"] for row in made.decisions]
    left, steps = len(dropped), []
    for stage, why in STAGES.items():
        gone = dropped.count(stage)
        if gone:
            steps.append((stage, left, left - gone, why))
        left -= gone
    page.flow(steps, f"What curation made of the pool: {left:,} pictures stay and are written to shards.")


def draw_curation(page: Page, made: Made, verdict: Verdict | None) -> None:
    page.heading("What curation found")
    if verdict is None:
        page.text(
            "Nobody knows what is in this pool, so what was found can only be looked at: each pair below is "
            "a picture that was dropped (left) and the one that stays in its place (right)."
        )
        _stage_gallery(page, made, "duplicates", "dropped as copies")
        _stage_gallery(page, made, "holdout", "dropped because they are like a test picture")
    else:
        _planted(page, verdict)
        _originals(page, made, verdict)
        _pairs(page, made)
        _missed(page, made, verdict)
        _retrieved(page, verdict)
    _asked(page, made)


def _planted(page: Page, verdict: Verdict) -> None:
    page.text(
        "Copies and broken files were planted in the pool, and the truth of each is known. A copy counts as "
        "found if it and its original came down to one picture, whichever of the two stayed."
    )
    rows = [
        [words, tally.planted, tally.found, f"{tally.percent:.1f}%"]
        for kind, words in KINDS.items()
        if (tally := verdict.planted.get(kind))
    ]
    page.table(["planted", "number", "found", "percent"], rows)


def _originals(page: Page, made: Made, verdict: Verdict) -> None:
    wrong = verdict.wrong
    percent = 100 * len(wrong) / max(1, verdict.originals)
    page.text(
        f"**Originals dropped wrongly: {len(wrong)} of {verdict.originals:,} ({percent:.2f}%).** Such a one "
        "was called broken, a copy or a leak and is none. (What no seed asked for is not counted here.)"
    )
    cards = [
        Card(
            [_planted_file(made, path) for path in (drop.path, drop.lost_to) if path],
            f"by {drop.stage}" + (f", likeness {drop.similarity:.2f}" if drop.lost_to else ""),
            "bad",
        )
        for drop in spread(wrong, 12)
    ]
    if cards:
        page.gallery(
            cards, f"Wrongly dropped ({len(cards)} of {len(wrong)}): left dropped, right what it lost to"
        )


def _pairs(page: Page, made: Made) -> None:
    """Kept and dropped, a few of each kind."""
    truth = {row["path"]: row for row in read_truth(str(made.inputs.truth))}
    names = {
        id_: f"{role}/{made.sources[role].table['uri'][row]}" for id_, (role, row) in made.places.items()
    }
    lost: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(made.decisions, key=lambda row: row["id"]):
        if row["evidence"]:
            lost.setdefault(truth[names[row["id"]]]["kind"], []).append(row)
    cards = [
        Card(
            [made.bytes_of(row["id"]), made.bytes_of(row["evidence"])],
            f"{kind}: {truth[names[row['id']]]['edit']}; likeness {row['similarity']:.2f}",
            "good",
        )
        for kind in KINDS
        for row in spread(lost.get(kind, []), SHOWN)
    ]
    page.gallery(cards, "Dropped (left) and what stays or is held out (right), some of each kind")


def _missed(page: Page, made: Made, verdict: Verdict) -> None:
    truth = {row["path"]: row for row in read_truth(str(made.inputs.truth))}
    missed = [path for tally in verdict.planted.values() for path in tally.missed]
    cards = [
        Card(
            [_planted_file(made, path), _planted_file(made, truth[path]["of"])],
            f"{truth[path]['kind']}: {truth[path]['edit']}",
            "bad",
        )
        for path in spread(missed, 18)
    ]
    if cards:
        page.gallery(cards, f"Planted and not found ({len(cards)} of {len(missed)}), beside their originals")


def _retrieved(page: Page, verdict: Verdict) -> None:
    rows = [
        [words, offered, verdict.kept[sort], f"{100 * verdict.kept[sort] / offered:.0f}%"]
        for sort, words in SORTS.items()
        if (offered := verdict.offered[sort])
    ]
    page.table(
        ["in the pool", "number", "stay in the end", "percent"],
        rows,
        "After retrieval, which keeps what is nearest to the seeds. A planted copy may stay in place of its "
        "original.",
    )


def _asked(page: Page, made: Made) -> None:
    edges = made.edges("retrieval")
    if not edges:
        return
    by_seed: dict[str, list[dict[str, Any]]] = {}
    for edge in edges:
        by_seed.setdefault(edge["a"], []).append(edge)
    seeds = sorted(by_seed, key=lambda seed: made.sources["seeds"].table["uri"][made.places[seed][1]].as_py())
    cards = []
    for seed in spread(seeds, 8):
        nearest = sorted(by_seed[seed], key=lambda edge: (-edge["similarity"], edge["b"]))[:6]
        cards.append(Card([made.bytes_of(id_) for id_ in (seed, *(edge["b"] for edge in nearest))]))
    page.gallery(cards, "Seeds (left in each card) and what they asked for from the pool, nearest first")


def _stage_gallery(page: Page, made: Made, stage: str, what: str) -> None:
    rows = sorted(
        (row for row in made.decisions if row["dropped_by"] == stage and row["evidence"]),
        key=lambda row: (-row["similarity"], row["id"]),
    )
    cards = [
        Card([made.bytes_of(row["id"]), made.bytes_of(row["evidence"])], f"likeness {row['similarity']:.2f}")
        for row in spread(rows, 4 * SHOWN)
    ]
    if cards:
        page.gallery(cards, f"{len(cards)} of {len(rows):,} {what}, from the likest on")


def _planted_file(made: Made, path: str) -> bytes:
    """A file by its path in the truth."""
    return (made.folder / "pictures" / path).read_bytes()
