"""An ablation trains each variant once, names what fails, goes on where it was, and makes a table."""

from pathlib import Path

import pytest

from dinov2.console import run
from dinov2.train.ablations import main
from dinov2.train.comparison import Result, rows

RECIPE = """base: {base}
words: [steps=2, optim.warmup=0, workers=0]
variants:
  plain: [losses.koleo=0.1]
  two_phases: [losses.koleo=0, augment.global_size=48]
  broken: [model.patch=7]
"""


@pytest.mark.long
def test_what_is_done_is_kept_and_what_failed_is_named_and_tried_again(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.format(base=pictures / "small.yaml"))
    train, test, output = pictures / "train", pictures / "test", tmp_path / "out"
    words = [str(recipe), f"data={train}", f"knn_train={train}", f"knn_test={test}", f"output={output}"]
    with pytest.raises(SystemExit) as left:
        run(main, "ablate", words)
    said = capsys.readouterr().err.splitlines()[-1]
    assert left.value.code == 2
    assert "1 of 3 runs failed (broken, seed 0" in said and "no multiple of model.patch=7" in said
    table = (output / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:4]] == ["| plain", "| two_phases"]
    assert "48" in table[3] and " 32 " in table[3] and "- failed: broken" in table[-1]
    assert (output / "runs" / "two_phases-seed0-phase2" / "origin.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*") if path.is_file()}
    main([*words, "variants.broken=[model.patch=16]"])
    assert "report" in capsys.readouterr().out and "failed" not in (output / "table.md").read_text()
    assert (output / "table.md").read_text().count("\n| ") == 4 and (output / "report.html").exists()
    redone = {path for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert {path.name.split("-")[0] for path in redone} <= {"broken"}


def test_rows_are_means_over_seeds_against_the_first_variant():
    def made(variant: str, seed: int, teacher: float) -> Result:
        numbers = {"steps": 2, "pictures": 1000, "minutes": 1.5, "curve": []}
        return Result(variant=variant, seed=seed, teacher=teacher, student=teacher - 1, **numbers)

    results = [made("b", 0, 50.0), made("a", 0, 40.0), made("a", 1, 44.0)]
    assert rows(results, {"a": ["x=1"], "none": ["z=1"], "b": ["y=1", "y=2"]}) == [
        ["a", "x=1", "42.0 (40.0 to 44.0)", "41.0 (39.0 to 43.0)", "+0.0", "1,000", "1.5"],
        ["b", "y=1, then y=2", "50.0", "49.0", "+8.0", "1,000", "1.5"],
    ]
