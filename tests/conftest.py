"""A tiny world for the tests of the model and of training: an image tower, and shards with and without features."""

from __future__ import annotations

import gc
import io
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from tests.plugins import heif_plugin, no_plugins  # noqa: F401 (fixtures)
from tests.workspace import (  # noqa: F401 (fixtures)
    checkout,
    forked,
    fresh_checkout,
    make_workspace,
    prefect_address,
    prefect_api,
    prefect_database,
)

if TYPE_CHECKING:
    from tests.defects import World

# Tests share the machine's cores with one another: a thread each, set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell's background job ignores these, and so would every program that a test interrupts.
for _sign in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_sign) == signal.SIG_IGN:
        signal.signal(_sign, signal.default_int_handler if _sign == signal.SIGINT else signal.SIG_DFL)

# Equal examples at every run, and no complaint about a busy machine.
settings.register_profile("lotlip", deadline=None, derandomize=True)
settings.load_profile("lotlip")

# Imports and fixtures leave a million objects, which take the garbage collector a quarter of a second each time.
gc.set_threshold(20_000, 20, 100)

TIERS = ("system", "integration")  # a test without one of these markers is a unit test


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders files: those with the slowest tests first, then those with most slow tests.

    Workers take whole files, and the last ones should be short.
    """

    def tier(item: pytest.Item) -> int:
        return next((number for number, name in enumerate(TIERS) if item.get_closest_marker(name)), len(TIERS))

    tiers: dict[Path, int] = {}
    slow: Counter[Path] = Counter()
    for item in items:
        tiers[item.path] = min(tier(item), tiers.get(item.path, len(TIERS)))
        slow[item.path] += tier(item) < len(TIERS) or item.get_closest_marker("slow") is not None
    items.sort(key=lambda item: (tiers[item.path], -slow[item.path]))


def pytest_collection_finish() -> None:
    """Spares the garbage collector what the imports of all tests have left."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Lets the interpreter collect everything at its end; otherwise triton prints what it leaked."""
    gc.unfreeze()


# What runs in a checkout with a Prefect server, apart from system tests. One worker takes these files, so that one
# server starts. It needs 8 s of a core to start, and 2 % of one while it runs.
WITH_PREFECT = ("tests/flows/test_caption.py", "tests/flows/test_pipeline.py", "tests/flows/test_stage.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives whole files to workers, and the files of `WITH_PREFECT` to the same one."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "with prefect" if file in WITH_PREFECT else file

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


class _UnitTest:
    """Whether a unit test runs now, for the audit hook, which cannot be removed."""

    runs = False


def _start_no_python(event: str, arguments: tuple[Any, ...]) -> None:
    if not _UnitTest.runs or event != "subprocess.Popen":
        return
    program = Path(os.fsdecode(arguments[0] or (arguments[1] or [""])[0])).name
    if program.startswith("python") or program in ("dvc", "prefect", "mlflow", "torchrun", "ray"):
        raise AssertionError(f"a unit test starts {program}, which takes seconds; mark it `integration`")


sys.addaudithook(_start_no_python)


@pytest.fixture(autouse=True)
def tier(request: pytest.FixtureRequest) -> Iterator[None]:
    """Holds unit tests to what makes them fast: they start no Python program."""
    _UnitTest.runs = not any(request.node.get_closest_marker(name) for name in TIERS)
    yield
    _UnitTest.runs = False


COLOURS = ("red", "green", "blue", "white", "black", "brown")
THINGS = ("dog", "cat", "house", "tree", "car", "boat", "bird", "horse")
IMAGE_SIZE = 16
# BERT's sizes for the tests: without dropout, so that runs can be compared to the last digit.
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,  # so narrow a model hardly tells texts apart when it starts with the usual 0.02
}


@dataclass(frozen=True)
class TinySample:
    """One image of the tiny world with all that is known of it.

    Attributes:
        image: as PNG.
        feature: of the tiny image tower, [D].
        info: what its `key.json` holds.
    """

    key: str
    image: bytes
    feature: np.ndarray
    info: dict[str, Any]


@dataclass(frozen=True)
class TinyWorld:
    """Folders of the tiny world, as the stages leave them."""

    image_tower: Path
    shards: Path
    pixel_shards: Path  # the same samples without stored features
    samples: dict[str, TinySample]


def write_tar(path: Path, samples: list[TinySample], features: bool = True) -> Path:
    """A shard, written without the project's own writer, so that reader and writer are tested apart."""
    import tarfile

    def members() -> Iterator[tuple[str, bytes]]:
        for sample in samples:
            yield f"{sample.key}.json", json.dumps(sample.info).encode()
            if features:
                buffer = io.BytesIO()
                np.save(buffer, sample.feature)
                yield f"{sample.key}.npy", buffer.getvalue()
            yield f"{sample.key}.png", sample.image

    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder: Path, samples: list[TinySample], shards: int, features: bool = True) -> Path:
    """A data set of `shards` tars for training, with what `index.json` says of them."""
    from lotlip.core.files import sha256_files
    from lotlip.data.index import ShardEntry, ShardIndex, SplitEntry, write_index
    from lotlip.data.tokenizer import used_tokens

    names = [f"train-{number:06d}" for number in range(shards)]
    parts = [samples[number::shards] for number in range(shards)]
    for name, part in zip(names, parts, strict=True):
        write_tar(folder / f"{name}.tar", part, features)
    listed = [
        ShardEntry(name=name, samples=len(part), bytes=tar.stat().st_size, sha256=sha256_files([tar]))
        for name, part in zip(names, parts, strict=True)
        for tar in [folder / f"{name}.tar"]
    ]
    splits = {"train": SplitEntry(samples=len(samples), shards=listed)}
    texts = [text for sample in samples for text in _texts(sample.info) if isinstance(text, str)]  # some are defects
    vocabulary = sorted(used_tokens("bert-base-uncased", texts))
    own = {"statistics": {}, "features": features, "tokenizer": "bert-base-uncased", "vocabulary": vocabulary}
    write_index(folder, [], ShardIndex, splits=splits, **own)
    return folder


def _texts(info: dict[str, Any]) -> list[str]:
    return [info["raw"], *(text for texts in info["captions"].values() for text in texts)]


def _picture(colour: str, thing: str) -> bytes:
    """A row of squares for the colour above one for the thing, so that what was seen of either is known again."""
    rows = [random.Random(word).choices(range(256), k=12) for word in (colour, thing)]
    pixels = np.array(rows, dtype=np.uint8).reshape(2, 4, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST).save(file, "png")
    return file.getvalue()


def _info(colour: str, thing: str, rng: random.Random) -> dict[str, Any]:
    number = rng.choice(["one", "two", "three"])
    llava = [f"There is a {thing}", f"The {thing} is {colour}", f"It is {number} of them", "The sky is open"]
    gpt = [f"We see the {colour} {thing}", f"{number} can be counted", f"{colour} is all around"]
    return {"raw": f"a {colour} {thing}", "captions": {"llava": llava, "gpt": gpt}, "sha256": "0"}


@pytest.fixture(scope="session")
def tiny_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a frozen image tower, 32 wide."""
    import torch

    from lotlip.models.vision.image_tower import build_image_tower, save_image_tower
    from lotlip.models.vision.spec import ImageTowerSpec

    folder = tmp_path_factory.mktemp("tower") / "image-tower"
    kwargs = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    spec = ImageTowerSpec("vit_scenes", IMAGE_SIZE, kwargs)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        tower = build_image_tower(spec).eval()
        for weight in tower.parameters():
            if weight.ndim > 1:  # as initialised, pictures would hardly differ in their features
                torch.nn.init.normal_(weight, std=0.5)
    save_image_tower(tower, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_samples(tiny_tower: Path) -> list[TinySample]:
    """48 images, each a colour and a thing; their captions tell which."""
    import torch

    from lotlip.data.images import decode_rgb, image_transform
    from lotlip.models.vision.image_tower import load_image_tower

    tower = load_image_tower(tiny_tower)
    transform = image_transform(**tower.spec.preprocessing)
    kinds = [(colour, thing) for colour in COLOURS for thing in THINGS]
    images = [_picture(*kind) for kind in kinds]
    with torch.inference_mode():
        features = tower(torch.from_numpy(np.stack([transform(decode_rgb(image)) for image in images]))).numpy()
    rng = random.Random(0)
    return [
        TinySample(f"{colour}-{thing}", image, feature, _info(colour, thing, rng))
        for (colour, thing), image, feature in zip(kinds, images, features, strict=True)
    ]


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory, tiny_tower: Path, tiny_samples: list[TinySample]) -> TinyWorld:
    """The whole of it; nothing may be changed in its folders."""
    folder = tmp_path_factory.mktemp("world")
    return TinyWorld(
        image_tower=tiny_tower,
        shards=write_shards(folder / "shards", tiny_samples, 3),
        pixel_shards=write_shards(folder / "pixels", tiny_samples, 3, features=False),
        samples={sample.key: sample for sample in tiny_samples},
    )


@pytest.fixture(scope="session")
def process_group() -> Iterator[dict[str, str]]:
    """This process as a group of its own, which DeepSpeed joins once; gives the environment that it set for it."""
    import torch

    from lotlip.core.compute import TrainingCompute
    from lotlip.pretrain.engine import initialise_processes

    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    with pytest.MonkeyPatch.context() as patch:
        for name in (*names, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            patch.setenv(name, "")  # so that what training sets is unset at the end
            patch.delenv(name)
        initialise_processes(TrainingCompute())
        environment = {name: os.environ[name] for name in names}
    yield environment
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def group(process_group: dict[str, str]) -> Iterator[None]:
    """Lets the tests of a module train in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in process_group.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def base(group: None, tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A plain run of 12 steps and two seeds, which others are compared with."""
    from tests.training import tiny_job, train

    return train(tiny_job(tiny_world, tmp_path_factory.mktemp("base")), seeds=(0, 1))


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A data set without a defect; tests leave it as it is."""
    from tests.defects import build

    return build(tmp_path_factory.mktemp("clean"))


@pytest.fixture
def world(clean: World, tmp_path: Path) -> World:
    """A copy of it, to plant a defect in."""
    return clean.copy(tmp_path / "world")


@pytest.fixture
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has gates leave out Great Expectations' pages, three quarters of their time; what is found is in their words."""
    monkeypatch.setattr("lotlip.core.checks._write_pages", lambda context: None)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server on loopback; the environment holds its endpoint and credentials."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        S3FileSystem.clear_instance_cache()
        yield f"http://{host}:{port}"
        S3FileSystem.clear_instance_cache()
    server.stop()
