"""Compares time and memory of retrieval scores with the plain product of features: `python -m benchmarks.retrieval`.

Features are random; by default there are as many as in COCO. Product and scores alternate. The best round of each is
reported, in wall time and in CPU time. Other work on the machine disturbs CPU time less, and least with `--threads 1`,
because threads that wait for one another use CPU time too. Memory is measured in another process: the peak beyond its
memory after torch has multiplied matrices and the features exist. `--json` prints one object.

With `--items N`, it measures FAISS indexes of N features (lotlip/retrieval/faiss_index.py), next to exact search in the
same process. The features imitate those of a trained model: clusters of unequal sizes around random directions,
with variation in 32 dimensions within a cluster and a little noise in all. The local intrinsic dimension of the result
is printed. Queries are further features of the same kind. A query is timed as `lotlip search` runs it, without the
model: search, then the names of the results. The last 1 % of the features are added to the finished index.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lotlip.core.temporary import temporary_folder
from lotlip.evaluate.metrics import retrieval
from lotlip.retrieval import faiss_index
from lotlip.retrieval.embedding import matches
from lotlip.retrieval.index import Index, IndexRows, index_writer, join, open_index

MB = 1e6
CLUSTERS, SUBSPACES, RANK = 2_000, 64, 32
QUERIES, EXACT_QUERIES = 500, 3


def features(arguments: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Returns features of images [I, D] and of texts [T, D], and each text's image [T]."""
    torch.manual_seed(0)
    text_image = torch.arange(arguments.texts) % arguments.images
    images = normalize(torch.randn(arguments.images, arguments.width), dim=-1)
    return images, normalize(torch.randn(arguments.texts, arguments.width), dim=-1), text_image


def time_of(work: Callable[[], Any]) -> tuple[float, float]:
    """Measures seconds of wall time and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def times(arguments: argparse.Namespace) -> dict[str, float]:
    """Measures the best time of each computation over all rounds, in seconds."""
    images, texts, text_image = features(arguments)
    computations: dict[str, Callable[[], Any]] = {
        "product": lambda: images @ texts.T,
        "scores": lambda: retrieval(images, texts, text_image, resamples=0),
        "scores_and_intervals": lambda: retrieval(images, texts, text_image),
    }
    rounds = [{name: time_of(work) for name, work in computations.items()} for _ in range(arguments.rounds)]
    return {
        f"{name}_{clock}_seconds": min(times[name][index] for times in rounds)
        for name in computations
        for index, clock in enumerate(("wall", "cpu"))
    }


def memory(arguments: argparse.Namespace) -> dict[str, int]:
    """Measures, in a separate process, the bytes of the features and the additional bytes at the peak."""
    images, texts, text_image = features(arguments)
    images[:64] @ texts[:64].T
    before = psutil.Process().memory_info().rss
    retrieval(images, texts, text_image)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"features_bytes": images.nbytes + texts.nbytes, "more_bytes": peak - before}


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns all measurements."""
    command = [sys.executable, "-m", "benchmarks.retrieval", "--measure-memory", *sys.argv[1:]]
    peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {"images": arguments.images, "texts": arguments.texts, "width": arguments.width, **times(arguments), **peak}


# --- FAISS indexes ----------------------------------------------------------------------------------------------------


class Clustered:
    """Normalised features of clusters, always the same; see the top of this file."""

    def __init__(self, width: int) -> None:
        self._width, self._rng = width, np.random.default_rng(0)
        self._centres = self._normal(CLUSTERS) / width**0.5
        self._spaces = self._normal(SUBSPACES, RANK) / (RANK * width) ** 0.5
        shares = self._rng.pareto(1.5, CLUSTERS) + 1
        self._shares = shares / shares.sum()

    def _normal(self, *shape: int) -> np.ndarray:
        return self._rng.standard_normal((*shape, self._width), dtype=np.float32)

    def draw(self, rows: int) -> np.ndarray:
        """Returns the next features, [N, D]."""
        cluster = self._rng.choice(CLUSTERS, rows, p=self._shares)
        drawn = self._centres[cluster] + 0.25 / self._width**0.5 * self._normal(rows)
        within = 0.7 * self._rng.standard_normal((rows, RANK), dtype=np.float32)
        for space in range(SUBSPACES):
            inside = np.flatnonzero(cluster % SUBSPACES == space)
            drawn[inside] += within[inside] @ self._spaces[space]
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    def write(self, path: Path, rows: int) -> None:
        """Writes the next features like `lotlip embed`."""
        about = {"model": "none", "weights_sha256": "none", "kind": "images", "width": self._width}
        with index_writer(path, about) as write:
            for start in range(0, rows, 20_000):
                numbers = range(start, min(start + 20_000, rows))
                write(IndexRows([f"images/{row:09}.jpg" for row in numbers], None, self.draw(len(numbers))))


def query_times(index: Index, queries: np.ndarray) -> dict[str, float]:
    """Measures queries one by one, with the names of 10 results: median and 95th percentile in milliseconds."""
    matches(index, queries[0], 10)
    seconds = [time_of(partial(matches, index, query, 10))[0] for query in queries]
    return {"median_ms": float(np.median(seconds)) * 1e3, "p95_ms": float(np.quantile(seconds, 0.95)) * 1e3}


def print_progress(done: int, total: int) -> None:
    """Prints every tenth of the work on standard error."""
    if done * 10 // total > max(done - 20_000, 0) * 10 // total:
        print(f"{done:,} of {total:,}", file=sys.stderr)


def indexes(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields measurements: exact search, then building, adding to and querying each kind of index."""
    import faiss
    from faiss.contrib.exhaustive_search import knn_ground_truth

    faiss.omp_set_num_threads(arguments.threads)
    data, added = Clustered(arguments.width), arguments.items // 100
    with temporary_folder("benchmark") as folder:
        path, more = folder / f"first{arguments.ending}", folder / f"more{arguments.ending}"
        data.write(path, arguments.items - added)
        data.write(more, added)
        queries = data.draw(QUERIES)
        both = join([open_index(path), open_index(more)])
        cosines, truth = knn_ground_truth(queries, both.blocks(), 10, metric_type=faiss.METRIC_INNER_PRODUCT)
        distances = np.sqrt(2 - 2 * cosines)
        # Levina and Bickel's maximum likelihood, of ten neighbours
        dimension = 1 / np.log(distances[:, -1:] / distances[:, :-1]).mean()
        exact = query_times(both, queries[:EXACT_QUERIES])
        yield {"kind": "exact", **exact, "dimension": float(dimension), "features_bytes": path.stat().st_size}
        for kind in arguments.kinds:
            start = time.perf_counter()
            faiss_index.build(path, kind, on_progress=print_progress)
            built = time.perf_counter() - start
            faiss_index.add(path, [more])
            both_seconds = time.perf_counter() - start
            index = faiss_index.open_searchable(path)
            if index.approximate is None:
                raise ValueError(f"--items is {arguments.items}; search is exact below {faiss_index.EXACT_BELOW}")
            found = [[row for _, row in index.approximate(query, 10)] for query in queries]
            times = query_times(index, queries)
            yield {
                "kind": kind,
                **times,
                "ratio": exact["median_ms"] / times["median_ms"],
                "recall": float(np.mean([np.isin(*pair).mean() for pair in zip(truth, found, strict=True)])),
                "build_seconds": built,
                "add_seconds": both_seconds - built,
                "bytes": faiss_index.faiss_file(path).stat().st_size,
            }


def described(measured: dict[str, Any]) -> str:
    """One line of text for measurements that `indexes` yields."""
    query = f"{measured['kind']}: query {measured['median_ms']:.2f} ms (median), {measured['p95_ms']:.2f} ms (95 %)"
    if measured["kind"] == "exact":
        size = f"{measured['features_bytes'] / MB:,.0f} MB"
        return f"{query}; features {size}, local intrinsic dimension {measured['dimension']:.1f}"
    size = f"{measured['bytes'] / MB:,.0f} MB"
    return (
        f"{query}, {measured['ratio']:.0f} times faster than exact; recall@10 {measured['recall']:.3f}; built in "
        f"{measured['build_seconds']:.0f} s, 1 % added in {measured['add_seconds']:.0f} s; {size}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--texts", type=int, default=25_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False))
    parser.add_argument("--items", type=int, help="measure FAISS indexes of this many features instead")
    parser.add_argument("--kinds", nargs="+", choices=faiss_index.KINDS, default=faiss_index.KINDS[:1])
    parser.add_argument("--ending", choices=(".npy", ".parquet"), default=".npy")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure-memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.items:
        for measured in indexes(options):
            print(json.dumps(measured, allow_nan=False) if options.json else described(measured), flush=True)
    elif options.measure_memory:
        print(json.dumps(memory(options), allow_nan=False))
    else:
        result = main(options)
        if options.json:
            print(json.dumps(result, allow_nan=False))
        else:
            print(f"{options.images:,} images, {options.texts:,} texts, dimension {options.width}")
            for name, title in (
                ("product", "plain product"),
                ("scores", "scores"),
                ("scores_and_intervals", "scores and intervals"),
            ):
                wall, cpu = (result[f"{name}_{clock}_seconds"] for clock in ("wall", "cpu"))
                wall_ratio, cpu_ratio = wall / result["product_wall_seconds"], cpu / result["product_cpu_seconds"]
                print(f"{title}: {wall:.2f} s, {wall_ratio:.2f} times; CPU time {cpu:.2f} s, {cpu_ratio:.2f} times")
            print(
                f"features {result['features_bytes'] / MB:.0f} MB; peak: {result['more_bytes'] / MB:.0f} MB in addition"
            )
