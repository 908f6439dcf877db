"""A pipeline as jobs: one command from pictures to the evaluation, and none of it done twice."""

import json
import os
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from dinov2.exits import UserError
from slurm.check import rounds, slow_nodes
from slurm.config import parse_time, read_slurm
from slurm.pipeline import plan_stage, read_pipeline
from slurm.record import Record, after, started
from tests.curation.pools import make_pool
from tests.pictures import class_folder
from tests.slurm.conftest import ROOT, Cluster

PIPELINE = """stages:
  curate:
    stage: curate
    words: ["pool={pictures}", workers=1]
  train:
    stage: train
    words: ["data={curate}", batch=8, steps=20, model.size=vit_tiny, model.depth=1, model.patch=8,
      heads.dino.prototypes=32, heads.dino.hidden=32, augment.global_size=32, augment.local_size=16,
      augment.local_crops=2, tensorboard=false, workers=0, checkpoint.every=10, checkpoint.export_every=10]
  early:
    stage: eval
    each: "{train}/backbones/*"
    words: ["{item}", knn, "train={pictures}", "test={test}", size=32, resize=32, workers=0]
  final:
    stage: eval
    words: ["{train}/backbone", knn, "train={pictures}", "test={test}", size=32, resize=32, workers=0]
"""


def test_a_pipeline_ends_with_its_evaluations_and_is_not_run_twice(cluster: Cluster, tmp_path: Path) -> None:
    class_folder(tmp_path / "pictures", classes=3, each=8)
    class_folder(tmp_path / "test", classes=3, each=3, first=8)
    (tmp_path / "small.yaml").write_text(PIPELINE)
    words = [
        "pipeline",
        str(tmp_path / "small.yaml"),
        f"pictures={tmp_path / 'pictures'}",
        f"test={tmp_path / 'test'}",
        f"output={tmp_path / 'out'}",
    ]
    said = cluster.submit(*words)
    assert [line.split(":")[0] for line in said.splitlines()[:4]] == ["curate", "train", "early", "final"]
    assert "is there" in cluster.submit(*words)  # a second time at once: nothing is submitted twice
    until = time.monotonic() + 240
    while cluster.jobs(tmp_path / "out").count(": done") < 4:
        assert ": failed" not in cluster.jobs(tmp_path / "out"), cluster.jobs(tmp_path / "out")
        assert time.monotonic() < until, cluster.jobs(tmp_path / "out") + cluster.queue()
        time.sleep(1)
    assert (tmp_path / "out" / "final" / "report.html").exists()
    for step in ("00000010", "00000020"):
        cluster.wait(tmp_path / "out" / "early" / step, ": done")
        lines = (tmp_path / "out" / "early" / step / "results.jsonl").read_text().splitlines()
        assert f"/{step}" in json.loads(lines[0])["backbone"]["spec"]
    again = cluster.submit(*words)
    assert "everything is done" in again and "job" not in again
    assert cluster.queue() == ""
    other = cluster.submit(*words, f"pictures={tmp_path}", status=2)
    assert "was submitted with other words" in other


TRAINING = """batch: 4
steps: 20
model: {size: vit_tiny, depth: 1, patch: 8}
heads:
  dino: {prototypes: 32, hidden: 32}
augment: {global_size: 32, local_size: 16, local_crops: 2}
checkpoint: {every: 10}
tensorboard: false
workers: 0
"""


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_the_whole_with_arrays_killed_at_random_curates_as_one_process_does(
    cluster: Cluster, tmp_path: Path
) -> None:
    pictures, labelled = make_pool(tmp_path / "pictures"), tmp_path / "labelled"
    class_folder(labelled / "train", classes=3, each=8)
    class_folder(labelled / "val", classes=3, each=4, first=8)
    recipe, train, highres = (tmp_path / f"{name}.yaml" for name in ("curate", "train", "highres"))
    recipe.write_text("workers: 1\ningest: {piece: 4}\nretrieval: {k: 6}\nbudget: {pictures: 8}\n")
    train.write_text(TRAINING)
    highres.write_text(
        TRAINING.replace("steps: 20", "steps: 5").replace("global_size: 32", "global_size: 48")
    )
    shipped = ROOT / "configs" / "pipelines"
    array, whole = tmp_path / "array.yaml", tmp_path / "whole.yaml"
    array.write_text((shipped / "curate_array.yaml").read_text().replace("array: 16", "array: 3"))
    whole.write_text(
        (shipped / "whole.yaml").read_text().replace("begins_with: curate_array", f"begins_with: {array}")
    )
    sources = [f"{name}={pictures / name}" for name in ("pool", "seeds", "holdout")]
    output = tmp_path / "out"
    words = ["pipeline", str(whole), *sources, f"recipe={recipe}", "nodes=1", "gpus=0", "export_every=10"]
    words += [f"train_recipe={train}", f"highres_recipe={highres}", f"classes={labelled}", "size=32"]
    cluster.submit(*words, f"output={output}")
    draw, until = Random(time.time_ns()), time.monotonic() + 600
    kills: Counter[str] = Counter()  # of a command: after more without progress its job would give up
    # Four arrays of three, five jobs of curation, and five behind it.
    while (seen := cluster.jobs(output)).count(": done") < 4 * 3 + 5 + 5:
        assert ": failed" not in seen, seen
        assert time.monotonic() < until, seen + cluster.queue()
        running = children("dinov2\0curate", str(output / "curated"))
        running = {pid: line for pid, line in running.items() if kills[line] < 2}
        if running and kills.total() < 6:
            pid = draw.choice([*running])
            with suppress(ProcessLookupError):  # it may have ended by now
                os.kill(pid, signal.SIGKILL)
                kills[running[pid]] += 1
        time.sleep(draw.uniform(0.2, 1.5))
    assert kills.total() >= 3
    one = tmp_path / "one"
    cluster.run(sys.executable, "-m", "curation", str(recipe), *sources, f"output={one}")
    for name in ("manifest.parquet", "decisions.parquet"):
        assert (output / "curated" / name).read_bytes() == (one / name).read_bytes(), name
    for stage in ("low", "final"):
        assert (output / stage / "report.html").exists()
    for step in ("00000010", "00000020"):
        cluster.wait(output / "early" / step, ": done")
    assert (output / "highres" / "origin.json").exists()
    assert "everything is done" in cluster.submit(*words, f"output={output}")
    assert cluster.queue() == ""


def children(command: str, word: str) -> dict[int, str]:
    """Processes with both in their command line, and the line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if command in line and word in line:
            found[int(path.parent.name)] = line
    return found


def test_dry_needs_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from slurm.submit import main

    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("DINOV2_SLURM_ACCOUNT", "ours")
    pictures = tmp_path / "pictures"
    words = ["train", f"data={pictures}", "steps=1", f"output={tmp_path / 'run'}"]
    main([*words, "slurm.site=example", "slurm.nodes=4", "slurm.gpus_per_node=8", "slurm.array=3", "--dry"])
    text = capsys.readouterr().out
    for line in (
        "#SBATCH --account=ours",
        "#SBATCH --partition=gpu",
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=2880",
        "#SBATCH --array=0-2%3",
        "module load cuda",
    ):
        assert line in text.splitlines(), text
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"slurm\.executor=local"):
        main(words)


def test_on_this_machine_without_slurm(tmp_path: Path, cluster: Cluster) -> None:
    class_folder(tmp_path / "pictures", classes=2, each=4)
    words = ["curate", f"pool={tmp_path / 'pictures'}", "workers=1"]
    cluster.submit(*words, f"output={tmp_path / 'a'}", "slurm.executor=local")
    cluster.wait(tmp_path / "a", ": done")
    cluster.submit(*words, f"output={tmp_path / 'b'}", "slurm.executor=debug")
    assert ": done" in cluster.jobs(tmp_path / "b")
    assert (tmp_path / "a" / "manifest.parquet").read_bytes() == (
        tmp_path / "b" / "manifest.parquet"
    ).read_bytes()


def test_what_submits_evaluations_is_one_process_and_hands_on_what_they_ask_for(tmp_path: Path) -> None:
    given = {"pool": "p", "seeds": "s", "holdout": "h", "classes": "c", "size": "98"}
    recipes = {"recipe": "laptop", "train_recipe": "small_gpu", "highres_recipe": "highres_518"}
    machines = {"nodes": "4", "gpus": "8", "export_every": "9"}
    values = {**given, **recipes, **machines, "output": str(tmp_path)}
    nodes = read_pipeline(ROOT / "configs/pipelines/whole.yaml", values)
    jobs = {node.name: plan_stage(node, tmp_path, ["slurm.partition=big"]) for node in nodes}
    assert (jobs["train"].config.nodes, jobs["train"].config.tasks) == (4, 8)
    assert (jobs["embed"].config.array, jobs["embed"].config.gpus_per_node) == (16, 0)
    assert (jobs["early"].config.tasks, jobs["early"].config.gpus_per_node) == (1, 0)
    assert {"slurm.gpus_per_node=8", "slurm.partition=big"} <= set(jobs["early"].job.words)
    assert all(each.config.partition == "big" for each in jobs.values())


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("", 0),
        ("90", 90),
        ("1:30", 2),
        ("2:00:00", 120),
        ("1-0", 1440),
        ("1-2:30", 1590),
        ("2-00:00:30", 2881),
    ],
)
def test_times_are_read_as_sbatch_reads_them(text: str, minutes: int) -> None:
    assert parse_time(text) == minutes


def test_a_job_starts_again_as_long_as_it_gets_further() -> None:
    record = started(Record(), "a")
    for status, marker in ((75, "a"), (1, "b"), (137, "c")):
        record = after(started(record, "z"), status, marker, "why", retries=2)
        assert not record.ended and record.stuck == 0
    for stuck in (1, 2):
        record = after(started(record, "z"), 1, "c", "why", retries=2)
        assert not record.ended and record.stuck == stuck
    record = after(started(record, "z"), 1, "c", "why", retries=2)
    assert record.ended == "failed" and "3 starts without progress" in record.reason and record.starts == 7
    for status, ended in ((0, "done"), (2, "failed"), (70, "failed")):
        assert after(Record(marker="a"), status, "b", "why", retries=9).ended == ended


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_every_pair_of_nodes_is_measured_once_and_no_node_twice_at_a_time(count: int) -> None:
    names = [f"n{number}" for number in range(count)]
    met = []
    for pairs in rounds(names):
        busy = [name for pair in pairs for name in pair]
        assert len(set(busy)) == len(busy)
        met += [frozenset(pair) for pair in pairs]
    assert len(set(met)) == len(met) == count * (count - 1) // 2


def test_a_slow_node_is_named_and_its_partners_are_not() -> None:
    rates = {f"n{number}": {"link": 100.0, "disk": 50.0 + number} for number in range(4)}
    rates["n2"] = {"link": 20.0, "disk": 49.0}
    assert list(slow_nodes(rates, 0.5)) == ["n2"]
    assert "link" in slow_nodes(rates, 0.5)["n2"]
    two = {"n0": {"disk": 9.0}, "n1": {"disk": 4.0}}
    assert list(slow_nodes(two, 0.5)) == ["n1"] and not slow_nodes(two, 0.4)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("stages: {a: {stage: train, words: [x]}, b: [}", "no pipeline"),
        (
            "stages: {a: {stage: train, words: ['{b}']}, b: {stage: eval, words: ['{a}']}}",
            "wait for each other",
        ),
        ("stages: {a: {stage: train, words: ['{pool}']}}", "needs pool="),
        ("stages: {a: {stage: train, wrds: [x]}}", "'wrds'"),
    ],
)
def test_a_bad_pipeline_gets_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_pipeline(tmp_path / "p.yaml", {"output": "out"})


def test_settings_come_from_site_environment_and_words_in_this_order() -> None:
    environ = {"DINOV2_SLURM_SITE": "example", "DINOV2_SLURM_PARTITION": "big", "DINOV2_SLURM_CPUS": "3"}
    config = read_slurm(["slurm.cpus=5"], environ)
    assert (config.account, config.partition, config.cpus) == ("my-project", "big", 5)
