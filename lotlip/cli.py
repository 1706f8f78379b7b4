"""The program `lotlip`: what can be done with models and texts outside the pipeline.

A command imports what it needs when it runs, so that `lotlip --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lotlip.core.console import INTERRUPTED, escape_unprintable, exit_on_interrupt, explain
from lotlip.data.text import SentenceEnds

app = typer.Typer(
    name="lotlip", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


def run() -> None:
    """The program's entry; an error that a user can fix is status 1 and one line (LOTLIP_TRACEBACK=1: a traceback)."""
    escape_unprintable()
    sys.excepthook = exit_on_interrupt
    try:
        app(prog_name="lotlip")
    except SystemExit as end:
        if end.code == INTERRUPTED:  # Typer's, on Ctrl-C
            print("stopped", file=sys.stderr)
        raise
    except (ValueError, OSError) as error:
        if os.environ.get("LOTLIP_TRACEBACK"):
            raise
        sys.exit("error: " + " ".join(explain(error).split()))


def _show_version(asked: bool) -> None:
    if asked:
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
        typer.Argument(metavar="FILE", help="Annotations: .json, .jsonl, .csv, .parquet, .txt, or folders of them."),
    ],
    field: Annotated[
        list[str] | None,
        typer.Option(help="Name of a text field, `a.b` for a nested one; may be given several times.", metavar="NAME"),
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="Whose tokens are counted: a bundled name, a tokenizer.json or its folder.")
    ] = "bert-base-uncased",
    sentence_ends: Annotated[
        SentenceEnds,
        typer.Option(help="What ends a sub-caption: `.` (released), or all of Unicode's sentence ends (unicode)."),
    ] = "released",
    split: Annotated[str | None, typer.Option(help="Count only this split.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for all files together.")] = False,
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
            found = text_statistics(counted, tokenizer, sentence_ends)
        if found.empty:
            typer.echo(f"{file}: {found.empty} skipped: null or empty", err=True)
        rows.append((str(file), found))
    total = sum((found for _, found in rows), Statistics())
    if as_json:
        typer.echo(json.dumps(total.to_json(), allow_nan=False))
        return
    if len(rows) > 1:
        rows.append(("all", total))
    width = max(len(name) for name, _ in rows)
    typer.echo(f"{'':{width}}  {'texts':>10}  {'sub-captions per text':>21}  {'tokens per text':>15}")
    for name, found in rows:
        means = f"{found.sub_captions_per_text:>21.2f}  {found.tokens_per_text:>15.2f}"
        typer.echo(f"{name:{width}}  {found.texts:>10,}  {means}")


@app.command("import-official")
def import_official(
    checkpoint: Annotated[Path, typer.Argument(metavar="MODEL.PT", help="Checkpoint of the LoTLIP authors.")],
    out: Annotated[Path, typer.Option(help="Folder to write, in Hugging Face layout.", metavar="DIR")],
    vision: Annotated[
        str, typer.Option(help="The image tower: a ViT of timm.", metavar="TIMM_NAME")
    ] = "vit_base_patch16_224",
    image_size: Annotated[int, typer.Option(help="Pixels of a picture's side.", min=1, metavar="N")] = 224,
    text_config: Annotated[
        Path | None,
        typer.Option(help="JSON: the text encoder's config.json, or some fields of it; else BERT's.", metavar="FILE"),
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="A bundled name, a tokenizer.json or its folder.", metavar="NAME")
    ] = "bert-base-uncased",
    context_length: Annotated[int, typer.Option(help="Most tokens in a text.", min=1, metavar="N")] = 128,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that this command wrote.")] = False,
) -> None:
    """Turn a checkpoint of the LoTLIP authors into a model that transformers loads; the defaults are for their B/16."""
    from lotlip.importing.official import WrongWeightsError, describe, import_official
    from lotlip.models.vision.image_tower import ImageTowerSpec

    typer.echo(f"reading {checkpoint}")
    spec = ImageTowerSpec(vision, image_size)
    try:
        config, ignored = import_official(checkpoint, out, spec, text_config, tokenizer, context_length, force)
    except WrongWeightsError as error:  # a line for each weight, and there may be hundreds
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if ignored:
        typer.echo(f"ignored {', '.join(ignored)} of {text_config}: no fields of a text encoder's config", err=True)
    for line in describe(config):
        typer.echo(line)
    typer.echo(f"written to {out}; to load it:")
    typer.echo(f'  import lotlip, transformers; model = transformers.AutoModel.from_pretrained("{out}").eval()')


@app.command()
def embed(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a saved model.")],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", help="Images: a folder, or ingest's. Texts: .txt, one a line, or as for stats."
        ),
    ],
    out: Annotated[Path, typer.Option(help="What to write: .parquet, or .npy with its rows' names beside it.")],
    kind: Annotated[
        str | None, typer.Option(help="images or texts; else a folder has images, a file texts.", metavar="KIND")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="How many the model takes at a time.", min=1, metavar="N")] = 64,
    field: Annotated[
        list[str] | None,
        typer.Option(help="Name of a text field, as for stats; may be given several times.", metavar="NAME"),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Embed only this split.", metavar="NAME")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", metavar="NAME")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that this command did not write.")] = False,
) -> None:
    """Write the features of images or of texts, for `lotlip search` and anything else."""
    from tqdm import tqdm

    from lotlip.core.files import check_model
    from lotlip.retrieval.embedding import embed
    from lotlip.retrieval.index import check_free_index

    check_free_index(out, force)
    check_model(model)
    with tqdm(unit=" items", file=sys.stderr, mininterval=0.1 if sys.stderr.isatty() else 30) as bar:

        def show(done: int, total: int) -> None:
            if done == 0:
                bar.reset(total)  # the model is loaded: the rate is counted from here
            bar.update(done - bar.n)

        found = embed(model, source, out, kind, batch_size, field or (), split, device, show)
    for name, reason in found.left_out:
        typer.echo(f"{name} left out: {reason}", err=True)
    typer.echo(f"{out}: {found.rows:,} features of {found.width} numbers, {len(found.left_out)} left out", err=True)


@app.command()
def search(
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="What `lotlip embed` wrote.")],
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="What to search for, of any length.")] = None,
    image: Annotated[Path | None, typer.Option(help="An image to search for instead.", metavar="FILE")] = None,
    top: Annotated[int, typer.Option(help="How many to show.", min=1, metavar="N")] = 10,
    model: Annotated[
        Path | None, typer.Option(help="Where the model is now that made the index.", metavar="DIR")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", metavar="NAME")] = "auto",
) -> None:
    """Show the images or texts nearest to a text or to an image: rank, cosine, name."""
    from textwrap import shorten

    from lotlip.retrieval.embedding import search

    found = search(index, text, image, top, model, device)
    if as_json:
        typer.echo(json.dumps([vars(match) for match in found], allow_nan=False))
        return
    for rank, match in enumerate(found, start=1):
        text = shorten(match.text or "", 100, placeholder=" …")
        typer.echo(f"{rank:>4}  {match.score:.4f}  {match.name}  {text}".rstrip())


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="A saved model's folder, a CLIP or SigLIP by name, open_clip:NAME:TAG."),
    ],
    benchmark: Annotated[list[str], typer.Option(help="Its name; may be given several times.", metavar="NAME")],
    data: Annotated[list[Path], typer.Option(help="Its folder, in the same order.", metavar="DIR")],
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Its images' folder, in the same order, if they are elsewhere.", metavar="DIR"),
    ] = None,
    partial: Annotated[bool, typer.Option("--partial", help="A part will do, and is called so.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", metavar="NAME")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.", metavar="NAME")] = "fp32",
    batch_size: Annotated[int, typer.Option(help="How many a model takes at a time.", min=1, metavar="N")] = 64,
    out: Annotated[
        Path | None, typer.Option(help="Write all scores and how they were measured, as JSON.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print that JSON instead of the table.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that this command did not write.")] = False,
) -> None:
    """Score models on benchmarks, side by side with what was published."""
    import shlex

    if len(benchmark) != len(data) or (images and len(images) != len(data)):
        raise ValueError(
            f"{len(benchmark)} --benchmark, {len(data)} --data, {len(images or ())} --images: give --data for each "
            "--benchmark, and --images for each or for none"
        )
    from lotlip.config.outputs import is_comparison
    from lotlip.core.files import check_free, check_model, write_json

    if out:
        check_free(out, is_comparison, force)
    for name in models:
        check_model(Path(name))
    from tqdm import tqdm

    from lotlip.evaluate.compare import ask, compare, table, to_json
    from lotlip.evaluate.models import open_encoder

    elsewhere: list[Path | None] = [*images] if images else [None] * len(data)
    asked = [ask(*of, partial) for of in zip(benchmark, data, elsewhere, strict=True)]
    with tqdm(unit=" items", file=sys.stderr, mininterval=0.1 if sys.stderr.isatty() else 30) as bar:

        def start(model: str, name: str, items: int) -> None:
            bar.reset(items)
            bar.set_description(f"{model}, {name}")

        # all are opened before any is scored: a wrong name is known before hours are spent
        encoders = [(model, open_encoder(model, batch_size, device, precision, bar.update)) for model in models]
        results = compare(encoders, asked, shlex.join(["lotlip", *sys.argv[1:]]), start)
    # printed first: the disk may have filled up since the file was checked
    for line in [json.dumps(to_json(results), allow_nan=False)] if as_json else table(results):
        typer.echo(line)
    if out:
        write_json(out, to_json(results))
        typer.echo(f"written to {out}", err=True)


@app.command()
def explore(
    pictures_index: Annotated[
        Path, typer.Argument(metavar="PICTURES_INDEX", help="What `lotlip embed` wrote of pictures.")
    ],
    texts: Annotated[Path | None, typer.Option(help="What it wrote of texts.", metavar="TEXTS_INDEX")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Where the model is now that made the index.", metavar="DIR")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Where the pictures are now, if not where they were.", metavar="DIR")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Of the page; else a free one.", min=1, max=65535, metavar="N")
    ] = None,
    top: Annotated[int, typer.Option(help="How many pictures or texts to find.", min=1, metavar="N")] = 6,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", metavar="NAME")] = "auto",
) -> None:
    """Serve a page on loopback: texts find pictures, pictures find texts, maps show what was looked at."""
    import signal
    import threading
    from contextlib import suppress

    from lotlip.core.files import check_model
    from lotlip.explore.explorer import Explorer

    if model:
        check_model(model)
    try:
        from lotlip.explore.page import served
    except ImportError as error:
        raise ValueError(f"the page needs Gradio ({error}): pip install 'lotlip[explore]'") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing of the page is left then, either
    with served(Explorer(pictures_index, texts, model, pictures, top, device), port) as address:
        typer.echo(f"{address} (Ctrl+C ends it)", err=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


@app.command()
def verify(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="What ingest, a captioner or the shard stage left."),
    ],
    held_out: Annotated[
        list[Path] | None,
        typer.Option(help="Images that must not be trained on: a folder of them, or of ingest.", metavar="DIR"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look a data set over again, file by file and sample by sample; what is wrong with it is printed, and status 1."""
    from tqdm import tqdm

    from lotlip.ingest.config import ImagesConfig
    from lotlip.ingest.evaluation_images import image_hashes
    from lotlip.verify import verify

    contents = verify(folder, image_hashes(held_out or (), ImagesConfig()))
    problems = []
    with tqdm(contents.problems, total=contents.units, unit=" units", file=sys.stderr, disable=None) as looked:
        for found in looked:
            problems += found
            for problem in [] if as_json else found:
                tqdm.write(f"{problem.where}: {problem.what}")
    if as_json:
        told = [problem._asdict() for problem in problems]
        typer.echo(json.dumps({"kind": contents.kind, "samples": contents.samples, "problems": told}, allow_nan=False))
    elif not problems:
        things = "samples" if contents.kind == "shards" else contents.kind
        typer.echo(f"{folder}: {contents.samples:,} {things}, all as index.json says")
    else:
        typer.echo(f"{folder}: {len(problems)} problem{'s' if len(problems) > 1 else ''}", err=True)
    if problems:
        raise typer.Exit(1)


@app.command()
def plan(
    params: Annotated[Path, typer.Option(help="The configuration.", metavar="FILE")] = Path("params.yaml"),
    profile: Annotated[
        str | None, typer.Option(help="One of profiles/ instead: cc3m, lotlip-100m, …", metavar="NAME")
    ] = None,
    ablation: Annotated[str, typer.Option(help="Which of its ablations.", metavar="NAME")] = "lotlip",
    gpus: Annotated[
        int | None, typer.Option(help="With infra/gpus/N.yaml, if there is one; else as configured.", min=1)
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="In the data set; else of its shards, or as its name says.", min=1)
    ] = None,
    gpu_memory: Annotated[float, typer.Option(help="Of each GPU, in GB.", min=1)] = 80,
    tflops: Annotated[float, typer.Option(help="Peak of each GPU in the run's precision.", min=0.001)] = 989,
    utilisation: Annotated[float, typer.Option(help="Share of the peak that is used.", min=0.001, max=1)] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a training run takes: steps, tokens, memory, storage, time. Nothing is trained."""
    import yaml

    from lotlip.config.params import load_params
    from lotlip.data.index import INDEX_FILE, ShardIndex, read_index
    from lotlip.plan.plan import Gpu, describe, images_by_name, on_gpus
    from lotlip.plan.plan import plan as make_plan

    file = Path("profiles", f"{profile}.yaml") if profile else params
    settings = load_params(file)
    config, compute = settings.ablation(ablation), settings.training_compute(ablation)
    for warning in settings.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if gpus:
        of_gpus = Path("infra", "gpus", f"{gpus}.yaml")
        differences = yaml.safe_load(of_gpus.read_text(encoding="utf-8")) if of_gpus.is_file() else {}
        config, compute = on_gpus(config, compute, gpus, differences)
    written = (settings.paths.shards / INDEX_FILE).is_file() and not profile
    shards = read_index(settings.paths.shards, ShardIndex) if written else None
    gpu = Gpu(gpu_memory * 1e9, tflops * 1e12, utilisation)
    if not shards:
        images = images or images_by_name(file.stem)
    found = make_plan(settings, config, compute, gpu, shards, images)
    if as_json:
        typer.echo(json.dumps(found.to_json(), allow_nan=False))
        return
    for line in describe(found, f"{file.stem}, {ablation}"):
        typer.echo(line)
