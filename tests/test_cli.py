"""The program: what it prints where, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lotlip
from lotlip import cli

RUN = "import sys; from lotlip.cli import run; run()"


def program(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    """Runs the program in this process; gives its status, or the message it ends with."""
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


def test_json_is_one_object_over_all_files(monkeypatch, capsys, files):
    assert program(monkeypatch, "stats", *files, "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found == {"texts": 3, "sub_captions_per_text": (2 + 1 + 3) / 3, "tokens_per_text": (6 + 3 + 12) / 3}
    assert out.count("\n") == 1
    assert err == f"{files[0]}: 1 skipped: null or empty\n"


def test_the_table_has_a_line_for_each_file_and_one_for_all(monkeypatch, capsys, files):
    assert program(monkeypatch, "stats", *files) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [
        [str(files[0]), "2", "1.50", "4.50"],
        [str(files[1]), "1", "3.00", "12.00"],
        ["all", "3", "2.00", "7.00"],
    ]
    assert program(monkeypatch, "stats", files[1]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_fields_splits_and_tokenizers_are_passed_on(monkeypatch, capsys, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))  # one token a text
    path = tmp_path / "any.csv"
    path.write_text("split,a,b\ntrain,one two,x. y\ntest,one. two,three\n")
    arguments = ["stats", path, "--field", "a", "--field", "b", "--split", "test", "--tokenizer", tmp_path, "--json"]
    assert program(monkeypatch, *arguments) == 0
    assert json.loads(capsys.readouterr().out) == {"texts": 2, "sub_captions_per_text": 1.5, "tokens_per_text": 1.0}


def test_an_error_is_one_line(monkeypatch, capsys, tmp_path, files):
    assert (
        program(monkeypatch, "stats", files[0], tmp_path / "no\nfile.json")
        == f"error: {tmp_path}/no file.json is not there"
    )
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("LOTLIP_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["lotlip", "stats", str(tmp_path / "no.json")])
    with pytest.raises(ValueError, match="is not there"):
        cli.run()


def test_the_version(monkeypatch, capsys):
    assert program(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{lotlip.__version__}\n"


def test_help_imports_nothing_heavy():
    check = "import atexit; atexit.register(lambda: print(*(m for m in sys.modules if '.' not in m), file=sys.stderr))"
    code = RUN.replace("import sys;", f"import sys; {check};")
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert "stats" in done.stdout
    loaded = set(done.stderr.split())
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "timm", "mlflow", "pandas", "pyarrow", "tokenizers", "numpy"}


def test_a_failure_has_status_1_and_says_so_on_stderr(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a dog"},\n oops]')
    environment = {name: value for name, value in os.environ.items() if name != "LOTLIP_TRACEBACK"}
    command = [sys.executable, "-c", RUN, "stats", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {path}, line 2: broken JSON (Expecting value at column 2)\n"
