"""The command `lotlip`: output, errors and checks of --out."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lotlip
from lotlip import cli
from lotlip.config.params import load_params
from lotlip.core.console import explain, mount_of
from lotlip.data.index import ShardEntry, ShardIndex, SplitEntry, write_index

RUN = "import sys; from lotlip.cli import run; run()"


def program(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    """Runs the command in this process; returns its status or its error message."""
    monkeypatch.setattr(sys, "argv", ["lotlip", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.run()
    return end.value.code


def write_iiw(folder: Path, texts: list[str | None]) -> Path:
    folder.mkdir()
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps({"image": "x", "IIW": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [
        write_iiw(tmp_path / "IIW-400", ["A dog. It runs.", None, "A cat."]),
        write_iiw(tmp_path / "DCI_Test", ["one two three. " * 3]),
    ]


def test_stats_json_covers_all_files(monkeypatch, capsys, files):
    assert program(monkeypatch, "stats", *files, "--json") == 0
    out, err = capsys.readouterr()
    output = json.loads(out)
    assert output == {"texts": 3, "sub_captions_per_text": (2 + 1 + 3) / 3, "tokens_per_text": (6 + 3 + 12) / 3}
    assert out.count("\n") == 1
    assert err == f"{files[0]}: 1 null or empty texts skipped\n"


def test_stats_table_has_a_line_per_file_and_a_total(monkeypatch, capsys, files):
    assert program(monkeypatch, "stats", *files) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [
        [str(files[0]), "2", "1.50", "4.50"],
        [str(files[1]), "1", "3.00", "12.00"],
        ["total", "3", "2.00", "7.00"],
    ]
    assert program(monkeypatch, "stats", files[1]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_stats_takes_fields_splits_and_tokenizers(monkeypatch, capsys, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))  # one token per text
    path = tmp_path / "any.csv"
    path.write_text("split,a,b\ntrain,one two,x. y\ntest,one. two,three\n")
    arguments = ["stats", path, "--field", "a", "--field", "b", "--split", "test", "--tokenizer", tmp_path, "--json"]
    assert program(monkeypatch, *arguments) == 0
    assert json.loads(capsys.readouterr().out) == {"texts": 2, "sub_captions_per_text": 1.5, "tokens_per_text": 1.0}


def test_an_error_is_one_line(monkeypatch, capsys, tmp_path, files):
    assert (
        program(monkeypatch, "stats", files[0], tmp_path / "no\nfile.json")
        == f"error: {tmp_path}/no file.json does not exist"
    )
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("LOTLIP_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["lotlip", "stats", str(tmp_path / "no.json")])
    with pytest.raises(ValueError, match="does not exist"):
        cli.run()


def test_version_is_printed(monkeypatch, capsys):
    assert program(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{lotlip.__version__}\n"


@pytest.mark.integration
def test_help_imports_no_heavy_package():
    check = "import atexit; atexit.register(lambda: print(*(m for m in sys.modules if '.' not in m), file=sys.stderr))"
    code = RUN.replace("import sys;", f"import sys; {check};")
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert "stats" in done.stdout
    loaded = set(done.stderr.split())
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "timm", "mlflow", "pandas", "pyarrow", "tokenizers", "numpy"}


@pytest.mark.integration
def test_a_failure_has_status_1_and_a_message_on_stderr(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a dog"},\n oops]')
    environment = {name: value for name, value in os.environ.items() if name != "LOTLIP_TRACEBACK"}
    command = [sys.executable, "-c", RUN, "stats", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {path}, line 2: broken JSON (Expecting value at column 2)\n"


ROOT = Path(__file__).parent.parent


@pytest.mark.integration
def test_plan_prints_a_page_or_json(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert program(monkeypatch, "plan", "--profile", "lotlip-100m", "--gpus", 32, "--json") == 0
    output = json.loads(capsys.readouterr().out)
    assert (output["gpus"], output["steps"], output["samples"]) == (32, 30517, 30517 * 16384)
    assert output["epochs"] == pytest.approx(5, abs=0.001)  # the profile's name states 100 million images
    arguments = ["--profile", "lotlip-100m", "--gpus", 32, "--images", 50_000_000, "--tflops", 98.9]
    assert program(monkeypatch, "plan", *arguments) == 0
    page = capsys.readouterr().out
    assert page.startswith("lotlip-100m, lotlip on 32 GPUs, bf16, ZeRO 1\n")
    assert "10.0 of 50,000,000 images" in page
    (hours,) = re.findall(r"^  hours +([\d.]+)$", page, re.MULTILINE)
    assert float(hours) == pytest.approx(10 * output["seconds"] / 3600, rel=0.02)


@pytest.mark.slow
def test_plan_uses_existing_shards(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    statistics = {"raw": {"sub_captions_per_text": 1.0, "tokens_per_text": 7.0}}
    for name in ("instructblip", "llava", "sharegpt4v"):
        statistics[name] = {"sub_captions_per_text": 4.0, "tokens_per_text": 40.0}
    shards = [ShardEntry(name="train-000000", samples=640, bytes=640 * 5000, sha256="")]
    more = {"splits": {"train": SplitEntry(samples=640, shards=shards)}, "features": True, "vocabulary": []}
    write_index(tmp_path / "data" / "shards", [], ShardIndex, statistics=statistics, **more)
    assert program(monkeypatch, "plan", "--json") == 0
    output = json.loads(capsys.readouterr().out)
    assert output["tokens_per_text"] == {"short": 11.0, "long": 33.0}
    steps = load_params(ROOT / "params.yaml").pretrain.steps
    assert (output["epochs"], output["storage_bytes"]["shards"]) == (steps * 64 / 640, 640 * 5000)


@pytest.mark.slow
def test_an_impossible_plan_is_an_error(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "profiles/none.yaml does not exist" in str(program(monkeypatch, "plan", "--profile", "none"))
    assert str(program(monkeypatch, "plan", "--gpus", 7)).startswith("error: 7 GPUs cannot train this: batch_size 64")


# --- output paths -----------------------------------------------------------------------------------------------------


def never(*_: object, **__: object) -> None:
    pytest.fail("work was begun")


def invalid_outputs(tmp_path: Path, ending: str) -> dict[str, Path]:
    """Kind of an output that cannot be written or holds the user's files → its path."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine").write_text("mine")
    (tmp_path / f"mine{ending}").write_text("{}")
    (tmp_path / f"link{ending}").symlink_to(tmp_path / f"mine{ending}")
    folder = tmp_path / f"folder{ending}"
    folder.mkdir()
    return {
        "a folder": folder,
        "in a file": tmp_path / f"mine{ending}" / f"x{ending}",
        "a user's file": tmp_path / f"mine{ending}",
        "a link": tmp_path / f"link{ending}",
        "too long": tmp_path / f"{'x' * 250}{ending}",
    }


def contents(folder: Path) -> list[tuple[str, str]]:
    return sorted((str(path), path.read_text() if path.is_file() else "") for path in folder.rglob("*"))


@pytest.mark.slow
def test_evaluate_checks_out_before_scoring(monkeypatch, tmp_path):
    from lotlip.evaluate import compare

    monkeypatch.setattr(compare, "load_benchmark", never)
    places = {**invalid_outputs(tmp_path, ".json"), "a bare folder": tmp_path / "results"}
    before = contents(tmp_path)
    for kind, out in places.items():
        code = program(monkeypatch, "evaluate", "m", "--benchmark", "coco", "--data", tmp_path, "--out", out)
        assert str(code).startswith(f"error: --out {out}"), kind
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".parquet", ".npy"])
def test_embed_checks_out_before_embedding(monkeypatch, tmp_path, ending):
    from lotlip.retrieval import embedding

    monkeypatch.setattr(embedding, "embed", never)
    places = invalid_outputs(tmp_path, ending)
    (tmp_path / "beside.names.jsonl").write_text("mine")
    before = contents(tmp_path)
    for kind, out in places.items():
        assert str(program(monkeypatch, "embed", "m", tmp_path, "--out", out)).startswith(f"error: --out {out}"), kind
    if ending == ".npy":
        code = program(monkeypatch, "embed", "m", tmp_path, "--out", tmp_path / "beside.npy")
        assert "beside.names.jsonl" in str(code)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("ending", [".parquet", ".npy"])
def test_embed_replaces_an_index(tmp_path, ending):
    import numpy as np

    from lotlip.retrieval.index import IndexRows, check_free_index, index_writer

    out = tmp_path / f"index{ending}"
    for _ in range(2):
        check_free_index(out)
        about = {"model": "m", "weights_sha256": "0", "kind": "images", "width": 2}
        with index_writer(out, about) as write:
            write(IndexRows(["a"], None, np.zeros((1, 2), dtype=np.float32)))


@pytest.mark.slow
def test_evaluate_replaces_scores_and_prints_them_even_if_writing_fails(monkeypatch, capsys, tmp_path):
    from lotlip.core import files
    from lotlip.evaluate import compare
    from lotlip.evaluate.config import MAX_CONDITIONED_PAIRS

    monkeypatch.setattr(compare, "load_benchmark", lambda *_: None)
    limits: set[int] = set()
    monkeypatch.setattr(compare, "compare", lambda *given: limits.add(given[-1]) or [])
    monkeypatch.setattr("lotlip.evaluate.models.open_encoder", lambda *_: None)
    monkeypatch.setattr(compare, "table", lambda _: ["the table"])
    out = tmp_path / "scores.json"
    arguments = ["evaluate", "m", "--benchmark", "coco", "--data", tmp_path, "--out", out]
    for _ in range(2):
        assert program(monkeypatch, *arguments) == 0
    out.write_text('["mine"]')
    assert "--force" in str(program(monkeypatch, *arguments))
    assert program(monkeypatch, *arguments, "--force") == 0
    assert set(json.loads(out.read_text())) == {"results", "published"}
    assert limits == {MAX_CONDITIONED_PAIRS}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))

    monkeypatch.setattr(files, "write_json", full)
    capsys.readouterr()
    message = str(program(monkeypatch, *arguments))
    assert str(mount_of(tmp_path)) in message
    assert str(out) in message
    assert capsys.readouterr().out == "the table\n"


@pytest.mark.integration
@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_character_missing_from_the_terminals_encoding_is_replaced(tmp_path, encoding):
    path = tmp_path / "a→b.json"
    path.write_text('[{"text": "a dog"}]')
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    for more in ([path], [tmp_path / "→.json"]):
        command = [sys.executable, "-c", RUN, "stats", *map(str, more), str(path)]
        done = subprocess.run(command, capture_output=True, env=environment)
        assert b"UnicodeEncodeError" not in done.stderr
        assert b"Traceback" not in done.stderr
        # click treats ASCII as misconfigured UTF-8
        assert any(shown in done.stdout + done.stderr for shown in (b"\\u2192", "→".encode()))


def test_a_full_disk_is_a_clear_error(monkeypatch, tmp_path):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1024))
    for error in (OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded", "x")):
        assert str(mount_of(Path.cwd())) in explain(error)
        assert "MB left" in explain(error)
    assert explain(OSError(errno.EACCES, "Permission denied")) == "[Errno 13] Permission denied"
