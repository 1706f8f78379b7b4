"""params.yaml: shipped files load, and every error states the path, the problem and a remedy."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import ruamel.yaml
import yaml
from pydantic import ValidationError

from flows.sweep.sweep import read_sweep
from flows.sweep.trials import Sweep, make_grid
from lotlip.caption.config import PRESETS, TransformersCaptionerConfig
from lotlip.config.moved import MOVED
from lotlip.config.params import Params, checked_params, load_params
from lotlip.core.compute import Compute, TrainingCompute
from lotlip.core.section import ConfigError, Section, merge
from lotlip.core.yaml import parse_yaml
from lotlip.pretrain.config import PretrainConfig

ROOT = Path(__file__).parent.parent
SHIPPED = [ROOT / "params.yaml", *sorted((ROOT / "profiles").glob("*.yaml")), *ROOT.glob("examples/*/params.yaml")]
MINIMAL: dict[str, Any] = {
    "ingest": {"source": {"kind": "folder", "path": "images"}},
    "image_tower": {"kind": "timm", "model": "vit_base_patch16_224"},
    "caption": {"captioners": {"llava": {"kind": "table", "path": "llava.parquet"}}},
    "evaluate": {"benchmarks": {"mine": {"kind": "held-out"}}},
    "ablations": {"lotlip": {}},
}


def load(folder: Path, differences: dict[str, Any], base: dict[str, Any] = MINIMAL) -> Params:
    file = folder / "params.yaml"
    file.write_text(yaml.safe_dump(merge(copy.deepcopy(base), differences)))
    return load_params(file)


def errors_of(folder: Path, differences: dict[str, Any], base: dict[str, Any] = MINIMAL) -> list[str]:
    """Loads an invalid configuration, and returns the lines of its error below the first."""
    with pytest.raises(ConfigError) as caught:
        load(folder, differences, base)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{folder / 'params.yaml'} cannot be used:"
    assert all(line.startswith("  - ") for line in lines)
    return [line.removeprefix("  - ") for line in lines]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_files_load_and_every_ablation_resolves(file):
    params = load_params(file)
    for name in params.names:
        assert params.ablation(name).batch_size >= 2


def test_the_shipped_ablations_match_their_names():
    params = load_params(ROOT / "params.yaml")
    assert params.ablation("lotlip") == params.pretrain
    lit, long = params.ablation("lit"), params.ablation("lit-long")
    assert (lit.text.corner_tokens, lit.long_texts.sub_captions) == (0, 0)
    assert (long.text.corner_tokens, long.long_texts.sub_captions) == (0, params.pretrain.long_texts.sub_captions)
    assert not params.ablation("lotlip-no-mask").text.corner_mask
    # other keys keep the base's values, at every depth
    assert lit.text.config == params.pretrain.text.config
    assert lit.optimizer == params.pretrain.optimizer


@pytest.mark.parametrize(
    ("differences", "place", "near"),
    [
        ({"pretran": {}}, "pretran", "pretrain"),
        ({"pretrain": {"text": {"corner_token": 2}}}, "pretrain.text.corner_token", "corner_tokens"),
        ({"ingest": {"source": {"val_shares": 0.1}}}, "ingest.source.val_shares", "val_share"),
        ({"caption": {"captioners": {"llava": {"paht": "x"}}}}, "caption.captioners.llava.paht", "path"),
        ({"ablations": {"lit": {"text": {"corner_tokenz": 0}}}}, "ablations.lit.text.corner_tokenz", "corner_tokens"),
        ({"ablations": {"lit": {"step": 3}}}, "ablations.lit.step", "steps"),
    ],
)
def test_an_unknown_key_is_an_error_with_path_and_suggestion(tmp_path, differences, place, near):
    (line,) = errors_of(tmp_path, differences)
    assert line.startswith(f"{place}: unknown key; did you mean {near!r}? (known here: ")


@pytest.mark.parametrize("name", ["1e-3", "5e4", "1_0e3", "0o7"])
def test_a_name_that_dvc_reads_as_a_number_is_an_error(tmp_path, name):
    """DVC reads YAML 1.2, and would have no stage for it."""
    yaml = ruamel.yaml.YAML(typ="safe", pure=True)
    assert not isinstance(yaml.load(name), str)
    (line,) = errors_of(tmp_path, {"ablations": {name: {"steps": 300}}})
    assert line.startswith(f"ablations.{name}: should be a name that is no number in YAML 1.2, such as n-{name}")
    assert load(tmp_path, {"ablations": {f"n-{name}": {"steps": 300}}}).ablation(f"n-{name}").steps == 300


@pytest.mark.parametrize("key", ["samples", "loss.text_components", "loss.image_components"])
def test_a_share_of_one_is_not_taken_for_a_count_of_one(tmp_path, key):
    def nested(value: Any) -> dict[str, Any]:
        section: Any = value
        for part in reversed(key.split(".")):
            section = {part: section}
        return {"ablations": {"mine": section}}

    (line,) = errors_of(tmp_path, nested(1.0))
    assert line == f"ablations.mine.{key}: should be a count (a whole number) or a share below 1, not 1.0"
    for value in (0.5, 1000):
        load(tmp_path, nested(value))


def test_a_name_that_is_also_a_kind_stays_in_the_path(tmp_path):
    benchmark = {"kind": "scenes", "size": 5, "splitt": "val"}
    (line,) = errors_of(tmp_path, {"evaluate": {"benchmarks": {"scenes": benchmark}}})
    assert line.startswith("evaluate.benchmarks.scenes.splitt: unknown key; did you mean 'split'?")


def test_an_unknown_key_lists_the_keys_of_the_chosen_kind_only(tmp_path):
    (line,) = errors_of(tmp_path, {"ingest": {"source": {"zzz": 1}}})
    assert line == "ingest.source.zzz: unknown key (known here: kind, path, split_seed, test_share, val_share)"


def test_the_name_of_a_published_benchmark_is_its_default_kind(tmp_path):
    benchmarks = {
        "urban-1k": {"folder": "data/urban"},
        "mine": {"kind": "iiw", "folder": "data/iiw", "images": "data/sam", "partial": 20},
        "coco": {"kind": "held-out"},
        "dci": {"folder": "data/dci", "partial": True},
    }
    evaluate = load(tmp_path, {"evaluate": {"benchmarks": benchmarks}}).evaluate
    kinds = {name: entry.kind for name, entry in evaluate.benchmarks.items()}
    assert kinds == {"mine": "iiw", "urban-1k": "urban-1k", "coco": "held-out", "dci": "dci"}
    assert evaluate.benchmarks["mine"].partial == 20
    assert evaluate.benchmarks["dci"].partial is True
    assert evaluate.benchmarks["urban-1k"].partial is False
    assert sorted(evaluate.names) == ["coco", "dci-partial", "mine-partial", "urban-1k"]
    reloaded = load(tmp_path, {"evaluate": evaluate.model_dump(mode="json")}).evaluate
    assert reloaded == evaluate


@pytest.mark.parametrize(
    ("name", "entry", "line"),
    [
        (
            "urban1k",
            {"folder": "x"},
            "evaluate.benchmarks.urban1k.kind: missing; it has no default (there are: scenes, ",
        ),
        (
            "urban-1k",
            {"folderr": "x", "folder": "x"},
            "evaluate.benchmarks.urban-1k.folderr: unknown key; did you mean ",
        ),
        ("urban-1k", {}, "evaluate.benchmarks.urban-1k.folder: missing; it has no default"),
        (
            "urban-1k",
            {"folder": "x", "partial": 0},
            "evaluate.benchmarks.urban-1k.partial: must be true (",
        ),
        (
            "urban-1k",
            {"folder": "x", "partial": "yes"},
            "evaluate.benchmarks.urban-1k.partial: must be true (",
        ),
        (
            "dci-partial",
            {"kind": "dci", "folder": "x"},
            "evaluate: benchmarks.dci-partial: the suffix -partial is reserved",
        ),
    ],
)
def test_an_invalid_published_benchmark_is_one_error_with_its_path(tmp_path, name, entry, line):
    (error,) = errors_of(tmp_path, {"evaluate": {"benchmarks": {name: entry}}})
    assert error.startswith(line)


def test_all_errors_are_in_one_list(tmp_path):
    differences = {"ablations": {"a": {"steps": 0, "text": {"corner_token": 1}}, "b": {"batch_size": 1}}}
    lines = errors_of(tmp_path, differences)
    assert [line.split(":")[0] for line in lines] == [
        "ablations.a.steps",
        "ablations.a.text.corner_token",
        "ablations.b.batch_size",
    ]


@pytest.mark.parametrize(
    ("differences", "line"),
    [
        (
            {"pretrain": {"text": {"corner_tokens": 20}}},
            "pretrain.text.corner_tokens: Input should be less than or equal to 16, not 20",
        ),
        (
            {"ablations": {"x": {"optimizer": {"learning_rate": 0}}}},
            "ablations.x.optimizer.learning_rate: Input should be greater than 0, not 0",
        ),
        ({"pretrain": {"precision": "fp8"}}, "pretrain.precision: Input should be 'fp32' or 'bf16', not 'fp8'"),
        (
            {"ingest": {"source": {"val_share": 0.5, "test_share": 0.5}}},
            "ingest.source: val_share + test_share must be below 1, to leave samples for training",
        ),
        (
            {"pretrain": {"seeds": [202405101200]}},
            "pretrain.seeds.0: Input should be less than or equal to 4294967295, not 202405101200",
        ),
        ({"shard": {"seed": -1}}, "shard.seed: Input should be greater than or equal to 0, not -1"),
        (
            {"pretrain": {"optimizer": {"betas": [0.9, 1]}}},
            "pretrain.optimizer.betas.1: Input should be less than 1, not 1",
        ),
        (
            {"compute": {"training": {"peer_timeout_seconds": 1e300}}},
            "compute.training.peer_timeout_seconds: Input should be less than or equal to 1000000000, not 1e+300",
        ),
        (
            {"compute": {"training": {"launch": {"kind": "rendezvous", "nodes": 1, "endpoint": "host:65536"}}}},
            "compute.training.launch.endpoint: must have a port in 1 to 65535, not 'host:65536'",
        ),
        (
            {"image_tower": {"mean": [123.7, 116.3, 103.5]}},
            "image_tower.mean: [123.7, 116.3, 103.5] is outside 0..1, but pixels are 0..1; divide values for 0..255 by "
            "255",
        ),
        (
            {"image_tower": {"std": [58.4, 57.1, 57.4]}},
            "image_tower.std: [58.4, 57.1, 57.4] is outside 0..1, but pixels are 0..1; divide values for 0..255 by 255",
        ),
        (
            {"image_tower": {"std": [-0.1, 1, 1]}},
            "image_tower.std: [-0.1, 1.0, 1.0] is outside 0..1, but pixels are 0..1; divide values for 0..255 by 255",
        ),
        (
            {"image_tower": {"std": [0, 0.2, 0.2]}},
            "image_tower.std: [0.0, 0.2, 0.2] has a 0, by which pixels cannot be divided; null: as the model was "
            "trained",
        ),
    ],
)
def test_a_value_out_of_range_is_an_error_stating_the_range(tmp_path, differences, line):
    assert errors_of(tmp_path, differences) == [line]


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("parallel_stages", True, "compute.parallel_stages: Input should be a valid integer, .*, not 'true'"),
        ("retry_delay_seconds", False, "compute.retry_delay_seconds: Input should be a valid number, .*, not 'false'"),
        ("training", {"zero_stage": True}, "compute.training.zero_stage: Input should be 0, 1, 2 or 3, not 'true'"),
        (
            "ablations",
            {"lotlip": {"processes": True}},
            "compute.ablations.lotlip.processes: Input should be a valid int",
        ),
    ],
)
def test_a_boolean_is_no_number(tmp_path, key, value, line):
    (error,) = errors_of(tmp_path, {"compute": {key: value}})
    assert re.search(line, error)


def fields_of_sections() -> list[tuple[type[Section], str, str]]:
    """Every field of every section, with its type as text."""
    sections = [Section]
    for section in sections:
        sections += section.__subclasses__()
    return [(one, name, str(field.annotation)) for one in sections for name, field in one.model_fields.items()]


def test_no_number_of_any_section_takes_a_boolean():
    """Neither alone nor in a list or mapping, also where another type is possible."""
    numbers = 0
    for section, name, kinds in fields_of_sections():
        if re.search(r"\b(int|float)\b", kinds) and not re.search(r"\bbool\b|\bAny\b", kinds):
            for value in (True, [True], {"name": True}):
                with pytest.raises(ValidationError) as caught:
                    section.model_validate({name: value})
                assert name in {error["loc"][0] for error in caught.value.errors()}, (section, name, value)
            numbers += 1
    assert numbers > 100


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_no_number_of_any_section_is_infinite(value):
    """Pydantic takes infinity for a number above 0, unless a section forbids it."""
    numbers = 0
    for section, name, kinds in fields_of_sections():
        if re.search(r"\bfloat\b", kinds):
            with pytest.raises(ValidationError) as caught:
                section.model_validate({name: value})
            assert name in {error["loc"][0] for error in caught.value.errors()}, (section, name)
            numbers += 1
    assert numbers > 50


def test_whole_numbers_may_be_floats_and_null_stays_null(tmp_path):
    params = load(tmp_path, {"compute": {"parallel_stages": 2.0}, "pretrain": {"seeds": [0, 3.0], "samples": None}})
    assert (params.compute.parallel_stages, params.pretrain.seeds, params.pretrain.samples) == (2, [0, 3], None)
    assert params.compute.training.activation_checkpointing is False
    (error,) = errors_of(tmp_path, {"compute": {"parallel_stages": 2.5}})
    assert "compute.parallel_stages: Input should be a valid integer, got a number with a fractional part" in error


def test_missing_keys_are_errors(tmp_path):
    base = {name: section for name, section in MINIMAL.items() if name != "ingest"}
    assert errors_of(tmp_path, {}, base) == ["ingest: missing; it has no default"]
    base = {**MINIMAL, "ingest": {"source": {"path": "images"}}}
    assert errors_of(tmp_path, {}, base) == [
        "ingest.source.kind: missing; it has no default "
        "(there are: scenes, folder, webdataset, parquet, csv, jsonl, json)"
    ]


def test_an_unknown_kind_is_an_error_listing_the_kinds(tmp_path):
    (line,) = errors_of(tmp_path, {"image_tower": {"kind": "resnet"}})
    assert (
        line
        == "image_tower.kind: unknown kind 'resnet' (there are: scenes, timm, packaged, transformers, open_clip, start)"
    )


def test_an_image_tower_of_kind_start_needs_a_starting_model(tmp_path):
    changed = MINIMAL | {"image_tower": {"kind": "start"}}
    with pytest.raises(ConfigError, match=r"image_tower\.kind is start, but pretrain\.start is null"):
        checked_params(changed, "params.yaml")


@pytest.mark.parametrize(
    ("differences", "line"),
    [
        (
            {"pretrain": {"long_texts": {"captioners": ["gpt"]}}},
            "ablations.lotlip.long_texts.captioners has gpt, but the captioners that describe images are: llava",
        ),
        (
            {"pretrain": {"batch_size": 30}, "compute": {"training": {"gradient_accumulation_steps": 4}}},
            "ablation lotlip: batch_size 30 is not divisible by processes × gradient_accumulation_steps = 4; use "
            "28 or 32",
        ),
        (
            {"ablations": {"odd": {}}, "compute": {"ablations": {"odd": {"processes": 5}}}},
            "ablation odd: batch_size 64 is not divisible by processes × gradient_accumulation_steps = 5; use 60 or 65",
        ),
        (
            {"pretrain": {"text": {"context_length": 8, "corner_tokens": 5}}},
            "pretrain.text: context_length 8 has no room for 5 extra tokens and words",
        ),
        ({"pretrain": {"seeds": [1, 2, 1]}}, "pretrain: seeds [1, 2, 1] contains duplicates; remove them"),
        (
            {"pretrain": {"text": {"corner_tokens": 0, "register_tokens": 5, "context_length": 8}}},
            "pretrain.text: context_length 8 has no room for 5 extra tokens and words",
        ),
        (
            {"pretrain": {"start": "openai/clip-vit-base-patch16"}},
            "pretrain.start is openai/clip-vit-base-patch16, but image_tower.kind is timm; a starting model has both "
            "towers, so set image_tower: {kind: start}",
        ),
        (
            {"pretrain": {"text": {"position_interpolation": {}}}},
            "pretrain: text.position_interpolation needs trained positions; name the model in start or text.pretrained",
        ),
        (
            {
                "pretrain": {
                    "text": {"pretrained": "models/lit/seed-0", "context_length": 249, "position_interpolation": {}}
                }
            },
            "pretrain.text: position_interpolation gives 248 positions, fewer than context_length 249; "
            "raise position_interpolation.factor or lower context_length",
        ),
        (
            {"pretrain": {"text": {"pretrained": "a", "position_interpolation": {"positions": 20}}}},
            "pretrain.text.position_interpolation: keep 20 leaves none of 20 positions to interpolate; set it lower",
        ),
        (
            {"ablations": {"filip": {"similarity": "late-interaction"}}},
            "ablations.filip: similarity late-interaction does not support corner tokens; set text.corner_tokens to 0",
        ),
        (
            {
                "pretrain": {
                    "similarity": "late-interaction",
                    "text": {"corner_tokens": 0},
                    "loss": {"image_components": 8},
                }
            },
            "pretrain: loss.image_components needs one feature per image and text, which late-interaction does not "
            "have; set it to 0",
        ),
        (
            {"pretrain": {"similarity": "late-interaction", "text": {"corner_tokens": 0}, "loss": {"masks": {}}}},
            "pretrain: loss.masks needs one feature per image and text, which late-interaction does not have; set it "
            "to null",
        ),
        (
            {"pretrain": {"loss": {"masks": {}, "text_components": 0.9}}},
            "pretrain.loss: masks select channels of the full features; set image_components and text_components to 0, "
            "or masks to null",
        ),
        (
            {"pretrain": {"loss": {"conditioned": {}}}},
            "pretrain.loss: conditioned needs objective: siglip; set it, or set conditioned to null",
        ),
        (
            {"pretrain": {"loss": {"initial_bias": -10}}},
            "pretrain.loss: objective infonce has no bias; set initial_bias to null",
        ),
        *(
            (
                {"ablations": {"none": weights}},
                "ablations.none: no text has a weight in the loss, so nothing is learned; raise "
                "loss.short_loss_weight or, with long texts, loss.long_loss_weight",
            )
            for weights in (
                {"loss": {"short_loss_weight": 0}, "long_texts": {"sub_captions": 0}},
                {"loss": {"short_loss_fraction": 0, "long_loss_weight": 0}},
                {"loss": {"short_loss_fraction": 1, "short_loss_weight": 0}},
            )
        ),
        (
            {"caption": {"quality": {"short": 30, "long": 3}}},
            "caption.quality: short 30 is above long 3, so every caption is dropped; lower it",
        ),
        (
            {"ingest": {"source": {"test_share": 0}}},
            "evaluate.benchmarks.mine reads the split test, which has no images; raise ingest.source.test_share",
        ),
    ],
)
def test_inconsistent_sections_are_errors(tmp_path, differences, line):
    assert errors_of(tmp_path, differences) == [line]


@pytest.mark.parametrize(
    ("differences", "line"),
    [
        ({"image_tower": {"heads": 7}}, "image_tower: heads 7 does not divide width 128; change one of them"),
        ({"image_tower": {"patch_size": 12}}, "image_tower: patch_size 12 is not a power of two"),
        (
            {"image_tower": {"patch_size": 128}},
            "image_tower: patch_size 128 does not divide image_size 64; lower it",
        ),
        (
            {"ingest": {"source": {"test": 6000}}},
            "evaluate.benchmarks.scenes.size is 5000, but ingest.source.test is 6000; set one to the other's value",
        ),
        (
            {"evaluate": {"benchmarks": {"captions": {"size": 5001}}}},
            "evaluate.benchmarks.captions.size is 5001, but ingest.source.test is 5000; set one to the other's value",
        ),
    ],
)
def test_inconsistent_settings_of_the_demo_are_errors(tmp_path, differences, line):
    demo = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert errors_of(tmp_path, differences, demo) == [line]


def test_long_texts_need_a_captioner(tmp_path):
    bare = {**MINIMAL, "caption": {}}
    (line,) = errors_of(tmp_path, {}, bare)
    assert line.startswith("ablations.lotlip uses long texts, but caption.captioners has no captioner that describes")
    params = load(tmp_path, {"pretrain": {"long_texts": {"captioners": ["raw"]}}}, bare)
    assert params.ablation("lotlip").long_texts.sub_captions == 3
    params = load(tmp_path, {"pretrain": {"long_texts": {"sub_captions": 0}}}, bare)
    assert params.ablation("lotlip").long_texts.sub_captions == 0


def test_no_benchmarks_are_an_error(tmp_path):
    (line,) = errors_of(tmp_path, {}, {**MINIMAL, "evaluate": {"benchmarks": {}}})
    assert line.startswith("evaluate.benchmarks: is empty, so no model could be scored; add one, such as")


def test_no_ablations_are_an_error(tmp_path):
    (line,) = errors_of(tmp_path, {}, {**MINIMAL, "ablations": {}})
    assert "ablations is empty" in line


def test_an_unknown_ablation_is_an_error_listing_the_ablations(tmp_path):
    with pytest.raises(ConfigError, match=r"no ablation 'lit' in params.yaml; there are: lotlip"):
        load(tmp_path, {}).ablation("lit")


def test_an_unreadable_file_is_an_error_with_its_reason(tmp_path):
    with pytest.raises(ConfigError, match="does not exist; run from the project's root"):
        load_params(tmp_path / "params.yaml")
    file = tmp_path / "params.yaml"
    file.write_text("pretrain: [unclosed")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_params(file)
    file.write_text("- a list")
    with pytest.raises(ConfigError, match="must be a mapping of sections"):
        load_params(file)
    for encoding in ("utf-16", "latin-1"):
        file.write_text("title: Bäume", encoding=encoding)
        with pytest.raises(ConfigError, match=r"params\.yaml is not UTF-8; save it as UTF-8"):
            load_params(file)


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("pretrain: {steps: 1}\nablations: {}\npretrain: {seeds: [1]}\n", "pretrain", (1, 3)),
        ("ablations:\n  lit: {steps: 1}\n  'lit': {steps: 2}\n", "lit", (2, 3)),
        ("- {seeds: 1,\n   seeds: 1}\n", "seeds", (1, 2)),
        ("base: &base {a: 1}\nother:\n  <<: *base\n  a: 2\n  a: 3\n", "a", (4, 5)),
    ],
)
def test_a_repeated_key_is_an_error_with_both_lines(tmp_path, text, key, lines):
    file = tmp_path / "params.yaml"
    file.write_text(text)
    message = f"the key {key!r} is on line {lines[0]} and again on line {lines[1]}; rename or remove one of them"
    for read in (load_params, lambda file: read_sweep(str(file))):
        with pytest.raises(ConfigError) as caught:
            read(file)
        assert str(caught.value) == f"{file} is not YAML: {message}"


def test_merged_keys_may_be_overridden():
    text = """
    deep: {deeper: {deepest: &long {<<: &short {a: 1, b: 1}, b: 2, c: 2}}}
    lists: [{<<: [*long, *short], c: 3}, *long]
    """
    long = {"a": 1, "b": 2, "c": 2}
    assert parse_yaml(text, "") == {"deep": {"deeper": {"deepest": long}}, "lists": [long | {"c": 3}, long]}


def test_merge_recurses_into_mappings_and_replaces_other_values():
    base = {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2], "c": 3}
    merged = merge(base, {"a": {"y": {"w": 4}}, "b": [5], "d": {"e": 6}, "c": {"f": 7}})
    assert merged == {"a": {"x": 1, "y": {"z": 2, "w": 4}}, "b": [5], "c": {"f": 7}, "d": {"e": 6}}
    assert base == {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2], "c": 3}
    assert merge({"a": {"x": 1}}, {"a": None}) == {"a": None}


def test_sections_are_frozen(tmp_path):
    params = load(tmp_path, {})
    with pytest.raises(ValidationError, match="frozen"):
        params.pretrain.steps = 5
    with pytest.raises(ValidationError, match="frozen"):
        params.pretrain.text.corner_tokens = 5


def test_the_documented_variants_are_ablations_of_the_demo(tmp_path):
    """docs/method.md names a configuration for each system that the paper compares."""
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    block, objectives = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL))
    block["ablations"] |= objectives["ablations"]
    demo = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    (tmp_path / "params.yaml").write_text(
        yaml.safe_dump({**demo, "reproduce": {}, "tables": {}, "findings": {}, **block}),
        encoding="utf-8",
    )
    params = load_params(tmp_path / "params.yaml")
    configs = {name: params.ablation(name) for name in params.names}
    assert len(configs) == 20
    assert len({config.model_dump_json() for config in configs.values()}) == 20  # all are different
    assert configs["long-clip"].text.position_interpolation is not None
    assert configs["long-clip"].text.position_interpolation.interpolated == 248
    assert configs["filip"].from_pixels and configs["clip"].from_pixels and not configs["lotlip"].from_pixels


OTHER_COMPUTE = {
    "device": "cpu",
    "batch_size": 7,
    "workers": 3,
    "parallel_stages": 3,
    "retries": 5,
    "retry_delay_seconds": 0.5,
    "task_runner": "ray",
    "shared_folder": False,
    "ray": {"gpus_per_worker": 1},
    "dask": {"address": "tls://a:1"},
    "training": {
        "processes": 2,
        "gradient_accumulation_steps": 4,
        "activation_checkpointing": True,
        "zero_stage": 2,
        "launch": {"kind": "rendezvous", "nodes": 2, "endpoint": "a:1"},
        "loader_workers": 7,
        "remote_shards": {"url": "s3://bucket/shards"},
        "prefetch": 1,
        "log_every": 1,
        "checkpoint_every": 1,
        "stop_at_chance_after": 1,
        "peer_timeout_seconds": 1,
        "max_final_loss_share": 2,
    },
    "ablations": {"lotlip": {"gradient_accumulation_steps": 8}},
    "captioners": {"llava": {"batch_size": 1, "concurrency": 1}},
}


@pytest.mark.slow
def test_compute_settings_do_not_decide_results(tmp_path):
    """No key of `compute` changes a recipe, the identity of a trial or the dependencies of DVC."""
    assert OTHER_COMPUTE.keys() == Compute.model_fields.keys()
    assert OTHER_COMPUTE["training"].keys() | {"parallel_seeds"} == TrainingCompute.model_fields.keys()
    demo = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    plain = checked_params(demo, "params.yaml")
    identity = make_grid(Sweep(name="a", seeds=[0]), plain)[0].identity()
    cases = [{key: value} for key, value in OTHER_COMPUTE.items()]
    cases += [{"training": {key: value}} for key, value in OTHER_COMPUTE["training"].items() if key != "launch"]
    cases += [{"training": {"parallel_seeds": 2}}]
    for case in cases:
        changed = checked_params({**demo, "compute": case}, "params.yaml")
        assert changed.decisive_sections() == plain.decisive_sections()
        assert [changed.ablation(name) for name in changed.names] == [plain.ablation(name) for name in plain.names]
        assert make_grid(Sweep(name="a", seeds=[0]), changed)[0].identity() == identity
    dvc = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    assert "compute" not in dvc


@pytest.mark.parametrize("key", [key for key in MOVED if "NAME" not in key])
def test_an_old_key_is_an_error_naming_the_new_one(tmp_path, key):
    data: object = 1
    for part in reversed(key.split(".")):
        data = {part: data}
    with pytest.raises(ConfigError, match=re.escape(f"{key}: is now {MOVED[key]}")):
        load(tmp_path, data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"ablations": {"a": {"accumulation": 2}}}, "ablations.a.accumulation: is now compute.ablations.a.gradient"),
        ({"ablations": {"a": {"loss": {"raw_share": 0}}}}, "a.loss.raw_share: is now ablations.a.loss.short_loss_fr"),
        (
            {"caption": {"captioners": {"x": {"kind": "transformers", "path": "p", "model": "p", "batch_size": 2}}}},
            "caption.captioners.x.batch_size: is now compute.captioners.x.batch_size",
        ),
        ({"finetune": {"x": {"after": "lotlip", "pretrain": {}}}}, "finetune.x.after: is now finetune.x.init_from"),
    ],
)
def test_an_old_key_below_a_name_is_an_error_naming_the_new_one(tmp_path, data, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(tmp_path, data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_tower": {"augmentation": {}}}, "the features are stored; set features to computed"),
        (
            {"image_tower": {"features": "computed", "augmentation": {"scale": [0.9, 0.5]}}},
            r"\[0.9, 0.5\] is not a valid range",
        ),
        ({"loader": {"weights": {"a": 2}}}, "weights need epochs: resampled"),
        ({"loader": {"samples_per_epoch": 10}}, "samples_per_epoch need epochs: resampled"),
    ],
)
def test_inconsistent_settings_of_image_tower_and_loader_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig.model_validate(settings)


# --- captioners of transformers ---------------------------------------------------------------------------------------

MLLM = {"kind": "transformers", "path": "lotlip/caption/captioners/transformers.py"}
COMMIT = "0123456789" * 4


def mllm(folder: Path, entry: dict[str, Any]) -> TransformersCaptionerConfig:
    section = load(folder, {"caption": {"captioners": {"mine": {**MLLM, **entry}}}}).caption.captioners["mine"]
    assert isinstance(section, TransformersCaptionerConfig)
    return section


@pytest.mark.parametrize("preset", [name for name in PRESETS if "model" in PRESETS[name]])
def test_an_entry_overrides_its_preset(tmp_path, preset):
    plain, other = mllm(tmp_path, {"preset": preset}), mllm(tmp_path, {"preset": preset, "max_new_tokens": 7})
    assert {name: getattr(plain, name) for name in PRESETS[preset]} == PRESETS[preset]
    assert other == plain.model_copy(update={"max_new_tokens": 7})
    assert TransformersCaptionerConfig.model_validate(plain.model_dump()) == plain


def test_every_preset_can_use_a_local_folder(tmp_path):
    for preset in PRESETS:
        section = mllm(tmp_path, {"preset": preset, "model": "weights/mine", "path": "weights/mine/"})
        assert section.in_a_folder
        assert (section.revision, section.prompt) == (None, PRESETS[preset]["prompt"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"preset": "sharegpt4v-13b"}, ": preset sharegpt4v-13b has no model, .* set model and path to a folder"),
        ({"preset": "llava-1.5-13b", "model": "me/llava"}, ": model me/llava is on the hub, .* set revision"),
        ({"model": "me/llava"}, ": model me/llava is on the hub, .* set revision to one of its commits"),
        ({"model": "me/llava", "revision": "main"}, r"\.revision: .*not 'main'"),
        (
            {"model": "here", "path": "here", "revision": COMMIT},
            ": the model in here is identified by the hash of its files",
        ),
        (
            {"model": "me/llava", "revision": COMMIT, "temperature": 1, "num_beams": 2},
            r": temperature \(sampling\) and num_beams",
        ),
        ({"preset": "llava", "model": "me/llava", "revision": COMMIT}, r"\.preset: .*'llava-1\.5-13b'.*not 'llava'"),
        ({}, r"\.model: missing; it has no default"),
    ],
)
def test_an_ambiguous_model_is_an_error(tmp_path, entry, message):
    (line,) = errors_of(tmp_path, {"caption": {"captioners": {"mine": {**MLLM, **entry}}}})
    assert re.match(rf"caption\.captioners\.mine{message}", line)


def test_init_from_starts_with_the_models_of_the_ablation(tmp_path):
    finetune = {"long-clip": {"init_from": "lotlip", "pretrain": {"text": {"corner_tokens": 0}}}}
    params = load(tmp_path, {"finetune": finetune, "paths": {"models": "there"}})
    assert params.names == ["lotlip", "long-clip"]
    assert (params.ablation("long-clip").text.pretrained, params.ablation("long-clip").text.corner_tokens) == (
        "there/lotlip",
        0,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune": {"x": {"init_from": "nobody", "pretrain": {}}}}, "finetune.x.init_from: no ablation 'nobody'"),
        (
            {"finetune": {"lotlip": {"init_from": "lotlip", "pretrain": {}}}},
            "finetune.lotlip has the name of an ablation",
        ),
        ({"reproduce": {"ablations": ["nobody"]}}, "reproduce.ablations: no ablation 'nobody'"),
        ({"finetune": {"x": {"init_from": "lotlip", "pretrain": {"steps": -1}}}}, "finetune.x.pretrain.steps"),
    ],
)
def test_references_to_unknown_ablations_are_errors(tmp_path, changes, message):
    assert any(message in line for line in errors_of(tmp_path, changes))


# --- paths and names --------------------------------------------------------------------------------------------------


def demo(**paths: str) -> dict:
    data = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text(encoding="utf-8"))
    data["paths"] |= paths
    return data


@pytest.mark.parametrize(
    "path",
    [
        *(".", "./", "..", "../x", "/tmp/x", "data/../..", "x/../../y", "data", "models/lit", "metrics"),
        *(
            "lotlip",
            "lotlip/x",
            ".git",
            ".dvc/x",
            ".lotlip/x",
            "tests",
            "docs",
            "examples",
            "params.yaml",
            "imported/b16",
        ),
    ],
)
def test_output_paths_must_be_separate_folders_of_the_project(path: str) -> None:
    with pytest.raises(ConfigError, match="report"):
        checked_params(demo(report=path), "params.yaml")


@pytest.mark.slow
def test_other_paths_in_the_project_are_accepted() -> None:
    checked_params(demo(report="out/page", models="out/models", metrics="m", stages="m/stages"), "params.yaml")
    checked_params(demo(stages="records"), "params.yaml")
    checked_params(demo(caption_store="/shared/captions"), "params.yaml")


@pytest.mark.parametrize("path", ["data/ingest", "data/ingest/x", "report", "data", ".", ".."])
def test_an_input_inside_an_output_is_an_error(path: str) -> None:
    data = demo()
    data["ingest"]["source"] = {"kind": "folder", "path": path}
    data["evaluate"]["benchmarks"]["coco"] = {"folder": path}
    with pytest.raises(ConfigError, match=r"ingest\.source\.path: (.|\n)*evaluate\.benchmarks\.coco\.folder"):
        checked_params(data, "params.yaml")


LONG = "x" * 300


@pytest.mark.parametrize("where", ["ablations", "captioners", "benchmarks"])
def test_names_too_long_for_files_are_errors(where: str) -> None:
    data = demo()
    if where == "ablations":
        data["ablations"][LONG] = {}
    elif where == "captioners":
        data["caption"]["captioners"][LONG] = data["caption"]["captioners"]["llava"]
    else:
        data["evaluate"]["benchmarks"][LONG] = data["evaluate"]["benchmarks"]["scenes"]
    with pytest.raises(ConfigError, match=rf"{where}\.{LONG}"):
        checked_params(data, "params.yaml")


@pytest.mark.parametrize("name", ["raw", "key", "size", "partition", "sha256", "offset", "ingest", "image_tower"])
def test_a_captioner_named_like_a_column_is_an_error(name: str) -> None:
    data = demo()
    data["caption"]["captioners"][name] = data["caption"]["captioners"]["llava"]
    with pytest.raises(ConfigError, match=rf"captioners\.{name}"):
        checked_params(data, "params.yaml")


# --- tables and findings of the report --------------------------------------------------------------------------------


TABLE: dict[str, Any] = {"title": "Systems", "rows": ["lotlip"]}


def test_rows_and_columns_may_have_labels_and_keep_their_order(tmp_path):
    rows, columns = ["lotlip", {"lit": "LiT"}], ["flops", {"text.corner_tokens": "m"}, "long"]
    changes = {"ablations": {"lit": {}}, "tables": {"a": {"title": "A", "rows": rows, "columns": columns}}}
    table = load(tmp_path, changes).tables["a"]
    assert list(table.rows.items()) == [("lotlip", ""), ("lit", "LiT")]
    assert list(table.columns.items()) == [("flops", ""), ("text.corner_tokens", "m"), ("long", "")]
    assert list(load(tmp_path, {"tables": {"a": TABLE}}).tables["a"].columns) == [
        "changes",
        "long",
        "short",
        "classification",
    ]


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (
            {"rows": ["lotlip", "lotlib"]},
            "tables.a.rows: no ablation 'lotlib'; did you mean 'lotlip'? (there are: lotlip)",
        ),
        (
            {"columns": ["text.corner_token"]},
            "tables.a.columns: no setting or score 'text.corner_token'; did you mean 'text.corner_tokens'?",
        ),
        (
            {"columns": ["long.text_to_image.r2"]},
            "tables.a.columns: no setting or score 'long.text_to_image.r2'; did you mean 'long.text_to_image.r",
        ),
        (
            {"figure": {"kind": "scores", "x": "text.corner_token"}},
            "tables.a.figure.x: no key 'text.corner_token' in pretrain; did you mean 'text.corner_tokens'?",
        ),
        (
            {"figure": {"kind": "scores", "x": "text.corner_mask"}},
            "tables.a.figure.x: text.corner_mask is True in ablation lotlip, not a number",
        ),
        (
            {"figure": {"kind": "scores", "x": "text.register_tokens", "x_scale": "log"}},
            "tables.a.figure.x_scale: log shows only values above 0, but text.register_tokens is 0 in ablation lotlip; "
            "leave the ablation out, or use linear",
        ),
        (
            {"figure": {"kind": "scores", "x": "steps", "lines": {"ours": ["lotlib"]}}},
            "tables.a.figure.lines.ours: no ablation 'lotlib'; did you mean 'lotlip'?",
        ),
        ({"figure": {"kind": "cost", "x": "steps"}}, "tables.a.figure.x: unknown key (known here: kind)"),
        ({"figure": {"x": "steps"}}, "tables.a.figure.kind: missing; it has no default (there are: scores, cost)"),
        ({"rows": ["lotlip", "lotlip"]}, "tables.a.rows: contains duplicates: lotlip"),
        ({"rows": [["lotlip"]]}, "tables.a.rows: must be a list of names, each with an optional label"),
        ({"rows": []}, "tables.a.rows: Value should have at least 1 item"),
        ({"colums": []}, "tables.a.colums: unknown key; did you mean 'columns'?"),
    ],
)
def test_an_invalid_table_is_an_error_with_path_and_suggestion(tmp_path, table, line):
    (error,) = errors_of(tmp_path, {"tables": {"a": TABLE | table}})
    assert error.startswith(line)


def test_a_logarithmic_axis_may_show_a_sum_above_0_and_settings_whose_null_is_a_number(tmp_path):
    for x in (["text.register_tokens", "text.corner_tokens"], "samples", "loss.short_loss_fraction"):
        figure = {"kind": "scores", "x": x, "x_scale": "log"}
        assert load(tmp_path, {"tables": {"a": TABLE | {"figure": figure}}}).tables["a"].figure.x_scale == "log"


def test_a_table_with_a_reserved_name_is_an_error(tmp_path):
    (line,) = errors_of(tmp_path, {"tables": {"all": TABLE}})
    assert line == "tables.all: this name is reserved by the report; choose another name"


@pytest.mark.parametrize(
    ("findings", "line"),
    [
        ({"lit": "lotlib"}, "findings.lit: no ablation 'lotlib'; did you mean 'lotlip'? (there are: lotlip)"),
        ({"registers": ["lotlip", "r"]}, "findings.registers: no ablation 'r' (there are: lotlip)"),
        ({"lit_lng": "lotlip"}, "findings.lit_lng: unknown key; did you mean 'lit_long'?"),
        (
            {"benchmarks": ["mien"]},
            "findings.benchmarks: no benchmark 'mien'; did you mean 'mine'? (there are: mine)",
        ),
        (
            {"benchmarks": ["chosen"]},
            "findings.benchmarks: chosen is of the split val, which only chooses ablations; name another one",
        ),
        (
            {"other_benchmarks": {"mask": {"long": ["mien"]}}},
            "findings.other_benchmarks.mask.long: no benchmark 'mien'; did you mean 'mine'? (there are: mine)",
        ),
        ({"other_benchmarks": {"mask": {"long": []}}}, "findings.other_benchmarks.mask.long: "),
        (
            {"other_benchmarks": {"masks": {"long": ["mine"]}}},
            "findings.other_benchmarks.masks: Input should be 'long-texts-teach-long', ",
        ),
    ],
)
def test_an_invalid_finding_is_an_error_with_path_and_suggestion(tmp_path, findings, line):
    benchmarks = {"chosen": {"kind": "held-out", "split": "val"}} if findings.get("benchmarks") == ["chosen"] else {}
    (error,) = errors_of(tmp_path, {"findings": findings, "evaluate": {"benchmarks": benchmarks}})
    assert error.startswith(line)


@pytest.mark.parametrize(
    ("findings", "line"),
    [
        ({"lit": "plain", "lit_long": "plain"}, "findings.lit and findings.lit_long both name plain, which would be"),
        ({"captioners": ["one", "lotlip"]}, "findings.lotlip and findings.captioners both name lotlip, which would"),
        (
            {"lotlip_by_short_share": ["lotlip"], "lit_long_by_short_share": ["plain", "lotlip"]},
            "findings.lotlip_by_short_share and findings.lit_long_by_short_share both name lotlip, which would be",
        ),
        (
            {"corner_tokens": ["plain", "both"], "registers": ["plain", "both"]},
            "findings.corner_tokens and findings.registers both name both, which would be compared with itself; remove",
        ),
        ({"captioners": ["one", "plain", "one"]}, "findings.captioners: contains duplicates: one"),
        (
            {"corner_tokens": ["plain", "lotlip", "open"]},
            "findings.corner_tokens: lotlip and open both have text.corner_tokens 2; keep the one that differs from",
        ),
        (
            {"context_lengths": ["lotlip", "open"]},
            "findings.context_lengths: lotlip and open both have text.context_length 128; keep the one that differs",
        ),
    ],
)
def test_an_ablation_that_a_finding_would_count_twice_is_an_error_that_names_both(tmp_path, findings, line):
    ablations = {
        "plain": {"text": {"corner_tokens": 0}},
        "open": {"text": {"corner_mask": False}},
        "both": {"text": {"register_tokens": 2}},
        "one": {},
    }
    (error,) = errors_of(tmp_path, {"ablations": ablations, "findings": {"lotlip": "lotlip"} | findings})
    assert error.startswith(line)


def test_an_ablation_may_have_several_roles_that_are_not_compared(tmp_path):
    plain = {"text": {"corner_tokens": 0}}
    findings = {
        "lotlip": "lotlip",
        "long_clip": "tuned",
        "long_clip_equal_steps": "tuned",
        "corner_tokens": ["plain", "lotlip"],
        "registers": ["plain", "four"],
        "lotlip_by_short_share": ["lotlip"],
    }
    ablations = {"plain": plain, "tuned": {}, "four": {"text": {"corner_tokens": 0, "register_tokens": 4}}}
    assert load(tmp_path, {"ablations": ablations, "findings": findings}).findings.long_clip == "tuned"


@pytest.mark.slow
def test_every_shipped_ablation_is_in_a_declared_table():
    for file in SHIPPED:
        params = load_params(file)
        rows = {name for table in params.tables.values() for name in table.rows}
        assert not params.tables or rows == set(params.names)


def test_a_tower_trained_on_scenes_with_other_numbers_of_objects_is_warned_of(tmp_path):
    objects = {"fewest_objects": 4, "most_objects": 8}
    scenes = {"source": {"kind": "scenes", "path": "lotlip/demo/world.py", **objects}}
    base = {**MINIMAL, "ingest": scenes, "image_tower": {"kind": "scenes"}}
    (line,) = load(tmp_path, {}, base).warnings
    assert line.startswith("image_tower trains on scenes with 3 to 6 small objects, ingest.source draws 4 to 8")
    for enough in (objects, {"fewest_objects": 2, "most_objects": 8}):
        assert load(tmp_path, {"image_tower": enough}, base).warnings == []


IGNORED = {
    "long_texts.window": ({"long_texts": {"sampler": "all", "window": "across-captions"}}, "all reads one caption"),
    "long_texts.sub_captions": ({"long_texts": {"sampler": "first", "sub_captions": 5}}, "first has its own number"),
    "image_tower.features": ({"image_tower": {"frozen": False, "features": "computed"}}, "a trained image tower"),
    "temperature.min": ({"loss": {"objective": "siglip"}, "temperature": {"min": 0.02}}, "siglip has no smallest"),
    "text.frozen_positions": (
        {
            "text": {"pretrained": "org/bert", "frozen": True, "frozen_positions": 20, "corner_tokens": 0},
            "image_tower": {"frozen": False},
        },
        "freezes all",
    ),
}


@pytest.mark.parametrize("key", IGNORED)
def test_a_setting_that_its_own_ablation_makes_useless_is_an_error(tmp_path, key):
    settings, reason = IGNORED[key]
    (line,) = errors_of(tmp_path, {"ablations": {"mine": settings}})
    assert line.startswith(f"ablations.mine.{key} has no effect: ") and line.endswith("; remove it") and reason in line
    tuned = {"finetune": {"mine": {"init_from": "lotlip", "pretrain": settings}}}
    assert errors_of(tmp_path, tuned) == [line.replace("ablations.mine", "finetune.mine.pretrain")]


@pytest.mark.parametrize("key", IGNORED)
def test_a_useless_setting_of_pretrain_is_inherited_without_effect(tmp_path, key):
    """It is a warning where no ablation uses it."""
    settings, reason = IGNORED[key]
    section, _, name = key.partition(".")
    own = {section: {name: settings[section][name]}}
    rest = {part: {k: v for k, v in given.items() if (part, k) != (section, name)} for part, given in settings.items()}
    params = load(tmp_path, {"pretrain": own, "ablations": {"mine": rest}})
    assert not [line for line in params.warnings if "no effect" in line]
    assert key not in params.ablation("mine").effective()
    assert params.ablation("lotlip").effective()[key] == settings[section][name]
    lines = load(tmp_path, {"pretrain": settings, "ablations": {"mine": own}}).warnings
    found = [line for line in lines if "no effect" in line]
    assert [line.partition(" has ")[0] for line in found] == [f"pretrain.{key}", f"ablations.mine.{key}"]
    assert all(reason in line for line in found)


def test_sub_captions_that_add_long_texts_have_an_effect(tmp_path):
    whole = {"long_texts": {"sampler": "all", "sub_captions": 1}}
    params = load(tmp_path, {"pretrain": {"long_texts": {"sub_captions": 0}}, "ablations": {"mine": whole}})
    assert params.ablation("mine").effective() != params.ablation("lotlip").effective()


def test_a_warm_up_longer_than_the_training_is_a_warning(tmp_path):
    def lines(**ablations: Any) -> list[str]:
        warnings = load(tmp_path, {"ablations": ablations}).warnings
        return [line for line in warnings if "warmup_steps" in line]

    assert lines(short={"steps": 50}) == []
    (line,) = lines(short={"steps": 49}, b={"steps": 3})
    assert line.startswith("optimizer.warmup_steps is above steps in b, short, so that no step has the peak")


def test_unpinned_hub_models_are_warnings(tmp_path):
    commit = "0123456789" * 4
    hub = {
        "image_tower": {"kind": "timm", "model": "vit_tiny_patch16_224"},
        "pretrain": {"text": {"pretrained": "google-bert/bert-base-uncased"}},
    }
    assert [line.partition(" is not pinned")[0] for line in load(tmp_path, hub).warnings] == [
        "image_tower.model vit_tiny_patch16_224",
        "text.pretrained google-bert/bert-base-uncased",
    ]
    hub["image_tower"]["revision"] = hub["pretrain"]["text"]["revision"] = commit
    assert load(tmp_path, hub).warnings == []
    hub["image_tower"] = {"kind": "timm", "model": "vit_tiny_patch16_224", "checkpoint": "vit.safetensors"}
    assert load(tmp_path, hub).warnings == []
    hub["image_tower"] = {"kind": "transformers", "model": "facebook/dinov2-base"}
    (line,) = load(tmp_path, hub).warnings
    assert line.startswith("image_tower.model facebook/dinov2-base is not pinned")
    hub["image_tower"]["revision"] = commit
    assert load(tmp_path, hub).warnings == []
    hub["image_tower"] = {"kind": "transformers", "model": str(tmp_path)}
    assert load(tmp_path, hub).warnings == []
    hub["image_tower"] = {"kind": "open_clip", "model": "ViT-B-32", "weights": "openai"}
    (line,) = load(tmp_path, hub).warnings
    assert line.startswith("image_tower.weights openai is not pinned")
    hub["image_tower"]["checkpoint"] = "vit.pt"
    assert load(tmp_path, hub).warnings == []


def test_a_start_may_not_be_a_model_that_training_replaces(tmp_path, monkeypatch):
    """An ablation may start its text tower from another one."""
    monkeypatch.chdir(tmp_path)
    Path("models/lit/seed-0").mkdir(parents=True)
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    del values["pretrain"]["text"]["config"], values["pretrain"]["text"]["tokenizer"]
    values["image_tower"], values["pretrain"]["start"] = {"kind": "start"}, "models/lit/seed-0"
    with pytest.raises(ConfigError, match=r"pretrain\.start: models/lit/seed-0 overlaps with paths\.models"):
        checked_params(values | {"ablations": {"lotlip": {}}, "finetune": {}, "reproduce": {}}, "params.yaml")
    for folder in ("models/lit", str(tmp_path / "models/lit")):
        load(tmp_path, {"pretrain": {"text": {"pretrained": folder}}})


@pytest.mark.parametrize(
    ("evaluate", "line"),
    [
        ({"baselines": ["start", " "]}, "evaluate.baselines: an entry is empty; name a model, or remove the entry"),
        ({"baselines": ["a/b", "c", "a/b"]}, "evaluate.baselines: a/b: listed more than once; list each model once"),
        ({"baselines": [7]}, "evaluate.baselines.0: Input should be a valid string, not 7"),
        (
            {"max_short_text_loss": 0.1, "baselines": ["openai/clip-vit-base-patch16"]},
            "evaluate: max_short_text_loss compares each model with the one that training starts from; add start to "
            "evaluate.baselines, or set max_short_text_loss to null",
        ),
        (
            {"max_short_text_loss": 1.5},
            "evaluate.max_short_text_loss: Input should be less than or equal to 1, not 1.5",
        ),
        (
            {"baselines": ["models/lotlip/seed-0"]},
            "evaluate.baselines: models/lotlip/seed-0 overlaps with paths.models, which a stage replaces; move the "
            "data to another folder",
        ),
    ],
)
def test_an_invalid_baseline_is_an_error(tmp_path, evaluate, line):
    assert errors_of(tmp_path, {"evaluate": evaluate}) == [line]


def test_hub_baselines_are_warnings_and_local_ones_are_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("clip").mkdir()
    Path("siglip").mkdir()
    Path("weights.pt").touch()
    local = ["start", "clip", "open_clip:ViT-B-16:weights.pt", "open_clip:local-dir:siglip"]
    hub = ["openai/clip-vit-base-patch16", "open_clip:ViT-B-16:openai", "open_clip:hf-hub:timm/ViT-B-16-SigLIP"]
    base = {"image_tower": {"revision": "0123456789" * 4}}
    params = load(tmp_path, {**base, "evaluate": {"max_short_text_loss": 0.1, "baselines": [*local, *hub]}})
    assert params.warnings == [
        f"evaluate.baselines {name} is not pinned and may change on the hub; name a local folder or file to pin it"
        for name in hub
    ]
    inputs = [path for key, path in params.inputs() if key == "evaluate.baselines"]
    assert inputs == [Path("clip"), Path("weights.pt"), Path("siglip")]
    assert "baselines" not in params.decisive_sections()["evaluate"]


def test_init_from_drops_the_revision_of_a_hub_model(tmp_path):
    text = {"pretrained": "google-bert/bert-base-uncased", "revision": "0123456789" * 4}
    finetune = {"long-clip": {"init_from": "lotlip", "pretrain": {}}}
    params = load(tmp_path, {"pretrain": {"text": text}, "finetune": finetune})
    assert params.ablation("lotlip").text.revision == text["revision"]
    assert params.ablation("long-clip").text.revision is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"pretrained": "google-bert/bert-base-uncased", "revision": "main"}, "should match pattern"),
        ({"revision": "0123456789" * 4}, "name the model in pretrained"),
        ({"pretrained": ".", "revision": "0123456789" * 4}, "is a folder, which has no commits"),
    ],
)
def test_an_invalid_revision_is_an_error(tmp_path, text, reason):
    (line,) = errors_of(tmp_path, {"pretrain": {"text": text}})
    assert reason in line
