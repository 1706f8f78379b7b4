"""Results of more seeds than one run has, kept as a table in the repository.

A row has the scores of one ablation, benchmark and seed, and hashes of what decides them: the ablation's settings and
the data. Neither depends on the machine. A row is used only if both hashes are those of the current configuration. The
code is not compared; a row has its commit.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lotlip.core.files import atomic_write, sha256_files, sha256_json
from lotlip.data.index import INDEX_FILE
from lotlip.evaluate.records import OUTDATED, AblationScores, made_with
from lotlip.evaluate.score_names import MAIN_METRICS
from lotlip.pretrain.config import PretrainConfig
from lotlip.pretrain.records import RUN, Run

if TYPE_CHECKING:
    from lotlip.config.params import Params

FINDINGS, STORED_RESULTS = "findings.json", "stored_results"  # file of the report, and its key with `as_json`
KEY = ("ablation", "benchmark", "settings", "data", "seed")
COLUMNS = (*KEY, *MAIN_METRICS, "commit", "machine")
# Settings at their defaults are not hashed, so a new key changes no hash. Increase this when a default changes.
SETTINGS_VERSION = 1
_DIGITS = 16  # of a hash in the table
_NAMED = 6  # ablations that a message names


@dataclass(frozen=True)
class StoredRow:
    """The main scores of one ablation, benchmark and seed.

    Attributes:
        ablation, benchmark, seed: what was scored.
        settings: hash of the ablation's settings, of `settings_hash`.
        data: hash of the data, of `data_hashes`.
        scores: metric → value as a fraction, for the metrics that the benchmark has.
        commit: of the code that trained the model.
        machine: model of the processor.
    """

    ablation: str
    benchmark: str
    settings: str
    data: str
    seed: int
    scores: dict[str, float]
    commit: str
    machine: str

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What identifies the row: it replaces a row with the same key."""
        return self.ablation, self.benchmark, self.settings, self.data, self.seed


@dataclass(frozen=True)
class StoredResults:
    """The stored results that belong to the current configuration.

    Attributes:
        path: of the table.
        sha256: of the table.
        rows: the rows that are used.
        left_out: why other rows are not used, one message per reason.
    """

    path: Path
    sha256: str
    rows: list[StoredRow]
    left_out: list[str]

    def as_json(self) -> dict[str, Any]:
        """Converts what the results are to JSON types, without the rows."""
        return {
            "path": self.path.as_posix(),
            "sha256": self.sha256,
            "rows": len(self.rows),
            "seeds": sorted({row.seed for row in self.rows}),
            "machines": sorted({row.machine for row in self.rows}),
            "commits": sorted({row.commit for row in self.rows}),
            "left_out": self.left_out,
        }

    @property
    def note(self) -> str:
        """Says what was used and what was left out, for the report."""
        about = self.as_json()
        text = f"Stored seeds: {self.path.as_posix()} has "
        if self.rows:
            seeds, ablations = len(about["seeds"]), len({row.ablation for row in self.rows})
            text += f"{len(self.rows)} rows of {ablations} ablations and {seeds} seeds, which may include this run's. "
            text += f"They were computed on {', '.join(about['machines'])}."
        else:
            text += "no rows of this configuration."
        return " ".join([text, *(f"Left out: {line}." for line in self.left_out)])


# --- the table ----------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[StoredRow]:
    """Reads a table.

    Raises:
        ValueError: it is not such a table; the message names the file and the line.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a table of stored results ({error}); restore it from git") from error
    if not lines or tuple(lines[0]) != COLUMNS:
        raise ValueError(f"{path} is not a table of stored results: its first line must be {','.join(COLUMNS)}")
    rows: dict[tuple[Any, ...], StoredRow] = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = _row(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; restore the file from git") from error
        if row.key in rows:
            raise ValueError(f"{path}, line {number}: a row before it has the same {', '.join(KEY)}; remove one")
        rows[row.key] = row
    return list(rows.values())


def _row(line: Sequence[str]) -> StoredRow:
    if len(line) != len(COLUMNS):
        raise ValueError(f"has {len(line)} values, not {len(COLUMNS)}")
    values = dict(zip(COLUMNS, line, strict=True))
    scores = {metric: float(values[metric]) for metric in map(str, MAIN_METRICS) if values[metric]}
    if not all(0 <= score <= 1 for score in scores.values()):  # NaN is not either
        raise ValueError("scores must be from 0 to 1")
    about = {name: values[name] for name in ("ablation", "benchmark", "settings", "data", "commit", "machine")}
    return StoredRow(seed=int(values["seed"]), scores=scores, **about)


def add_rows(path: Path, rows: Iterable[StoredRow]) -> tuple[int, int]:
    """Adds rows to a table, which is created if there is none; the table is sorted and written whole.

    Returns:
        The numbers of rows that are new and that replaced a row with the same key.

    Raises:
        ValueError: the file is not such a table, or is a link.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a link; name the file that it points to")
    stored = {row.key: row for row in read_rows(path)} if path.exists() else {}
    before = len(stored)
    added = {row.key: row for row in rows}
    stored |= added
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for _, row in sorted(stored.items()):
            scores = (row.scores.get(metric) for metric in MAIN_METRICS)
            shown = ("" if score is None else f"{score:.6g}" for score in scores)
            writer.writerow([*row.key, *shown, row.commit, row.machine])
    new = len(stored) - before
    return new, len(added) - new


# --- what decides scores ------------------------------------------------------------------------------------------


def settings_hash(params: Params, name: str) -> str:
    """Returns the hash of an ablation's settings without seeds, and of the ablation that it starts from."""
    return sha256_json(_settings(params, name))[:_DIGITS]


def _settings(params: Params, name: str) -> dict[str, Any]:
    recipe = params.ablation(name).model_dump(mode="json", exclude_defaults=True, exclude={"seeds"})
    settings: dict[str, Any] = {"version": SETTINGS_VERSION, "pretrain": recipe}
    if name in params.finetune:
        recipe["text"].pop("pretrained")  # a folder below `paths.models`
        settings["init_from"] = _settings(params, params.finetune[name].init_from)
    return settings


def data_hashes(params: Params, root: Path) -> dict[str, str]:
    """Returns benchmark → hash of what training and the benchmark are made of; empty if there are no images.

    It covers images and texts, the split of each image, the image tower's settings, the order in shards, the
    benchmark's settings and the precision. Generated images are hashed as scenes, because files and features of the
    same scene differ between kinds of CPU.
    """
    import lotlip.data.partitions as partitions

    names = partitions.unit_names(root / params.paths.ingest)
    if not names:
        return {}
    data = {
        "images": [[name, _images_hash(root / params.paths.ingest, name)] for name in names],
        "captions": {
            captioner: [[name, _captions_hash(folder, name)] for name in partitions.unit_names(folder)]
            for captioner in params.caption.captioners
            for folder in [root / params.paths.captions / captioner]
        },
        "sentence_ends": params.caption.sentence_ends,
        "image_tower": params.image_tower.model_dump(mode="json", exclude_defaults=True, exclude={"min_accuracy"}),
        "shard": params.shard.model_dump(mode="json", include={"samples_per_shard", "max_bytes", "seed"}),
        # the default adds nothing, so that hashes in tables of earlier versions stay valid
        **params.evaluate.model_dump(include={"precision"}, exclude_defaults=True),
    }
    return {
        name: sha256_json({**data, "benchmark": settings.model_dump(mode="json", exclude_defaults=True)})[:_DIGITS]
        for name, settings in zip(params.evaluate.names, params.evaluate.benchmarks.values(), strict=True)
    }


def _images_hash(folder: Path, name: str) -> str:
    import lotlip.data.partitions as partitions

    table = partitions.read_table(folder, name, ["key", "short_caption", "scene", "sha256"])
    both = zip(table["scene"], table["sha256"], strict=True)
    images = [scene if isinstance(scene, str) else file for scene, file in both]
    return _json_hash([list(table["key"]), list(table["short_caption"]), images])


def _captions_hash(folder: Path, name: str) -> str:
    import lotlip.data.partitions as partitions

    table = partitions.read_captions(folder, name, ["key", "text"])
    return _json_hash([list(table["key"]), list(table["text"])])


def _json_hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, allow_nan=False).encode()).hexdigest()


def table_hash(path: Path | None) -> str | None:
    """Returns the hash of a table; None if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else None


# --- rows of this run, and those of the configuration -------------------------------------------------------------


def rows_of_run(params: Params, root: Path) -> tuple[list[StoredRow], list[str]]:
    """Returns the rows of all scores on disk that belong to the current configuration, and why others do not.

    Ablations without scores are left out silently.
    """
    paths, data, machine = params.paths, data_hashes(params, root), cpu_model()
    current = made_with(params.evaluate, paths, params.caption.describing, root)
    rows: list[StoredRow] = []
    left_out = []
    for name in params.names:
        file = root / paths.metrics / f"{name}.json"
        if not file.is_file():
            continue
        scores = AblationScores.load(file)
        if problem := _absent(params, root, name) or outdated(params, root, name, scores):
            left_out.append(f"{name}: {problem}")
            continue
        commit, settings = Run.load(root / paths.models / name / RUN).git_commit, settings_hash(params, name)
        for benchmark, result in scores.benchmarks.items():
            if benchmark not in data:
                left_out.append(f"{name} on {benchmark}: params.yaml has no such benchmark, or there is no data")
                continue
            if result.is_outdated(current.get(benchmark)):
                left_out.append(f"{name} on {benchmark}: {OUTDATED}; rerun its evaluate stage")
                continue
            for seed, values in result.seeds.items():
                main = {metric: values[metric] for metric in map(str, MAIN_METRICS) if metric in values}
                known = {metric: value for metric, value in main.items() if not math.isnan(value)}
                rows.append(StoredRow(name, benchmark, settings, data[benchmark], seed, known, commit, machine))
    return rows, left_out


def _absent(params: Params, root: Path, name: str) -> str:
    """Names the first file that tells what an ablation's scores are of and that does not exist; empty if all do."""
    runs = [params.paths.models / ablation / RUN for ablation in _trained(params, name)]
    files = (file for file in [*runs, params.paths.shards / INDEX_FILE] if not (root / file).is_file())
    return next((f"{file} does not exist" for file in files), "")


def outdated(params: Params, root: Path, name: str, scores: AblationScores) -> str:
    """Says why an ablation's scores are not those of the current configuration; empty if they are.

    Models and data are not compared if they are not on this machine.
    """
    models, index = params.paths.models, root / params.paths.shards / INDEX_FILE
    runs = {ablation: root / models / ablation / RUN for ablation in _trained(params, name)}
    known = {ablation: Run.load(file) for ablation, file in runs.items() if file.is_file()}
    run = known.get(name)
    if run and run.fingerprints != scores.fingerprints:
        return f"its scores are of other models than those in {models / name}"
    if run and index.is_file() and run.data_hash != sha256_files([index]):
        return f"its models were not trained on the data in {params.paths.shards}"
    configs = {ablation: run.config for ablation, run in known.items()} | {name: scores.config}
    return next(filter(None, (_changed(params, *item) for item in configs.items())), "")


def _changed(params: Params, ablation: str, config: Mapping[str, Any]) -> str:
    """Says why an ablation was not trained with the settings of params.yaml; empty if it was. Seeds may differ."""
    try:
        trained_with = PretrainConfig.model_validate(config).recipe()
    except ValidationError:
        return f"{ablation} was trained by another version of lotlip"
    same = trained_with == params.ablation(ablation).recipe()
    return "" if same else f"params.yaml has changed since {ablation} was trained"


def _trained(params: Params, name: str) -> list[str]:
    """An ablation, and the one that it starts from."""
    return [name, *([params.finetune[name].init_from] if name in params.finetune else [])]


def load_stored(params: Params, root: Path, missing: list[str]) -> StoredResults | None:
    """Reads the rows of `report.stored_results` that belong to the current configuration.

    Args:
        params: of the project.
        root: of the project.
        missing: gets a message if the table does not exist.

    Raises:
        ValueError: the file is not such a table.
    """
    path = params.report.stored_results
    if path is None:
        return None
    if not (root / path).is_file():
        missing.append(f"stored results: {path} does not exist; python -m flows.store_results writes it")
        return None
    data = data_hashes(params, root)
    settings = {name: settings_hash(params, name) for name in params.names}
    used: list[StoredRow] = []
    left_out: dict[str, list[str]] = {}
    for row in read_rows(root / path):
        if row.ablation not in settings:
            reason = "params.yaml has no such ablation"
        elif row.benchmark not in params.evaluate.names:
            reason = "params.yaml has no such benchmark"
        elif row.settings != settings[row.ablation]:
            reason = "the ablation's settings have changed since"
        elif row.data != data.get(row.benchmark):
            reason = "the data have changed since" if data else "this run has no data to compare them with"
        else:
            used.append(row)
            continue
        left_out.setdefault(reason, []).append(row.ablation)
    messages = [f"{len(names)} rows ({_shown(names)}), because {reason}" for reason, names in left_out.items()]
    return StoredResults(path, table_hash(root / path) or "", used, messages)


def _shown(names: Sequence[str]) -> str:
    """Names ablations once each, the first few of them."""
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - _NAMED} more" if len(distinct) > _NAMED else ""
    return ", ".join(distinct[:_NAMED]) + more


def cpu_model() -> str:
    """Returns the model of this machine's processor, such as "AMD EPYC 9V74 80-Core Processor"."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
