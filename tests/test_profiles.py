"""Profiles of the paper's data scales: sizes of towers, settings for DeepSpeed, and sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import yaml

from lotlip.caption.captioners.table import TableCaptioner
from lotlip.config.params import checked_params, load_params
from lotlip.core.compute import TrainingCompute
from lotlip.core.differences import differences
from lotlip.core.section import merge
from lotlip.evaluate.config import PublishedBenchmarkConfig
from lotlip.ingest.sources import open_source
from lotlip.plan.plan import Gpu, on_gpus, plan
from lotlip.plan.towers import build_towers, parameters
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.engine import deepspeed_config
from lotlip.report.config import ScoresFigureConfig
from tests.test_table_source import DREAMLIP, write_csv
from tests.test_webdataset_source import image_bytes, write_tar

ROOT = Path(__file__).parent.parent
PAPER = ("cc3m", "cc12m", "yfcc15m", "merged-30m", "lotlip-100m", "data-scale")
GPUS = (1, 8, 32)
# ViT-B/16 without its classifier, of 224 pixels; BERT-base with its pooler. Published: 85.8 M and 109.5 M.
VIT_B16, BERT_BASE = 85_798_656, 109_482_240


def gpu_settings(gpus: int) -> dict:
    return yaml.safe_load((ROOT / "infra" / "gpus" / f"{gpus}.yaml").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("profile", PAPER)
def test_paper_profiles_have_the_papers_towers(profile):
    params = load_params(ROOT / "profiles" / f"{profile}.yaml")
    config = params.ablation("lotlip")
    towers = build_towers(config, params.image_tower)
    trained, frozen = parameters(config, towers)
    assert frozen == {"image tower": VIT_B16}
    assert trained == {
        "text encoder": BERT_BASE,
        "corner and register tokens": 2 * 768,
        "projection": 768 * 768,
        "temperature and bias": 1,
    }
    assert sum(trained.values()) == towers.trained
    assert all(value.is_meta for value in [*towers.model.parameters(), *towers.image.parameters()])


@pytest.mark.parametrize("profile", PAPER)
def test_paper_profiles_exclude_the_images_of_their_benchmarks(profile):
    params = load_params(ROOT / "profiles" / f"{profile}.yaml")
    entries = [entry for entry in params.evaluate.benchmarks.values() if isinstance(entry, PublishedBenchmarkConfig)]
    kinds = list(get_args(PublishedBenchmarkConfig.model_fields["kind"].annotation))
    assert [entry.kind for entry in entries] == kinds[: kinds.index("imagenet") + 1]  # the other kinds are variants
    assert {entry.folder for entry in entries} == set(params.ingest.evaluation_images)
    assert not any(entry.partial for entry in entries)


@pytest.mark.parametrize("profile", PAPER)
def test_paper_profiles_match_the_settings_for_eight_gpus(profile):
    profile_values = load_params(ROOT / "profiles" / f"{profile}.yaml").model_dump(mode="json", exclude_unset=True)
    assert merge(profile_values, gpu_settings(8)) == profile_values


@pytest.mark.slow
@pytest.mark.parametrize("profile", PAPER)
@pytest.mark.parametrize("gpus", GPUS)
def test_deepspeed_settings_fit_the_gpus(profile, gpus):
    params = load_params(ROOT / "profiles" / f"{profile}.yaml")
    config, compute = on_gpus(params.ablation("lotlip"), params.training_compute("lotlip"), gpus, gpu_settings(gpus))
    settings = deepspeed_config(config, compute)
    assert settings["train_batch_size"] == config.batch_size == params.pretrain.batch_size
    parts = gpus * settings["gradient_accumulation_steps"]
    assert settings["train_micro_batch_size_per_gpu"] * parts == config.batch_size
    assert settings["train_micro_batch_size_per_gpu"] <= 1024
    assert settings["bf16"] == {"enabled": True}
    assert settings["zero_optimization"]["stage"] == 1
    assert compute.launch.kind == ("slurm" if gpus == 32 else "local")
    assert plan(params, config, compute, Gpu()).remedy == ""


@pytest.mark.slow
def test_all_systems_at_all_data_scales_fit_eight_gpus(tmp_path, monkeypatch):
    """Configurations that differ in the number of images only need the same memory, and are planned once."""
    params = load_params(ROOT / "profiles" / "data-scale.yaml")
    monkeypatch.chdir(tmp_path)
    start = params.ablation("lit")
    build_towers(start, params.image_tower).model.config.save_pretrained(params.paths.models / "lit")
    distinct = {}
    for name in params.names:
        compute = params.training_compute(name)
        recipe = params.ablation(name).model_copy(update={"samples": None})
        if name in params.finetune:
            recipe = recipe.model_copy(update={"text": params.ablation("long-clip").text})
        distinct[f"{recipe!r} {compute!r}"] = recipe, compute
    assert len(distinct) == 8  # one for each system
    assert params.compute.training.processes == 8
    for recipe, compute in distinct.values():
        assert deepspeed_config(recipe, compute)["train_batch_size"] == params.pretrain.batch_size
        assert plan(params, recipe, compute, Gpu()).remedy == ""


SYSTEMS = {
    "clip": "CLIP",
    "siglip": "SigLIP",
    "filip": "FILIP",
    "laclip": "LaCLIP",
    "align": "ALIGN",
    "lit": "LiT",
    "long-clip": "Long-CLIP",
    "lotlip": "LoTLIP",
}


@pytest.mark.parametrize(
    ("file", "scales"),
    [
        ("params.yaml", {"-1of8": 0.125, "-1of4": 0.25, "-1of2": 0.5, "": None}),
        ("profiles/data-scale.yaml", {"-3m": 3_000_000, "-12m": 12_000_000, "-30m": 30_000_000, "": None}),
    ],
)
def test_tables_4_and_5_have_all_systems_at_all_scales(file, scales):
    params = load_params(ROOT / file)
    rows = [(f"{system}{scale}", label) for scale in scales for system, label in SYSTEMS.items()]
    long, short = params.tables["data-scale"], params.tables["data-scale-short"]
    assert (long.paper, list(long.rows.items())) == ("Table 4", rows)
    assert (short.paper, list(short.rows.items())) == ("Table 5", rows)
    assert list(long.columns) == ["samples", "long"]
    assert list(short.columns) == ["samples", "short", "classification"]
    assert isinstance(long.figure, ScoresFigureConfig) and long.figure.x == ["samples"]
    assert long.figure.lines == {label: [f"{name}{scale}" for scale in scales] for name, label in SYSTEMS.items()}
    for system in SYSTEMS:
        for scale, samples in scales.items():
            changed = differences(params.ablation(f"{system}{scale}").recipe(), params.ablation(system).recipe())
            start = {"text.pretrained": f"models/lit{scale}"} if system == "long-clip" else {}
            assert changed == ({"samples": samples, **start} if scale else {})
            assert params.training_compute(f"{system}{scale}") == params.training_compute(system)


@pytest.mark.parametrize("gpus", GPUS)
def test_gpu_settings_are_valid_in_params_yaml(gpus):
    lines = gpu_settings(gpus)
    assert PretrainConfig.model_validate(lines["pretrain"]).precision == "bf16"
    assert TrainingCompute.model_validate(lines["compute"]["training"]).processes == gpus


@pytest.mark.parametrize("profile", PAPER)
def test_paper_profiles_join_img2datasets_tars_with_dreamlips_tables(profile, tmp_path, monkeypatch):
    """Tars and tables have only the address of the image in common."""
    params = load_params(ROOT / "profiles" / f"{profile}.yaml")
    monkeypatch.chdir(tmp_path)
    captions = next(iter(params.caption.captioners.values())).path
    merged = captions.suffix != ".csv"
    for data in ("cc3m", "cc12m") if merged else ("",):
        urls = [f"https://example.org/{data}/{number}.jpg?x={number}" for number in range(3)]
        table = captions / data / "table.csv" if merged else captions
        write_csv(table, [DREAMLIP, *[[url, f"raw {url}", *(f"{c} {url}" for c in DREAMLIP[2:])] for url in urls]])
        members = {}
        for number, url in enumerate(reversed(urls)):
            info = {"url": url, "key": f"{number:09d}", "caption": f"raw {url}"}
            members |= {f"{number:09d}.jpg": image_bytes(), f"{number:09d}.txt": f"raw {url}".encode()}
            members[f"{number:09d}.json"] = json.dumps(info).encode()
        write_tar(params.ingest.source.path / data / "00000.tar", members)
    source = open_source(params.ingest.source, params.ingest.images)
    records = [record for unit in source.units(params.ingest.partition_size) for record in source.read(unit)]
    assert len(records) == (6 if merged else 3)
    assert {record.key.split("url-")[0] for record in records} == ({"cc3m_", "cc12m_"} if merged else {""})
    for name, column in (("instructblip", "longIB"), ("llava", "longLLA"), ("sharegpt4v", "longSV")):
        author = TableCaptioner(name, params.caption.captioners[name], len)
        for record, caption in zip(records, author.caption(records), strict=True):
            assert caption.text == record.short_caption.replace("raw", f"{column}_captions")


def test_the_profile_for_own_images_has_a_tower_pretrained_on_photographs():
    params = load_params(ROOT / "profiles" / "own-images.yaml")
    assert params.image_tower.kind == "packaged" and params.image_tower.resize == "squash"
    assert params.warnings == []
    assert build_towers(params.ablation("lit"), params.image_tower).image.width == 1280


def test_a_tower_of_generated_scenes_for_other_images_is_a_warning():
    data = yaml.safe_load((ROOT / "profiles" / "own-images.yaml").read_text(encoding="utf-8"))
    (warning,) = checked_params({**data, "image_tower": {"kind": "scenes"}}, "params.yaml").warnings
    assert "image_tower" in warning and "ingest.source" in warning and "packaged" in warning
    assert load_params(ROOT / "params.yaml").warnings == []
