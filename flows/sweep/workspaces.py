"""DVC experiments in separate checkouts, so that any number of them can run in parallel.

`dvc exp run --temp` has three problems: it stashes and resets the project's files at each start, so a kill at that
moment loses changes; it copies the data of its workspace; and a killed run loses its training progress. Here, a
checkout is a clone that shares the project's git objects and links to DVC's cache, and a finished experiment is fetched
from it. A retry takes over the scratch folder of an interrupted checkout.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO, Any, TypeVar

import yaml

from flows.runtime.git import run_git
from flows.runtime.scratch import SCRATCH, StageFailed
from lotlip.config.params import Params, checked_params
from lotlip.core.files import atomic_write, move, remove
from lotlip.core.record import as_record
from lotlip.core.section import flatten
from lotlip.core.temporary import temporary_folder
from lotlip.core.yaml import parse_yaml, read_yaml

CODE = ("flows", "lotlip", "dvc.yaml", "dvc.lock", "params.yaml", ".dvcignore", ".dvc/config")
IDENTITY = {  # experiments are commits, which need an author
    "GIT_AUTHOR_NAME": "lotlip",
    "GIT_AUTHOR_EMAIL": "lotlip@localhost",
    "GIT_COMMITTER_NAME": "lotlip",
    "GIT_COMMITTER_EMAIL": "lotlip@localhost",
}
NO_PROMPT = {"GIT_TERMINAL_PROMPT": "0"}  # otherwise git waits for a login that nobody sees
SWEEPS = "sweeps"  # branches of origin with the snapshots of sweeps on work pools
TRIALS = "trials"  # branches of origin with the results of their trials
T = TypeVar("T")
_dvc = Lock()  # DVC's objects are not thread-safe


@dataclass(frozen=True)
class Snapshot:
    """A snapshot of the project's files, including uncommitted changes.

    Attributes:
        root: the project's folder.
        head: the checked-out commit, which experiments are based on.
        tree: git tree of the files.
        cache: DVC's cache.
    """

    root: Path
    head: str
    tree: str
    cache: Path

    @classmethod
    def take(cls, root: Path, unlocked: Collection[str] = ()) -> Snapshot:
        """Takes a snapshot of all tracked files, and of untracked code and configuration.

        Args:
            root: the project's folder.
            unlocked: stages that its dvc.lock does not have, so that DVC runs them whatever the project has run.

        Raises:
            StageFailed: there is no commit.
        """
        try:
            head = _git(root, "rev-parse", "--verify", "HEAD").strip()
        except StageFailed as error:
            raise StageFailed(f"{root} has no commit to base experiments on; run `git add` and `git commit`") from error
        with temporary_folder("index") as temporary:
            environment = {"GIT_INDEX_FILE": str(temporary / "index")}
            _git(root, "read-tree", "HEAD", **environment)
            _git(root, "add", "--update", **environment)
            _git(root, "add", "--all", "--", *(name for name in CODE if (root / name).exists()), **environment)
            lock = root / "dvc.lock"
            if unlocked and lock.is_file():
                content = read_yaml(lock)
                stages = {name: stage for name, stage in content["stages"].items() if name not in unlocked}
                changed = temporary / "dvc.lock"
                changed.write_text(yaml.safe_dump(content | {"stages": stages}, sort_keys=False), encoding="utf-8")
                blob = _git(root, "hash-object", "-w", str(changed)).strip()
                _git(root, "update-index", "--cacheinfo", f"100644,{blob},dvc.lock", **environment)
            tree = _git(root, "write-tree", **environment).strip()
        from dvc.repo import Repo

        with Repo(str(root)) as repo:
            return cls(root, head, tree, Path(repo.cache.local_cache_dir))

    def publish(self, name: str) -> str:
        """Pushes the snapshot to `origin`, and returns its commit, which is the same whenever the snapshot is.

        Args:
            name: of the sweep. The snapshot has a branch of its own, so that no other sweep moves it.

        Raises:
            StageFailed: the push was refused.
        """
        date = _git(self.root, "show", "--no-patch", "--format=%cI", self.head).strip()
        dates = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        message = "Snapshot of a sweep"
        commit = _git(self.root, "commit-tree", self.tree, "-p", self.head, "-m", message, **IDENTITY, **dates).strip()
        branch = f"{SWEEPS}/{name}-{commit[:8]}"
        _git(self.root, "push", "--quiet", "origin", f"{commit}:refs/heads/{branch}", **NO_PROMPT)
        return commit

    def lacks(self, path: Path) -> bool:
        """Whether a path is in the project, but neither in the snapshot nor in DVC, so that no other machine has it."""
        if path.is_absolute():
            return False
        listed = _git(self.root, "ls-tree", "--name-only", self.tree, "--", path.as_posix(), f"{path.as_posix()}.dvc")
        return not listed

    def unpack(self, folder: Path, linked: Mapping[str, Any] | None = None) -> None:
        """Creates a checkout of the snapshot.

        Args:
            folder: the folder to create.
            linked: a params.yaml; the untracked files and folders that it names are linked from the project.
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
        for name in _input_paths(linked or {}):
            source, link = self.root / name, folder / name
            if source.exists() and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(source, target_is_directory=source.is_dir())


def _input_paths(params: Mapping[str, Any]) -> Iterator[str]:
    """Yields values of params.yaml that may be paths in the project: inputs and the caption store.

    Outputs of stages are left out, because DVC checks them out.
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
    """A DVC experiment of the project.

    Attributes:
        root: the project's folder.
        name: name of the experiment.
    """

    root: Path
    name: str

    @property
    def folder(self) -> Path:
        """The folder of its checkout while it runs, and of its log."""
        return self.root / SCRATCH / "sweeps" / self.name

    def revision(self) -> str | None:
        """Returns the commit of its result, whatever commit it is based on; None if it is not finished."""
        lines = _git(self.root, "for-each-ref", "--sort=-creatordate", "--format=%(objectname) %(refname)", "refs/exps")
        commits = [line.split()[0] for line in lines.splitlines() if line.endswith(f"/{self.name}")]
        return commits[0] if commits else None

    def read(self, path: Path, kind: type[T]) -> T:
        """Reads a record that one of its stages wrote.

        Raises:
            StageFailed: there is no such experiment, or the file is missing from DVC's cache.
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

    def params(self) -> Params:
        """Returns the params.yaml that it ran with.

        Raises:
            StageFailed: there is no such experiment.
            ConfigError: the file is not valid with the code of today.
        """
        revision = self.revision()
        if not revision:
            raise StageFailed(f"no experiment {self.name!r}; list them with `dvc exp list --all-commits`")
        place = f"params.yaml of {self.name}"
        return checked_params(parse_yaml(_git(self.root, "show", f"{revision}:./params.yaml"), place), place)

    def fetch(self) -> bool:
        """Fetches the result that a work pool's worker pushed to `origin`; returns whether there is one.

        Raises:
            StageFailed: git failed.
        """
        found = _git(self.root, "ls-remote", "origin", f"refs/heads/{TRIALS}/{self.name}", **NO_PROMPT)
        if not found:
            return False
        commit = found.split()[0]
        options = ["--quiet", "--no-tags", "--no-write-fetch-head", "--no-auto-gc"]
        _git(self.root, "fetch", *options, "origin", commit, **NO_PROMPT)
        baseline = _git(self.root, "rev-parse", f"{commit}^").strip()
        _git(self.root, "update-ref", f"refs/exps/{baseline[:2]}/{baseline[2:]}/{self.name}", commit)
        return True

    @contextmanager
    def exclusive(self, wait: Callable[[], None]) -> Iterator[IO[Any]]:
        """Locks the experiment's checkout; yields the lock file, which a child process may inherit to keep the lock.

        Args:
            wait: called repeatedly while another process has the lock; may raise.
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
        """Creates its checkout, with the scratch folder of an interrupted try if there is one; returns its folder."""
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
        """Returns the command that runs it in its checkout."""
        return ["flows.runtime.dvc", "exp", "run", "--name", self.name, "--message", message_of(overrides), target]

    def collect(self) -> None:
        """Fetches the result from its checkout, and removes the checkout.

        Raises:
            StageFailed: there is no result.
        """
        project = self.folder / "project"
        refs = _git(project, "for-each-ref", "--format=%(refname)", "refs/exps").split()
        own = [ref for ref in refs if ref.endswith(f"/{self.name}")]
        if not own:
            raise StageFailed(f"DVC succeeded without creating the experiment; see {self.folder / 'log.txt'}")
        _git(self.root, "fetch", "--quiet", "--no-write-fetch-head", str(project), *(f"+{ref}:{ref}" for ref in own))
        remove(project)


def message_of(overrides: Mapping[str, Any]) -> str:
    """Returns the message of an experiment's commit, which lists its changes to params.yaml."""
    return json.dumps(dict(overrides), allow_nan=False)


def set_params(path: Path, changes: Mapping[str, Any]) -> None:
    """Writes values of dotted parameters to a YAML file, keeping comments and layout."""
    from ruamel.yaml import YAML  # also used by DVC
    from ruamel.yaml.comments import CommentedSeq

    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 120
    # by default it would write `key: null` as `key:`
    null = "tag:yaml.org,2002:null"
    yaml.representer.add_representer(type(None), lambda representer, _: representer.represent_scalar(null, "null"))
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
    done = run_git(*arguments, cwd=folder, env={**os.environ, **IDENTITY, **environment})
    if done.returncode:
        raise StageFailed(f"git {arguments[0]} failed in {folder}: {done.stderr.strip()}")
    return done.stdout
