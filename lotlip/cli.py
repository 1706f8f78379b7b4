"""The program `lotlip`: tools for models and texts outside the pipeline.

Commands import their dependencies when they run, so that `lotlip --help` is fast.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from lotlip.core.console import INTERRUPTED, escape_unprintable, exit_on_interrupt, explain
from lotlip.data.text import SentenceEnds

app = typer.Typer(
    name="lotlip", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)

_EXTRAS = {
    "faiss": "index",
    "fastapi": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
}  # imported package → the extra that has it, if not `pipeline`


def run() -> None:
    """Runs the program. User errors are printed on one line with status 1 (LOTLIP_TRACEBACK=1: with a traceback)."""
    escape_unprintable()
    sys.excepthook = exit_on_interrupt
    try:
        app(prog_name="lotlip")
    except SystemExit as end:
        if end.code == INTERRUPTED:  # set by Typer on Ctrl-C
            print("stopped", file=sys.stderr)
        raise
    except ModuleNotFoundError as error:
        if os.environ.get("LOTLIP_TRACEBACK") or error.name is None or error.name.startswith("lotlip"):
            raise
        command, package = " ".join(sys.argv[1:2]), error.name.partition(".")[0]
        extra = _EXTRAS.get(package, "pipeline")
        sys.exit(f"error: `lotlip {command}` needs the package {package}: pip install 'lotlip[{extra}]'")
    except (ValueError, OSError) as error:
        if os.environ.get("LOTLIP_TRACEBACK"):
            raise
        sys.exit("error: " + " ".join(explain(error).split()))


def _show_version(requested: bool) -> None:
    if requested:
        import lotlip

        typer.echo(lotlip.__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Language-image pre-training that understands long text (LoTLIP, NeurIPS 2024)."""


@app.command()
def stats(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE", help="Annotations: .json, .jsonl, .csv, .tsv, .parquet, .txt, or folders of them."
        ),
    ],
    field: Annotated[
        list[str] | None,
        typer.Option(help="Name of a text field, `a.b` for a nested one; repeatable.", metavar="NAME"),
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="Tokenizer: a bundled name, a tokenizer.json or its folder.")
    ] = "bert-base-uncased",
    sentence_ends: Annotated[
        SentenceEnds,
        typer.Option(help="Where sub-captions end: at `.` (released) or at all Unicode sentence ends (unicode)."),
    ] = "released",
    split: Annotated[str | None, typer.Option(help="Count only this split.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with the total of all files.")] = False,
) -> None:
    """Count texts, and sub-captions and tokens per text (paper, Table 1)."""
    from lotlip.data.annotations import read_texts
    from lotlip.data.statistics import Statistics, text_statistics

    rows = []
    for file in files:
        texts = (text for _, text in read_texts(file, field or (), split))
        quiet = not sys.stderr.isatty()
        with typer.progressbar(
            texts, label=str(file), show_pos=True, update_min_steps=1000, file=sys.stderr, hidden=quiet
        ) as counted:
            statistics = text_statistics(counted, tokenizer, sentence_ends)
        if statistics.empty:
            typer.echo(f"{file}: {statistics.empty} null or empty texts skipped", err=True)
        rows.append((str(file), statistics))
    total = sum((statistics for _, statistics in rows), Statistics())
    if as_json:
        typer.echo(json.dumps(total.to_json(), allow_nan=False))
        return
    if len(rows) > 1:
        rows.append(("total", total))
    width = max(len(name) for name, _ in rows)
    typer.echo(f"{'':{width}}  {'texts':>10}  {'sub-captions per text':>21}  {'tokens per text':>15}")
    for name, statistics in rows:
        means = f"{statistics.sub_captions_per_text:>21.2f}  {statistics.tokens_per_text:>15.2f}"
        typer.echo(f"{name:{width}}  {statistics.texts:>10,}  {means}")


@app.command("import-official")
def import_official(
    checkpoint: Annotated[Path, typer.Argument(metavar="MODEL.PT", help="Checkpoint of the LoTLIP authors.")],
    out: Annotated[Path, typer.Option(help="Output folder, in Hugging Face layout.", metavar="DIR")],
    vision: Annotated[
        str, typer.Option(help="Image tower: the name of a timm ViT.", metavar="TIMM_NAME")
    ] = "vit_base_patch16_224",
    image_size: Annotated[int, typer.Option(help="Side of the input image in pixels.", min=1, metavar="N")] = 224,
    text_config: Annotated[
        Path | None,
        typer.Option(help="The text encoder's config.json, or part of it; default: BERT-base.", metavar="FILE"),
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="A bundled name, a tokenizer.json or its folder.", metavar="NAME")
    ] = "bert-base-uncased",
    context_length: Annotated[int, typer.Option(help="Maximum tokens per text.", min=1, metavar="N")] = 128,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that this command wrote.")] = False,
) -> None:
    """Convert a checkpoint of the LoTLIP authors to a transformers model; the defaults are for their B/16."""
    from lotlip.importing.official import WrongWeightsError, import_official
    from lotlip.importing.output import describe
    from lotlip.models.vision.spec import ImageTowerSpec

    typer.echo(f"reading {checkpoint}")
    spec = ImageTowerSpec(vision, image_size)
    try:
        config, ignored = import_official(checkpoint, out, spec, text_config, tokenizer, context_length, force)
    except WrongWeightsError as error:  # the message has a line per weight
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if ignored:
        typer.echo(f"ignored unknown fields of {text_config}: {', '.join(ignored)}", err=True)
    _print_imported(describe(config), out)


@app.command("import")
def import_model(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder or hub name of a CLIP or SigLIP model (NAME@COMMIT pins it), open_clip:NAME:TAG_OR_FILE, or a "
            "checkpoint of CLIP, Long-CLIP or LoTLIP.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output folder, in Hugging Face layout.", metavar="DIR")],
    tokenizer: Annotated[
        str | None, typer.Option(help="A bundled name, a tokenizer.json or its folder; default: the model's own.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that this command wrote.")] = False,
) -> None:
    """Convert a dual encoder of another library to a model of this project."""
    from lotlip.core.files import write_record
    from lotlip.data.models import local_model
    from lotlip.importing.output import check_out, describe
    from lotlip.importing.start import open_start
    from lotlip.models.saving import save_whole_model

    check_out(out, [path.resolve() for name in (source, tokenizer or "") if (path := local_model(name))], force)
    typer.echo(f"reading {source}")
    opened = open_start(source, tokenizer)
    model = opened.build()
    save_whole_model(model, opened.tokenizer, out.resolve(), {"name": out.resolve().name, "source": source})
    write_record(out.resolve(), Path(out.resolve().name), "lotlip import")
    _print_imported(describe(model.config), out)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a saved model.")],
    to: Annotated[Literal["transformers", "open_clip", "onnx"], typer.Option(help="Layout of the result.")],
    out: Annotated[Path, typer.Option(help="Output folder.", metavar="DIR")],
    force: Annotated[bool, typer.Option("--force", help="Replace an export that this command wrote.")] = False,
) -> None:
    """Convert a model to one of transformers or open_clip, or to ONNX; the result does not need lotlip."""
    from lotlip.exporting.export import export

    typer.echo(f"reading {model}")
    difference = export(model, to, out, force)
    typer.echo(
        f"written to {out}; features differ from the model's by {difference:.1e} at most; see {out / 'README.md'}"
    )


def _print_imported(lines: list[str], out: Path) -> None:
    for line in lines:
        typer.echo(line)
    typer.echo(f"written to {out}; to load it:")
    typer.echo(f'  import lotlip, transformers; model = transformers.AutoModel.from_pretrained("{out}").eval()')


@app.command()
def embed(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a saved model.")],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="Images: a folder or ingest's output. Texts: a .txt, one per line, or as for stats.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output: .parquet, or .npy with the names in a second file.")],
    kind: Annotated[
        str | None,
        typer.Option(help="images (default for a folder) or texts (default for a file).", metavar="KIND"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Items per batch.", min=1, metavar="N")] = 64,
    field: Annotated[
        list[str] | None,
        typer.Option(help="Name of a text field, as for stats; repeatable.", metavar="NAME"),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Embed only this split.", metavar="NAME")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", metavar="NAME")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that this command did not write.")] = False,
) -> None:
    """Embed images or texts and write their features, for example for `lotlip search`."""
    from tqdm import tqdm

    from lotlip.core.files import check_model
    from lotlip.retrieval.embedding import embed
    from lotlip.retrieval.index import check_free_index

    check_free_index(out, force)
    check_model(model)
    with tqdm(unit=" items", file=sys.stderr, mininterval=0.1 if sys.stderr.isatty() else 30) as bar:

        def show(done: int, total: int) -> None:
            if done == 0:
                bar.reset(total)  # excludes loading the model from the rate
            bar.update(done - bar.n)

        result = embed(model, source, out, kind, batch_size, field or (), split, device, show)
    for name, reason in result.left_out:
        typer.echo(f"{name} left out: {reason}", err=True)
    typer.echo(f"{out}: {result.rows:,} features of size {result.width}, {len(result.left_out)} left out", err=True)


@app.command("index")
def build_index(
    embeddings: Annotated[Path, typer.Argument(metavar="INDEX", help="Index written by `lotlip embed`.")],
    kind: Annotated[
        str | None,
        typer.Option(
            help="ivf-pq (default), hnsw (default below 10,000 items) or flat, which is exact.", metavar="KIND"
        ),
    ] = None,
    add: Annotated[
        list[Path] | None,
        typer.Option(help="Add this file of `lotlip embed` to the FAISS index; repeatable.", metavar="FILE"),
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(help="Measure recall with these features, such as those of texts.", metavar="FILE"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that this command did not write.")] = False,
) -> None:
    """Build a FAISS index beside a file of `lotlip embed`, for fast search in many items, or add items to it."""
    from tqdm import tqdm

    from lotlip.retrieval import faiss_index

    if add and kind:
        raise ValueError("--kind is the kind of a new index; remove it, or remove --add")
    with tqdm(unit=" items", file=sys.stderr, mininterval=0.1 if sys.stderr.isatty() else 30) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if add:
            built = faiss_index.add(embeddings, add, queries, show)
        else:
            built = faiss_index.build(embeddings, kind, queries, force, show)
    typer.echo(
        f"{built.path}: {built.kind}, {built.rows:,} items; recall@10 {built.recall:.3f} against exact search "
        f"({built.queries} queries), {built.milliseconds:.2f} ms per query"
    )
    if built.rows < faiss_index.EXACT_BELOW:
        typer.echo(f"search is exact below {faiss_index.EXACT_BELOW:,} items, so it does not use this index", err=True)


@app.command()
def search(
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="Index written by `lotlip embed`.")],
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Query text, of any length.")] = None,
    image: Annotated[Path | None, typer.Option(help="Query image, instead of a text.", metavar="FILE")] = None,
    top: Annotated[int, typer.Option(help="Number of results.", min=1, metavar="N")] = 10,
    model: Annotated[
        Path | None, typer.Option(help="Folder of the model that made the index, if it was moved.", metavar="DIR")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Do not use the FAISS index of `lotlip index`.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", metavar="NAME")] = "auto",
) -> None:
    """Show the nearest images or texts to a text or an image: rank, cosine, name."""
    from textwrap import shorten

    from lotlip.retrieval.embedding import search

    results = search(index, text, image, top, model, device, exact)
    if as_json:
        typer.echo(json.dumps([vars(match) for match in results], allow_nan=False))
        return
    for rank, match in enumerate(results, start=1):
        text = shorten(match.text or "", 100, placeholder=" …")
        typer.echo(f"{rank:>4}  {match.score:.4f}  {match.name}  {text}".rstrip())


@app.command()
def serve(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="Folder of a saved model; default: that of --index.")
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="Index written by `lotlip embed`, for /search.", metavar="INDEX")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address; others than loopback need a token in LOTLIP_TOKEN.", metavar="ADDRESS")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0: a free one.", min=0, max=65535, metavar="N")] = 8000,
    batch_size: Annotated[int, typer.Option(help="Items embedded together.", min=1, metavar="N")] = 32,
    max_items: Annotated[int, typer.Option(help="Texts and images per request.", min=1, metavar="N")] = 256,
    max_waiting: Annotated[
        int, typer.Option(help="Texts or images that may wait for the model.", min=1, metavar="N")
    ] = 1024,
    max_mb: Annotated[int, typer.Option(help="Size of a request in MiB.", min=1, metavar="N")] = 32,
    timeout: Annotated[float, typer.Option(help="Seconds for a request.", min=0.1, metavar="SECONDS")] = 30,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", metavar="NAME")] = "auto",
) -> None:
    """Serve a model over HTTP: /embed, /health and, with an index, /search."""
    from lotlip.core.files import check_model
    from lotlip.retrieval.server import Limits, serve

    if model:
        check_model(model)
    limits = Limits(batch_size, max_items, max_waiting, max_mb * 2**20, timeout)
    serve(model, index, host, port, limits, device, lambda at: typer.echo(f"{at} (stop with Ctrl-C)", err=True))


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL", help="Folder of a saved model, name of a CLIP or SigLIP model, or open_clip:NAME:TAG."
        ),
    ],
    benchmark: Annotated[list[str], typer.Option(help="Name of a benchmark; repeatable.", metavar="NAME")],
    data: Annotated[list[Path], typer.Option(help="Folder of each benchmark, in the same order.", metavar="DIR")],
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of each benchmark's images, if not in --data.", metavar="DIR"),
    ] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Accept incomplete benchmarks; marks the scores.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", metavar="NAME")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.", metavar="NAME")] = "fp32",
    batch_size: Annotated[int, typer.Option(help="Items per batch.", min=1, metavar="N")] = 64,
    max_conditioned_pairs: Annotated[
        int,
        typer.Option(
            help="FLAIR: most pairs of images and texts of one kind that are all scored with pooled features.",
            min=0,
            metavar="N",
        ),
    ] = 25_000_000,
    out: Annotated[
        Path | None, typer.Option(help="Write all scores with their protocol as JSON.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print this JSON instead of the table.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that this command did not write.")] = False,
) -> None:
    """Score models on benchmarks and compare them with published scores."""
    import shlex

    if len(benchmark) != len(data) or (images and len(images) != len(data)):
        raise ValueError(
            f"{len(benchmark)} --benchmark, {len(data)} --data, {len(images or ())} --images: give one --data per "
            "--benchmark, and one --images per --benchmark or none"
        )
    from lotlip.config.outputs import is_comparison
    from lotlip.core.files import check_free, check_model, write_json

    if out:
        check_free(out, is_comparison, force)
    for name in models:
        check_model(Path(name))
    from tqdm import tqdm

    from lotlip.evaluate.compare import compare, load_benchmark, table, to_json
    from lotlip.evaluate.conditioned import saved_pooling
    from lotlip.evaluate.models import open_encoder

    image_folders: list[Path | None] = [*images] if images else [None] * len(data)
    benchmarks = [load_benchmark(*one, partial) for one in zip(benchmark, data, image_folders, strict=True)]
    with tqdm(unit=" items", file=sys.stderr, mininterval=0.1 if sys.stderr.isatty() else 30) as bar:

        def start(model: str, name: str, items: int) -> None:
            bar.reset(items)
            bar.set_description(f"{model}, {name}")

        # All models are opened before any is scored, so that a wrong name fails early.
        encoders = [(model, open_encoder(model, batch_size, device, precision, bar.update)) for model in models]
        poolings = {model: saved_pooling(encoder) for model, encoder in encoders}
        command = shlex.join(["lotlip", *sys.argv[1:]])
        results = compare(encoders, benchmarks, command, start, poolings, max_conditioned_pairs)
    # Printed before writing, which may fail.
    for line in [json.dumps(to_json(results), allow_nan=False)] if as_json else table(results):
        typer.echo(line)
    if out:
        write_json(out, to_json(results))
        typer.echo(f"written to {out}", err=True)


@app.command()
def explore(
    images_index: Annotated[
        Path, typer.Argument(metavar="IMAGES_INDEX", help="Index of images written by `lotlip embed`.")
    ],
    texts: Annotated[Path | None, typer.Option(help="Index of texts.", metavar="TEXTS_INDEX")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of the model that made the index, if it was moved.", metavar="DIR")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images, if they were moved.", metavar="DIR")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the page; default: a free one.", min=1, max=65535, metavar="N")
    ] = None,
    top: Annotated[int, typer.Option(help="Number of results.", min=1, metavar="N")] = 6,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", metavar="NAME")] = "auto",
) -> None:
    """Serve a page on loopback for searching images by text and texts by image, with relevance maps."""
    import signal
    import threading
    from contextlib import suppress

    from lotlip.core.files import check_model
    from lotlip.explore.explorer import Explorer

    if model:
        check_model(model)
    try:
        from lotlip.explore.page import serve_page
    except ImportError as error:
        raise ValueError(f"the page needs Gradio ({error}): pip install 'lotlip[explore]'") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM also cleans up
    with serve_page(Explorer(images_index, texts, model, images, top, device), port) as address:
        typer.echo(f"{address} (stop with Ctrl-C)", err=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


@app.command()
def verify(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Output folder of ingest, a captioner or the shard stage."),
    ],
    held_out: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of images, or ingest's output, that must not be trained on.", metavar="DIR"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Re-validate a data set, file by file and sample by sample. Problems are printed, and the exit status is 1."""
    from tqdm import tqdm

    from lotlip.ingest.config import ImagesConfig
    from lotlip.ingest.evaluation_images import image_hashes
    from lotlip.verify import verify

    checks = verify(folder, image_hashes(held_out or (), ImagesConfig()))
    problems = []
    with tqdm(checks.problems, total=checks.units, unit=" units", file=sys.stderr, disable=None) as units:
        for of_unit in units:
            problems += of_unit
            for problem in [] if as_json else of_unit:
                tqdm.write(f"{problem.where}: {problem.what}")
    if as_json:
        records = [problem._asdict() for problem in problems]
        typer.echo(json.dumps({"kind": checks.kind, "samples": checks.samples, "problems": records}, allow_nan=False))
    elif not problems:
        items = "samples" if checks.kind == "shards" else checks.kind
        typer.echo(f"{folder}: {checks.samples:,} {items}, no problems")
    else:
        typer.echo(f"{folder}: {len(problems)} problem{'s' if len(problems) > 1 else ''}", err=True)
    if problems:
        raise typer.Exit(1)


@app.command()
def init(
    data: Annotated[
        Path,
        typer.Option(
            help="A .csv, .tsv, .json, .jsonl or .parquet file, tars, or a folder of images with .txt files.",
            metavar="PATH",
        ),
    ],
    images: Annotated[
        Path | None, typer.Option(help="Folder that the paths in a table start from.", metavar="DIR")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Model to continue from: a folder, file or hub name of a CLIP or SigLIP, or open_clip:NAME:TAG. "
            "Default: a packaged image tower and a new text tower.",
            metavar="MODEL",
        ),
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of images or their paths.", metavar="NAME")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of short captions.", metavar="NAME")] = None,
    long_column: Annotated[
        list[str] | None, typer.Option(help="Column of long captions; repeatable.", metavar="NAME")
    ] = None,
    captioner: Annotated[
        str | None,
        typer.Option(
            help="Model that writes long captions: address of a server (http://…/v1), folder, hub name with its commit "
            "(OWNER/NAME@COMMIT) or preset. It is tried on 8 images.",
            metavar="MODEL",
        ),
    ] = None,
    captioner_model: Annotated[
        str | None, typer.Option(help="The captioner's name on a server with several models.", metavar="NAME")
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write.", metavar="FILE")] = Path("params.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file; the old one is kept beside it.")] = False,
) -> None:
    """Look at own data and write a params.yaml that trains on it."""
    from lotlip.init.init import init

    if captioner_model and not captioner:
        raise ValueError("--captioner-model needs --captioner, the address of the server")
    columns = (image_column, caption_column, long_column or ())
    with_captioner = (captioner, captioner_model) if captioner else None
    init(data, images, start, columns, out, force, typer.echo, with_captioner)


@app.command("run", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run_pipeline(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ARGUMENT]", help="--all: every ablation; or arguments of `dvc repro`."),
    ] = None,
) -> None:
    """Run the pipeline of params.yaml in this folder, up to the report; only what changed runs again."""
    from lotlip.init.project import set_up

    set_up(Path(), typer.echo)
    sys.stdout.flush()
    os.environ["PYTHONDONTWRITEBYTECODE"] = ""  # cached bytecode halves the start-up time of a stage
    # the code in this folder, which may be older than this program's
    os.execv(sys.executable, [sys.executable, "-m", "flows.reproduce", *(arguments or ()), *context.args])  # noqa: S606


@app.command()
def look(
    params: Annotated[Path, typer.Option(help="Configuration file.", metavar="FILE")] = Path("params.yaml"),
    out: Annotated[Path, typer.Option(help="Folder of the page.", metavar="DIR")] = Path("look"),
    images: Annotated[int, typer.Option(help="Images to look at, evenly spaced.", min=1, metavar="N")] = 1000,
    shown: Annotated[
        int, typer.Option(help="Images with all texts: the worst and as many others.", min=1, metavar="N")
    ] = 12,
) -> None:
    """Write a page about the data: texts side by side, lengths, near-duplicates, lowest quality first."""
    from lotlip.config.params import load_params
    from lotlip.init.look import look

    page = look(load_params(params), out, images, shown)
    typer.echo(f"written; open {page}")


@app.command()
def plan(
    params: Annotated[Path, typer.Option(help="Configuration file.", metavar="FILE")] = Path("params.yaml"),
    profile: Annotated[
        str | None, typer.Option(help="A profile of profiles/ instead: cc3m, lotlip-100m, …", metavar="NAME")
    ] = None,
    ablation: Annotated[str, typer.Option(help="Name of the ablation.", metavar="NAME")] = "lotlip",
    gpus: Annotated[
        int | None,
        typer.Option(help="Number of GPUs; applies infra/gpus/N.yaml if it exists.", min=1),
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Images in the data set; default: from its shards or its name.", min=1)
    ] = None,
    gpu_memory: Annotated[float, typer.Option(help="Memory per GPU in GB.", min=1)] = 80,
    tflops: Annotated[float, typer.Option(help="Peak TFLOP/s per GPU in the run's precision.", min=0.001)] = 989,
    utilisation: Annotated[float, typer.Option(help="Fraction of the peak reached.", min=0.001, max=1)] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Estimate the steps, tokens, memory, storage and time of a training run without training."""
    from lotlip.config.params import load_params
    from lotlip.core.yaml import read_yaml
    from lotlip.data.index import INDEX_FILE, ShardIndex, read_index
    from lotlip.plan.describe import describe
    from lotlip.plan.plan import Gpu, images_by_name, on_gpus
    from lotlip.plan.plan import plan as make_plan

    file = Path("profiles", f"{profile}.yaml") if profile else params
    settings = load_params(file)
    config, compute = settings.ablation(ablation), settings.training_compute(ablation)
    for warning in settings.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if gpus:
        gpu_file = Path("infra", "gpus", f"{gpus}.yaml")
        differences = read_yaml(gpu_file) if gpu_file.is_file() else {}
        config, compute = on_gpus(config, compute, gpus, differences)
    written = (settings.paths.shards / INDEX_FILE).is_file() and not profile
    shards = read_index(settings.paths.shards, ShardIndex) if written else None
    gpu = Gpu(gpu_memory * 1e9, tflops * 1e12, utilisation)
    if not shards:
        images = images or images_by_name(file.stem)
    result = make_plan(settings, config, compute, gpu, shards, images)
    if as_json:
        typer.echo(json.dumps(result.to_json(), allow_nan=False))
        return
    for line in describe(result, f"{file.stem}, {ablation}"):
        typer.echo(line)
