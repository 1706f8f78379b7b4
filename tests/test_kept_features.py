"""Image features that ablations with a frozen tower share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lotlip.evaluate import kept_features
from lotlip.evaluate.benchmarks import Benchmark
from lotlip.evaluate.encoders import LotlipEncoder, Runner
from lotlip.evaluate.evaluate import image_features
from lotlip.evaluate.kept_features import KeptFeatures
from tests.tiny_model import save_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture
def benchmark(tiny_samples) -> Benchmark:
    samples = tiny_samples[:5]
    return Benchmark("own", [sample.key for sample in samples], lambda number: samples[number].image, {})


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The benchmarks whose images were encoded."""
    names: list[str] = []

    def encode(encoder, benchmark):
        names.append(benchmark.name)
        return image_features(encoder, benchmark)

    monkeypatch.setattr(kept_features, "image_features", encode)
    return names


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / ".lotlip" / "features"


def open_model(folder: Path, tower: Path, seed: int = 0, batch_size: int = 2) -> LotlipEncoder:
    save_tiny_model(folder, tower, seed)
    return LotlipEncoder.open(folder, Runner(batch_size))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.safetensors"))


def test_another_ablation_with_the_same_tower_reads_them(benchmark, encoded, folder, tmp_path, tiny_tower):
    first, second = (open_model(tmp_path / str(seed), tiny_tower, seed) for seed in (0, 1))
    assert first.protocol()["weights_sha256"] != second.protocol()["weights_sha256"]
    features = [KeptFeatures(folder, "images")(encoder, benchmark) for encoder in (first, second)]
    assert encoded == ["own"]
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], image_features(second, benchmark))


@pytest.mark.parametrize("other", ["tower", "images", "batch size"])
def test_other_features_replace_them(other, benchmark, encoded, folder, tmp_path, tiny_tower):
    first, second = open_model(tmp_path / "first", tiny_tower), open_model(tmp_path / "second", tiny_tower)
    if other == "tower":
        with torch.no_grad():
            next(second.model.image_tower.parameters()).add_(1)
    elif other == "batch size":
        second = LotlipEncoder.open(tmp_path / "second", Runner(3))
    KeptFeatures(folder, "images")(first, benchmark)
    before = files(folder)
    found = KeptFeatures(folder, "others" if other == "images" else "images")(second, benchmark)
    assert encoded == ["own", "own"]
    assert torch.equal(found, image_features(second, benchmark))
    assert len(before) == len(files(folder)) == 1
    assert before != files(folder)


def test_a_damaged_file_is_written_again(benchmark, encoded, folder, tmp_path, tiny_tower):
    encoder, keep = open_model(tmp_path / "model", tiny_tower), KeptFeatures(folder, "images")
    features = keep(encoder, benchmark)
    (file,) = folder.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert torch.equal(keep(encoder, benchmark), features)
    assert torch.equal(keep(encoder, benchmark), features)
    assert encoded == ["own", "own"]


def test_features_of_patches_are_not_kept(benchmark, encoded, folder, tmp_path, tiny_tower):
    encoder = open_model(tmp_path / "model", tiny_tower)
    encoder.model.config.similarity = "late-interaction"
    assert KeptFeatures(folder, "images")(encoder, benchmark).ndim == 3
    assert encoded == ["own"]
    assert not folder.exists()
