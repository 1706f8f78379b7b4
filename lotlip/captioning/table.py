"""Long captions that were written before: a Parquet or CSV file with the columns key, captioner, text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pandas as pd

from lotlip import config
from lotlip.records import Caption, Failure, ImageRecord
from lotlip.text import split_sub_captions

COLUMNS = ["key", "captioner", "text"]


class TableCaptioner:
    """Looks captions up by the image's key, in the rows whose captioner is `name`.

    Those rows are held in memory, so one captioner's texts have to fit. An image without a row is a `Failure` of
    kind "missing", one whose text has no words of kind "empty".

    Raises:
        ValueError: the file is missing, is neither Parquet nor CSV, lacks a column, has no rows for this captioner,
            or has two for one key.
    """

    prompt = ""

    def __init__(self, name: str, settings: config.TableCaptioner, count_tokens: Callable[[str], int]) -> None:
        self._name = name
        self._path = settings.path
        self._count_tokens = count_tokens
        self._texts = _texts(_read(settings.path), name, settings.path)
        with settings.path.open("rb") as file:
            self.revision = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()[:12]
        self.about = {"kind": settings.kind, "revision": self.revision}

    def caption(self, records: Iterable[ImageRecord]) -> Iterator[Caption | Failure]:
        """Each image's caption, or why there is none."""
        for record in records:
            yield self._caption(record.key)

    def _caption(self, key: str) -> Caption | Failure:
        if key not in self._texts:
            return Failure(key, str(self._path), f"no row has this key and the captioner {self._name}", "missing")
        text = self._texts[key].strip()
        sub_captions = split_sub_captions(text)
        if not sub_captions:
            return Failure(key, str(self._path), f"the text of {self._name} has no words", "empty")
        return Caption(
            key, self._name, text, sub_captions, self._count_tokens(text), "stop", self.revision, self.prompt
        )


def _read(path: Path) -> pd.DataFrame:
    """The three columns, as text; a null text is an empty one."""
    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"{path}: a table of captions ends in .parquet or .csv; convert it to one of them")
    if not path.is_file():
        raise ValueError(f"{path} is not there; set `path` of this captioner in params.yaml to the table of captions")
    try:
        # dtype=str: "null" and "NA" are words in a caption
        is_csv = path.suffix == ".csv"
        table = pd.read_csv(path, dtype=str, keep_default_na=False) if is_csv else pd.read_parquet(path)
    except ValueError as error:  # pandas' and pyarrow's parsers raise kinds of it
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error}; write it again") from error
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)} (it has {', '.join(map(str, table.columns)) or 'none'}); "
            f"a table of captions has the columns {', '.join(COLUMNS)}"
        )
    return table[COLUMNS].fillna({"text": ""}).astype(str)


def _texts(table: pd.DataFrame, name: str, path: Path) -> dict[str, str]:
    rows = table[table["captioner"] == name]
    if rows.empty:
        there = ", ".join(sorted(table["captioner"].unique())) or "none"
        raise ValueError(
            f"{path} has no rows of the captioner {name!r} (it has: {there}); "
            "call the captioner in params.yaml as the table does, or give it another table"
        )
    repeated = rows.loc[rows["key"].duplicated(), "key"].unique()
    if len(repeated):
        shown = ", ".join(repeated[:5]) + (", …" if len(repeated) > 5 else "")
        raise ValueError(
            f"{path} has more than one row of {name} for {len(repeated)} keys ({shown}); keep one row for each"
        )
    return dict(zip(rows["key"], rows["text"], strict=True))
