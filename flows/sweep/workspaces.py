"""DVC experiments, each in a checkout of its own beside the project, so that any number of them can run at a time.

`dvc exp run --temp` would do, were it not for three things: it stashes and resets the project's own files at each
start, which a kill in that moment leaves undone; it copies its workspace's data; and what it has trained is lost with
it when it is killed. Here a checkout is a clone that borrows the project's git objects and links to DVC's cache, and a
finished experiment is fetched from it. A checkout that was left half-way gives its scratch to the next try.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO, Any, TypeVar

from flows.runtime.scratch import SCRATCH, StageFailed
from lotlip.core.files import atomic_write, move, remove
from lotlip.core.record import as_record
from lotlip.core.section import flatten

CODE = ("flows", "lotlip", "dvc.yaml", "dvc.lock", "params.yaml", ".dvcignore", ".dvc/config")
IDENTITY = {  # experiments are commits, and not every machine says who commits
    "GIT_AUTHOR_NAME": "lotlip",
    "GIT_AUTHOR_EMAIL": "lotlip@localhost",
    "GIT_COMMITTER_NAME": "lotlip",
    "GIT_COMMITTER_EMAIL": "lotlip@localhost",
}
T = TypeVar("T")
_dvc = Lock()  # its objects are not for several threads


@dataclass(frozen=True)
class Snapshot:
    """The project's files at one moment, with what is not committed yet.

    Attributes:
        root: the project's folder.
        head: the commit that is checked out; experiments are filed under it.
        tree: git's name of the files' content.
        cache: DVC's cache.
    """

    root: Path
    head: str
    tree: str
    cache: Path

    @classmethod
    def take(cls, root: Path) -> Snapshot:
        """What git tracks as it lies there, and the code and configuration that it does not track yet.

        Raises:
            StageFailed: there is no commit.
        """
        try:
            head = _git(root, "rev-parse", "--verify", "HEAD").strip()
        except StageFailed as error:
            raise StageFailed(f"{root} has no commit to file experiments under; git add and commit first") from error
        index = root / SCRATCH / f"index-{os.getpid()}"
        environment = {"GIT_INDEX_FILE": str(index)}
        try:
            _git(root, "read-tree", "HEAD", **environment)
            _git(root, "add", "--update", **environment)
            _git(root, "add", "--all", "--", *(name for name in CODE if (root / name).exists()), **environment)
            tree = _git(root, "write-tree", **environment).strip()
        finally:
            remove(index)
        from dvc.repo import Repo

        with Repo(str(root)) as repo:
            return cls(root, head, tree, Path(repo.cache.local_cache_dir))

    def unpack(self, folder: Path, linked: Mapping[str, Any] | None = None) -> None:
        """Makes a checkout of it.

        Args:
            folder: which is not there yet.
            linked: a params.yaml, whose files and folders that git does not have are linked from the project.
        """
        _git(self.root, "clone", "--quiet", "--shared", "--no-checkout", str(self.root), str(folder))
        _git(folder, "checkout", "--quiet", "--detach", self.head)
        _git(folder, "read-tree", "-u", "--reset", self.tree)
        local = self.root / ".dvc" / "config.local"
        text = local.read_text(encoding="utf-8") if local.is_file() else ""
        (folder / ".dvc" / "config.local").write_text(text, encoding="utf-8")
        (folder / ".dvc" / "tmp").mkdir(exist_ok=True)
        from dvc.config import Config

        with Config(str(folder / ".dvc")).edit("local") as config:
            config["cache"] = {"dir": str(self.cache), "type": ["reflink", "hardlink", "symlink"]}
        for name in _named(linked or {}):
            source, here = self.root / name, folder / name
            if source.exists() and not here.exists():
                here.parent.mkdir(parents=True, exist_ok=True)
                here.symlink_to(source, target_is_directory=source.is_dir())


def _named(params: Mapping[str, Any]) -> Iterator[str]:
    """What a params.yaml names that may be a path in the project: inputs of any kind, and the store of captions.

    What stages write is DVC's to bring.
    """
    outputs = [str(path) for key, path in params.get("paths", {}).items() if key != "caption_store"]
    for value in flatten(params).values():
        for text in value if isinstance(value, list) else [value]:
            path = Path(text) if isinstance(text, str) and text and len(text) < 256 and "\n" not in text else None
            inside = path and not path.is_absolute() and path.parts and ".." not in path.parts
            if path and inside and not any(_overlap(path, Path(out)) for out in outputs):
                yield path.as_posix()


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


@dataclass(frozen=True)
class Experiment:
    """One experiment of the project in DVC.

    Attributes:
        root: the project's folder.
        name: of the experiment.
    """

    root: Path
    name: str

    @property
    def folder(self) -> Path:
        """Where its checkout is while it runs, and its log for good."""
        return self.root / SCRATCH / "sweeps" / self.name

    def revision(self) -> str | None:
        """The commit of its result, whichever commit it is filed under; None where there is none."""
        lines = _git(self.root, "for-each-ref", "--sort=-creatordate", "--format=%(objectname) %(refname)", "refs/exps")
        found = [line.split()[0] for line in lines.splitlines() if line.endswith(f"/{self.name}")]
        return found[0] if found else None

    def read(self, path: Path, kind: type[T]) -> T:
        """A record that a stage of it has written.

        Raises:
            StageFailed: there is no such experiment, or DVC's cache has lost the file.
            ValueError: the file is not of this kind.
        """
        import dvc.api
        from dvc.exceptions import DvcException

        try:
            with _dvc:
                text = dvc.api.read(str(path), repo=str(self.root), rev=self.revision())
        except (DvcException, OSError) as error:
            raise StageFailed(f"{path} of experiment {self.name} is not in DVC's cache: {error}") from error
        return as_record(json.loads(text), kind, path)

    def overrides(self) -> dict[str, Any]:
        """Dotted parameter → value, what it changed in params.yaml.

        Raises:
            StageFailed: there is no such experiment, or no sweep has made it.
        """
        revision = self.revision()
        if not revision:
            raise StageFailed(f"no experiment {self.name!r}; `dvc exp list --all-commits` has them all")
        message = _git(self.root, "show", "--no-patch", "--format=%B", revision)
        try:
            return json.loads(message)
        except json.JSONDecodeError as error:
            raise StageFailed(f"{self.name} is no point of a sweep; try `dvc exp apply {self.name}`") from error

    @contextmanager
    def alone(self, wait: Callable[[], None]) -> Iterator[IO[Any]]:
        """Keeps others from the experiment's checkout for the block; gives what holds the lock, for who outlives it.

        Args:
            wait: called again and again while somebody else has it; may raise.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    wait()
                    time.sleep(0.2)
            yield lock

    def prepare(self, snapshot: Snapshot, params: Mapping[str, Any], overrides: Mapping[str, Any]) -> Path:
        """Makes its checkout, with the scratch of an earlier try if there was one; gives its folder."""
        project, kept = self.folder / "project", self.folder / "scratch"
        if (project / SCRATCH).is_dir():
            remove(kept)
            move(project / SCRATCH, kept)
        remove(project)
        snapshot.unpack(project, params)
        if kept.is_dir():
            remove(project / SCRATCH)
            move(kept, project / SCRATCH)
        set_params(project / "params.yaml", overrides)
        return project

    def command(self, target: str, overrides: Mapping[str, Any]) -> list[str]:
        """What runs it in its checkout."""
        message = json.dumps(dict(overrides), allow_nan=False)
        return ["flows.runtime.dvc", "exp", "run", "--name", self.name, "--message", message, target]

    def collect(self) -> None:
        """Takes the result over from its checkout, which is then removed.

        Raises:
            StageFailed: there is none.
        """
        project = self.folder / "project"
        refs = _git(project, "for-each-ref", "--format=%(refname)", "refs/exps").split()
        ours = [ref for ref in refs if ref.endswith(f"/{self.name}")]
        if not ours:
            raise StageFailed(f"DVC ended well without the experiment; what it wrote is in {self.folder / 'log.txt'}")
        _git(self.root, "fetch", "--quiet", "--no-write-fetch-head", str(project), *(f"+{ref}:{ref}" for ref in ours))
        remove(project)


def set_params(path: Path, changes: Mapping[str, Any]) -> None:
    """Writes values of dotted parameters into a YAML file, whose comments and lines stay."""
    from ruamel.yaml import YAML  # which DVC writes such files with, too
    from ruamel.yaml.comments import CommentedSeq

    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 120
    data = yaml.load(path.read_text(encoding="utf-8"))
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        place = data
        for key in parents:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        if isinstance(value, list):
            value = CommentedSeq(value)
            value.fa.set_flow_style()
        place[last] = value
    with atomic_write(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        yaml.dump(data, file)


def _git(folder: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env={**os.environ, **IDENTITY, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise StageFailed(f"git {arguments[0]} failed in {folder}: {done.stderr.strip()}")
    return done.stdout
