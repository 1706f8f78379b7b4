"""Runs that do not go as the demo's: killed half way, and on pictures of one's own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.flows.conftest import tiny

pytestmark = pytest.mark.slow


def test_a_stage_killed_half_way_goes_on(make_workspace) -> None:
    workspace = make_workspace()
    workspace.change(tiny)
    workspace.change(lambda params: params["ingest"].update(partition_size=5))
    workspace.change(lambda params: params.update(orchestration={"workers": 1}))
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.ingest"], cwd=workspace.folder, env=workspace.environment, start_new_session=True
    )
    scratch = workspace.folder / ".lotlip" / "work" / "ingest"
    deadline = time.monotonic() + 120
    while len(finished := sorted(scratch.rglob("part-*.json"))) < 5:
        assert process.poll() is None, "the stage ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (workspace.folder / "data" / "ingest").exists()
    written = {path.name: path.stat().st_mtime_ns for path in finished}
    workspace.python("flows.ingest")
    published = workspace.folder / "data" / "ingest" / "train"
    assert len(list(published.glob("part-*.json"))) == 48
    for name, when in written.items():
        if (published / name).exists():
            assert (published / name).stat().st_mtime_ns == when, f"{name} was done again"
    assert not scratch.exists()


def test_own_images(make_workspace, tmp_path: Path) -> None:
    """A folder of pictures with some that are broken, by the profile for it."""
    from lotlip.sources.scenes import generate_scene, render

    workspace = make_workspace()
    pictures = workspace.folder / "my-images"
    pictures.mkdir()
    for number in range(60):
        scene = generate_scene(7, "train", number)
        render(scene, 64).save(pictures / f"{number:03d}.png")
        (pictures / f"{number:03d}.txt").write_text(f"a picture of number {number}")
    (pictures / "001.png").write_bytes(b"not a picture")
    (pictures / "002.txt").write_text(" \n")
    (pictures / "003.txt").write_bytes(b"caf\xe9")
    (workspace.folder / "params.yaml").write_text((workspace.folder / "profiles" / "own-images.yaml").read_text())

    def small(params):
        params["image_tower"] |= {"scenes": 64, "epochs": 1, "width": 32, "depth": 1, "heads": 2, "min_accuracy": 0.0}
        params["pretrain"] |= {"steps": 4, "batch_size": 16, "max_final_loss_share": 2.0}
        params["pretrain"]["text"]["config"] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        params["evaluate"]["min_score_over_chance"] = 0.0

    workspace.change(small)
    strict = workspace.folder / "params.yaml"
    lenient = strict.read_text()
    strict.write_text(lenient.replace("max_failure_share: 0.05", "max_failure_share: 0.01"))
    done = workspace.python("flows.ingest", check=False)
    assert "share of items that failed is at most 1 %: found 5 %" in done.stderr
    assert not (workspace.folder / "data" / "ingest").exists()

    strict.write_text(lenient)
    workspace.python("flows.reproduce")
    index = json.loads((workspace.folder / "data" / "ingest" / "index.json").read_text())
    assert (index["read"], index["written"]) == (60, 57)
    assert index["failure_kinds"] == {"empty": 1, "encoding": 1, "unreadable": 1}
    assert {failure["key"] for failure in index["failures"]} == {"001", "002", "003"}
    scores = json.loads((workspace.folder / "metrics" / "lit.json").read_text())["benchmarks"]["own"]
    assert scores["protocol"]["short_texts"] == scores["protocol"]["images"] > 0
    assert "long.text_to_image.r1" not in scores["seeds"]["0"]
