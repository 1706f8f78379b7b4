"""The served model embeds like the saved one, reports invalid rows, and answers over HTTP."""

from __future__ import annotations

import base64
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import yaml
from fastapi.testclient import TestClient
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel
from mlflow.pyfunc.scoring_server import init
from packaging.requirements import Requirement

from lotlip.retrieval.embedding import Embedder
from lotlip.retrieval.serving import REQUIREMENTS, save_served_model
from tests.conftest import TinySample
from tests.tiny_model import save_tiny_model

TEXTS = ["A red dog. It runs under the open sky.", "two white houses", "One cat sits. One cat sleeps. One runs."]
PATIENCE_SECONDS = 900


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tower: Path) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("serving") / "model", tiny_tower)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    save_served_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def loaded(served: Path) -> Iterator[PyFuncModel]:
    path = list(sys.path)
    yield mlflow.pyfunc.load_model(str(served))
    sys.path[:] = path  # MLflow adds the model's code to it


@pytest.fixture(scope="module")
def client(loaded: PyFuncModel) -> TestClient:
    """The application of `mlflow models serve`, without a server."""
    return TestClient(init(loaded))


@pytest.fixture(scope="module")
def embedder(model: Path) -> Embedder:
    return Embedder(model)


@pytest.fixture(scope="module")
def images(tiny_samples: list[TinySample]) -> list[bytes]:
    return [sample.image for sample in tiny_samples[:2]]


def encoded(image: bytes) -> str:
    return base64.b64encode(image).decode()


def mixed_rows(images: list[bytes]) -> tuple[list[dict[str, str]], list[int]]:
    """Rows with texts and images, and the number of each in `features`."""
    first, second = (encoded(image) for image in images)
    rows = [{"text": TEXTS[0]}, {"image": first}, {"text": TEXTS[1]}, {"text": TEXTS[2]}, {"image": second}]
    return rows, [0, 3, 1, 2, 4]


@pytest.fixture(scope="module")
def features(embedder: Embedder, images: list[bytes]) -> np.ndarray:
    """Features of the texts, then of the images."""
    return np.concatenate([embedder.texts(TEXTS), embedder.images(images)])


def test_a_table_may_have_texts_and_images(loaded, images, features):
    rows, numbers = mixed_rows(images)
    predictions = loaded.predict(pd.DataFrame(rows))
    assert all(isinstance(number, float) for row in predictions for number in row)
    np.testing.assert_allclose(predictions, features[numbers], atol=1e-6)
    np.testing.assert_allclose(loaded.predict(pd.DataFrame({"text": TEXTS})), features[:3], atol=1e-6)
    image_table = pd.DataFrame({"image": [encoded(image) for image in images]}, index=[7, 7])  # the index is ignored
    np.testing.assert_allclose(loaded.predict(image_table), features[3:], atol=1e-6)
    assert loaded.predict(pd.DataFrame({"text": []}, dtype=object)) == []


def test_line_breaks_in_base64_are_ignored(loaded, images, features):
    lines = base64.encodebytes(images[0]).decode()
    assert "\n" in lines.strip()
    np.testing.assert_allclose(loaded.predict(pd.DataFrame({"image": [lines]})), features[3:4], atol=1e-6)


def test_every_form_of_request_is_answered(client, images, features):
    rows, numbers = mixed_rows(images)
    cells = [[row.get("text"), row.get("image")] for row in rows]
    requests: list[tuple[dict[str, Any], list[int]]] = [
        ({"dataframe_records": rows}, numbers),
        ({"dataframe_split": {"columns": ["text", "image"], "data": cells}}, numbers),
        ({"dataframe_split": {"columns": ["image", "text"], "data": [cells[1][::-1]]}}, [3]),
        ({"dataframe_split": {"columns": ["text", "image"], "data": cells[:1]}}, [0]),
        ({"dataframe_records": [{"text": None, "image": rows[1]["image"]}]}, [3]),
        ({"dataframe_records": [{"text": TEXTS[0], "image": ""}, {"text": TEXTS[1], "unknown": 1}]}, [0, 1]),
        ({"inputs": rows}, numbers),
        ({"inputs": {"text": TEXTS}}, [0, 1, 2]),
    ]
    for request, expected in requests:
        answer = client.post("/invocations", json=request)
        assert answer.status_code == 200, (request, answer.text)
        np.testing.assert_allclose(answer.json()["predictions"], features[expected], atol=1e-6)
    table = pd.DataFrame(rows).to_csv(index=False)
    answer = client.post("/invocations", content=table, headers={"content-type": "text/csv"})
    np.testing.assert_allclose(answer.json()["predictions"], features[numbers], atol=1e-6)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "row 1 has neither text nor image"),
        ({"text": " "}, "row 1 has neither text nor image"),
        ({"text": 5}, "row 1 has neither text nor image"),
        ({"text": "a", "image": "aGVs"}, "row 1 has both text and image"),
        ({"image": "!"}, r"row 1: the image is not base64"),
        ({"image": "aGVsb"}, r"row 1: the image is not base64"),
        ({"image": "é"}, r"row 1: .*ASCII"),
        ({"image": "aGVs"}, r"row 1: not a readable image \(3 bytes\)"),
    ],
)
def test_an_invalid_row_is_an_error_naming_it(loaded, client, row, message):
    rows = [{"text": TEXTS[0]}, row]
    with pytest.raises(MlflowException, match=message):
        loaded.predict(pd.DataFrame(rows))
    answer = client.post("/invocations", json={"dataframe_records": rows})
    assert answer.status_code == 400
    assert answer.json()["error_code"] == "INVALID_PARAMETER_VALUE"
    assert "row 1" in answer.json()["message"]


def test_a_table_without_its_columns_is_an_error(client):
    answer = client.post("/invocations", json={"dataframe_records": [{"texts": "a dog"}]})
    assert answer.status_code == 400
    assert "neither of the columns text and image" in answer.json()["message"]


def test_the_folder_is_self_contained(served, model):
    for file in model.iterdir():
        if file.name == "config.json":  # has additional provenance
            continue
        assert (served / "data" / file.name).read_bytes() == file.read_bytes(), file.name
    assert (served / "code" / "lotlip" / "retrieval" / "serving.py").is_file()
    assert (served / "code" / "lotlip" / "data" / "bert-base-uncased" / "tokenizer.json").is_file()
    assert not list(served.rglob("*.pkl")) + list(served.rglob("__pycache__"))
    required = [Requirement(line) for line in (served / "requirements.txt").read_text().splitlines()]
    assert {requirement.name for requirement in required} == set(REQUIREMENTS)
    for requirement in required:
        installed = version(requirement.name)
        assert str(requirement.specifier) == f"=={installed.partition('+')[0]}"
        assert requirement.specifier.contains(installed)


def test_signature_and_example_match_the_model(served, loaded, client):
    info = mlflow.models.get_model_info(str(served))
    assert info.signature.inputs.to_dict() == [
        {"type": "string", "name": "text", "required": False},
        {"type": "string", "name": "image", "required": False},
    ]
    assert info.signature.outputs.to_dict() == [{"type": "array", "items": {"type": "float"}, "required": True}]
    assert len(loaded.predict(loaded.input_example)[0]) == 32
    request = json.loads(loaded.metadata.get_serving_input(str(served)))
    assert client.post("/invocations", json=request).json()["predictions"] == loaded.predict(loaded.input_example)


@pytest.mark.slow
def test_the_copy_records_scores_in_its_provenance(tmp_path, model):
    folder = tmp_path / "served"
    for score in (0.25, 0.5):  # the second call replaces the folder
        save_served_model(model, folder, {"scores": {"scenes": {"long.text_to_image.r1": score}}})
        config = json.loads((folder / "data" / "config.json").read_text())
        assert config["provenance"]["scores"] == {"scenes": {"long.text_to_image.r1": score}}
        assert f"| long.text_to_image.r1 | {score} |" in (folder / "data" / "README.md").read_text()
    assert json.loads((model / "config.json").read_text())["provenance"] is None


def test_mlflow_finds_the_requirements(served):
    """Otherwise MLflow would look for a conda.yaml."""
    dependencies = Path(mlflow.pyfunc.get_model_dependencies(str(served))).read_text().splitlines()
    assert dependencies == (served / "requirements.txt").read_text().splitlines()
    environment = yaml.safe_load((served / "python_env.yaml").read_text())
    assert environment == {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}


@pytest.mark.slow
def test_loading_a_late_interaction_model_is_an_error(tmp_path, tiny_tower, monkeypatch):
    folder = save_tiny_model(tmp_path / "model", tiny_tower, similarity="late-interaction")
    save_served_model(folder, tmp_path / "served")
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ValueError, match="token by token"):
        mlflow.pyfunc.load_model(str(tmp_path / "served"))


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"has no model: config\.json is missing"):
        save_served_model(tmp_path, tmp_path / "served")


# --- the documented requests ------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
COMMANDS = [block for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) if "/invocations" in block]
REFUSAL = json.loads(re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[-1])
BODIES = [json.loads(body) for block in COMMANDS for body in re.findall(r"-d '(\{.*\})'", block)]


def test_the_documented_requests_are_answered(client, embedder):
    good, bad = BODIES
    answer = client.post("/invocations", json=good)
    assert answer.status_code == 200
    texts = [row["text"] for row in good["dataframe_records"]]
    np.testing.assert_allclose(answer.json()["predictions"], embedder.texts(texts), atol=1e-5)
    refused = client.post("/invocations", json=bad)
    assert refused.status_code == 400
    assert refused.json() == REFUSAL


# --- a real server ----------------------------------------------------------------------------------------------------


@contextmanager
def server(folder: Path, scratch: Path) -> Iterator[str]:
    """Runs `mlflow models serve` in its own process group, and yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(folder), "--env-manager", "local"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # MLflow starts uvicorn by name
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{scratch}/mlflow.db", "PATH": path}
    with (scratch / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=scratch,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not is_up(f"{address}/ping"):
                log_so_far = (scratch / "log").read_text()
                assert process.poll() is None, log_so_far
                assert time.monotonic() < deadline, log_so_far
                time.sleep(0.2)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


def post(address: str, data: bytes) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"{address}/invocations", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.system
def test_mlflow_serves_the_model(tmp_path, served, images, features):
    rows, numbers = mixed_rows(images)
    with server(served, tmp_path) as address:
        for name in ("dataframe_records", "inputs"):
            status, answer = post(address, json.dumps({name: rows}).encode())
            assert status == 200
            np.testing.assert_allclose(answer["predictions"], features[numbers], atol=1e-5)
        status, answer = post(address, json.dumps({"dataframe_records": [rows[0], {}]}).encode())
        assert (status, "row 1 has neither text nor image" in answer["message"]) == (400, True)
        assert post(address, b"no JSON")[0] == 400
        assert post(address, json.dumps({"dataframe_records": rows[:1]}).encode())[0] == 200  # it still answers
        if shutil.which("curl"):
            (tmp_path / "house.png").write_bytes(images[0])
            for command, number in zip(COMMANDS, (2, 1, None), strict=True):
                shell = command.replace("http://127.0.0.1:5001", address)
                answer_of_shell = subprocess.run(
                    ["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=True
                )
                if number is None:
                    assert json.loads(answer_of_shell.stdout) == REFUSAL
                else:
                    assert len(json.loads(answer_of_shell.stdout)["predictions"]) == number, answer_of_shell.stdout
