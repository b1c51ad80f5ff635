"""`checkpoint.from`: goes on from another job's state, and refuses what does not fit, never a silent fresh start."""

from __future__ import annotations

import shutil

import pytest
from e2e_kit import Bench, Manifest, job

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]

STEPS = 4


@pytest.fixture(scope="module")
def trained(bench: Bench) -> Bench:
    """A job with a checkpoint, copies of it that are torn, and every job that starts from one of them."""
    bench.apply(job("origin", training={"maxSteps": STEPS}, checkpoint={"everySteps": 2, "keepLast": 3}))
    last = bench.succeeded("origin")["checkpoints"]["last"]["uri"]
    good = bench.volume() / last.removeprefix("pvc://runs/")
    for name in ("torn", "uncommitted"):
        shutil.copytree(good, bench.volume() / "copies" / name)
    largest = max((bench.volume() / "copies" / "torn").rglob("*.*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    (bench.volume() / "copies" / "uncommitted" / "manifest.json").unlink()
    bench.apply(
        start("goes-on", {"fromJob": {"name": "origin"}}),
        start("torn", {"uri": "pvc://runs/copies/torn"}),
        start("uncommitted", {"uri": "pvc://runs/copies/uncommitted"}),
        {**start("wider", {"uri": last}), "spec": {**start("wider", {"uri": last})["spec"], "model": wider()}},
    )
    return bench


def start(name: str, place: Manifest) -> Manifest:
    return job(name, training={"maxSteps": STEPS + 2}, checkpoint={"from": place})


def wider() -> Manifest:
    scratch = dict(job("x")["spec"]["model"]["scratch"])
    return {"scratch": {**scratch, "hiddenSize": 64}}


def test_goes_on_where_the_other_job_ended(trained: Bench) -> None:
    trained.succeeded("goes-on")
    assert [line["step"] for line in trained.metrics("goes-on") if "loss" in line] == [STEPS + 1, STEPS + 2]


REFUSED = {
    "torn": ("No checkpoint is whole", "copies/torn/", "the manifest says"),
    "uncommitted": ("copies/uncommitted holds no committed checkpoint", "status.checkpoints.last"),
    "wider": ("model digest is", "does not fit this job", "Start a new job"),
}


@pytest.mark.parametrize(("name", "parts"), REFUSED.items())
def test_what_does_not_fit_is_refused(trained: Bench, name: str, parts: tuple[str, ...]) -> None:
    status = trained.finished(name)
    assert (status["state"], status["reason"]) == ("Failed", "CheckpointIncompatible"), trained.story(name)
    assert all(part in status["failure"]["message"] for part in parts), status["failure"]["message"]
    assert not (trained.run_folder(name) / "output").exists()
