"""The scores on the demo's page, on decisions whose right answer is plain."""

from typing import Any

from demo.truth import Decisions, judge


def row(path: str, kind: str = "original", of: str | None = None, wanted: bool = True) -> dict[str, Any]:
    return {"path": path, "kind": kind, "of": of, "wanted": wanted}


def decided(**stages: tuple[str | None, str | None]) -> Decisions:
    """`a=(stage, evidence)` for every picture of the pool; test pictures are t0 to t9; an id is its path."""
    rows = [
        {
            "id": id_,
            "kept": stage is None,
            "dropped_by": stage,
            "evidence": evidence,
            "similarity": 1.0 if evidence else None,
            "error": "broken" if stage == "ingest" else None,
        }
        for id_, (stage, evidence) in stages.items()
    ]
    names = [*stages, *(f"t{n}" for n in range(10))]
    return Decisions(rows, {name: name for name in names})


def test_a_copy_is_found_whichever_of_the_two_stays():
    truth = [
        row("a"),
        row("b", "resized", "a"),
        row("c"),
        row("d", "resized", "c"),
        row("e"),
        row("f", "resized", "e"),
    ]
    verdict = judge(
        truth,
        decided(
            a=(None, None), b=("duplicates", "a"),
            c=("duplicates", "d"), d=(None, None),
            e=(None, None), f=(None, None),
        ),
    )  # fmt: skip
    assert (verdict.planted["resized"].planted, verdict.planted["resized"].found) == (3, 2)
    assert verdict.planted["resized"].missed == ["f"]
    assert verdict.wrong == []


def test_an_original_that_lost_to_a_stranger_or_a_test_picture_was_dropped_wrongly():
    truth = [row("a"), row("b"), row("c", "cropped", "b"), row("d"), row("e"), row("g"), row("t1")]
    verdict = judge(
        truth,
        decided(
            a=(None, None), b=("duplicates", "a"), c=("duplicates", "a"),
            d=("holdout", "t1"), e=("ingest", None), g=("retrieval", None),
        ),
    )  # fmt: skip
    assert [(drop.path, drop.lost_to) for drop in verdict.wrong] == [("b", "a"), ("d", "t1"), ("e", None)]
    assert verdict.originals == 5
    assert verdict.planted["cropped"].found == 1  # with its original, though for a wrong reason
    assert (verdict.offered["wanted"], verdict.kept["wanted"]) == (5, 1)


def test_a_leak_is_found_if_it_lost_to_its_test_picture_and_a_broken_file_if_it_was_recorded():
    truth = [
        row("t1"), row("a", "leaked", "t1"), row("t2"), row("b", "leaked", "t2"), row("c", "leaked", "t2"),
        row("d"), row("e", "corrupt", "d"), row("f", "corrupt", "d"), row("g", "drawing", wanted=False),
    ]  # fmt: skip
    verdict = judge(
        truth,
        decided(
            a=("holdout", "t1"), b=("duplicates", "c"), c=("holdout", "t2"),
            d=(None, None), e=("ingest", None), f=(None, None), g=("retrieval", None),
        ),
    )  # fmt: skip
    assert verdict.planted["leaked"].percent == 100
    assert verdict.planted["corrupt"].found == 1
    assert verdict.originals == 1
    assert verdict.offered == {"copy": 5, "wanted": 1, "drawing": 1}
