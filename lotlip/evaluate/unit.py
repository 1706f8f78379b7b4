"""Scores one ablation on one benchmark, as a unit of work."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lotlip.core.code import code_hash
from lotlip.core.device import choose_device
from lotlip.core.files import sha256_files, sha256_json, write_json
from lotlip.core.paths import Paths
from lotlip.core.record import read_record
from lotlip.data.index import INDEX_FILE, ShardIndex, read_index
from lotlip.data.partitions import MARKER, finished, reuse_or_write
from lotlip.data.paths import tree_state
from lotlip.data.records import NonRetryableError, UnitReport
from lotlip.data.tokenizer import tokenizer_paths
from lotlip.data.work import UnitFiles, Write, write_here
from lotlip.evaluate.ablation import AblationResults, measure
from lotlip.evaluate.benchmarks import Benchmark, open_benchmark
from lotlip.evaluate.config import BenchmarkConfig
from lotlip.evaluate.encoders import Runner
from lotlip.evaluate.kept_features import KeptFeatures

SCORES = ".scores.json"
_RESULTS: TypeAdapter[AblationResults] = TypeAdapter(AblationResults)

_opening = threading.Lock()
_measuring = threading.Lock()  # one model already uses the whole device


@dataclass(frozen=True)
class Measuring:
    """Everything that is needed to score an ablation on a benchmark; small enough to be sent to another process.

    Attributes:
        folder: of the trained ablation.
        config: its training settings, as `measure` takes them.
        benchmarks: `evaluate.benchmarks` of params.yaml.
        paths: locations of the partitions, captions and shards.
        captioners: captioners whose captions may be texts.
        about: additional entries of the protocol.
        device: of the models, as in `compute`.
        precision: likewise.
        batch_size: likewise.
        max_conditioned_pairs: see `EvaluateConfig`.
        out: folder for the results.
        fingerprint: hash of the stage's settings and inputs.
        features: folder of the image features that ablations with a frozen image tower share.
    """

    folder: Path
    config: Mapping[str, Any]
    benchmarks: Mapping[str, BenchmarkConfig]
    paths: Paths
    captioners: tuple[str, ...]
    about: Mapping[str, str]
    device: str
    precision: str
    batch_size: int
    max_conditioned_pairs: int
    out: Path
    fingerprint: str
    features: Path

    @property
    def how(self) -> Runner:
        """How models run.

        Raises:
            ValueError: this machine does not have the device.
        """
        return Runner(self.batch_size, choose_device(self.device), self.precision)

    def open(self, name: str) -> Benchmark:
        """A benchmark, opened once per process for all threads, and opened again when its files have changed.

        Raises:
            ValueError: see `open_benchmark`.
        """
        described = TypeAdapter(BenchmarkConfig).dump_json(self.benchmarks[name])
        with _opening:
            return _opened(name, described, self.paths, self.captioners, self._inputs(name))

    def __call__(self, name: str, write: Write = write_here) -> list[UnitReport]:
        """Scores all seeds on the benchmark, unless the results exist and their inputs are unchanged.

        Raises:
            NonRetryableError: see `measure` and `open_benchmark`.
        """
        return reuse_or_write(
            name,
            self._inputs(name),
            self.out,
            lambda: [done] if (done := finished(name, self.out)) else None,
            lambda: write(self, name),
        )

    def results(self, name: str) -> AblationResults:
        """The results that `__call__` wrote."""
        return read_record(self.out / f"{name}{SCORES}", AblationResults)

    def _inputs(self, name: str) -> str:
        """A hash of all that decides the results, without reading the benchmark's files."""
        known = [self.config, self.about, self.device, self.precision, self.fingerprint]
        return sha256_json([name, self._files(name), *known, sha256_files([self.paths.shards / INDEX_FILE])])

    def _images(self, name: str) -> str:
        """A hash of all that decides which images a benchmark has, and of the code that encodes them."""
        settings = self.benchmarks[name].model_dump(mode="json")
        return sha256_json(
            [settings, self._files(name), sha256_files([self.paths.ingest / INDEX_FILE]), code_hash("evaluate")]
        )

    def _files(self, name: str) -> list[Any]:
        """The state of the files and folders that a benchmark's settings name."""
        return [tree_state(value) for _, value in self.benchmarks[name] if isinstance(value, Path)]

    def write(self, name: str) -> list[UnitReport]:
        """Scores all seeds on the benchmark."""
        file, seeds, start = self.out / f"{name}{SCORES}", self.config["seeds"], time.monotonic()

        def on_seed(seed: int) -> None:
            done = seeds.index(seed) + 1
            left = (time.monotonic() - start) / done * (len(seeds) - done)
            # on standard error, because a worker process answers on its standard output
            print(f"{self.folder.name} on {name}: seed {seed} done, {left:.0f} s left", file=sys.stderr, flush=True)

        try:
            with _measuring:
                found = measure(
                    self.folder,
                    self.config,
                    [self.open(name)],
                    read_index(self.paths.shards, ShardIndex).vocabulary,
                    self.about,
                    self.how,
                    on_seed,
                    self.max_conditioned_pairs,
                    KeptFeatures(self.features, self._images(name)),
                )
            write_json(file, _RESULTS.dump_python(found))
        except ValueError as error:  # another attempt would raise it again
            raise NonRetryableError(str(error)) from error
        report = UnitReport(name, 1, 1, sha256_files([file]), file.stat().st_size)
        write_json(self.out / f"{name}{MARKER}", asdict(report))
        return [report]

    def files(self, name: str) -> UnitFiles:
        """What the benchmark's settings name; the images and captions of its split; its results; the ablation."""
        settings = self.benchmarks[name]
        reads = [value for _, value in settings if isinstance(value, Path)]
        if split := getattr(settings, "split", None):
            captions = (self.paths.captions / captioner for captioner in self.captioners)
            reads += [folder / split for folder in (self.paths.ingest, *captions)]
        indexes = [folder / INDEX_FILE for folder in (self.paths.shards, self.paths.ingest)]
        common = [self.folder, *indexes, *tokenizer_paths(self.config["text"]["tokenizer"])]
        return UnitFiles(dict.fromkeys(reads), [self.out / f"{name}{ending}" for ending in (SCORES, MARKER)], common)


@lru_cache(maxsize=8)
def _opened(name: str, settings: bytes, paths: Paths, captioners: tuple[str, ...], _inputs: str) -> Benchmark:
    return open_benchmark(name, TypeAdapter(BenchmarkConfig).validate_json(settings), paths, list(captioners))
