"""The study folder: immutable entries, written atomically, one file per finished job.

A job is a JSON object that says everything its result depends on; the entry's name is the hash of that object.
So a job whose file exists is done, whoever did it and whenever; two processes that do the same job write the same
name and the first complete file wins. A file is written under a temporary name in the same folder, flushed to disk
and then linked to its name, so a reader never sees half an entry and a kill leaves nothing but a stray temporary file.
Entries are Parquet with the job and its provenance as JSON in the schema's metadata; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from headcount.errors import StudyError

if TYPE_CHECKING:
    import pandas as pd

# Raised when what an entry holds, or how it is computed, changes so that old entries must not be re-used.
FORMAT = 2
Job = Mapping[str, Any]


def job_id(job: Job) -> str:
    """The name of a job's entry: 24 hexadecimal digits of the hash of everything the result depends on."""
    text = json.dumps({"format": FORMAT, **job}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Entry:
    """One finished job.

    Attributes:
        job: What was asked.
        info: What else is known of it: masks, counts, versions.
        table: The result's rows.
        format: Of the version that wrote it.
    """

    job: Job
    info: Mapping[str, Any]
    table: pd.DataFrame
    format: int = FORMAT


class Ledger:
    """The entries of one study folder.

    Args:
        folder: The study folder; made when the first entry is written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.entries_folder = self.folder / "entries"

    def path(self, job: Job) -> Path:
        """Where the entry of this job is, or will be."""
        return self.entries_folder / f"{job['kind']}-{job_id(job)}.parquet"

    def has(self, job: Job) -> bool:
        """Whether the job is done: its file is there and whole (a truncated Parquet file has no footer)."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.path(job)
        if not path.exists():
            return False
        try:
            pq.read_metadata(path)
        except (pa.ArrowInvalid, OSError):
            return False
        return True

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from deciding, at the same time, what the folder is a study of.

        Where the file system knows no locks, none is taken.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        with contextlib.suppress(NotImplementedError):
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def write(self, job: Job, table: pd.DataFrame, info: Mapping[str, Any]) -> None:
        """Write an entry once and for all; a whole entry that is there already stays."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.has(job):
            return
        arrow = pa.Table.from_pandas(table, preserve_index=False)
        text = json.dumps({"format": FORMAT, "job": dict(job), "info": dict(info)})
        path = self.path(job)
        with (
            _replacing(path, unless=lambda: self.has(job)) as temporary,
            # Arrow's own schema would hold the text, often longer than the table, a second time.
            pq.ParquetWriter(temporary, arrow.schema.remove_metadata(), compression="zstd", store_schema=False) as file,
        ):
            file.write_table(arrow.replace_schema_metadata(None))
            file.add_key_value_metadata({"headcount": text})

    def read(self, job: Job) -> Entry:
        """The entry of a job that is done.

        Raises:
            StudyError: If it is not there or is damaged.
        """
        return _read(self.path(job))

    def read_need(self, need: tuple[str, str]) -> Entry:
        """The entry of this kind and name, as in `read`."""
        kind, name = need
        return _read(self.entries_folder / f"{kind}-{name}.parquet")

    def keys(self, kind: str | None = None) -> Iterator[Job]:
        """What whole entries of this version answer for, without their tables; damaged ones are left out."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for path in self._paths(kind):
            try:
                content = json.loads(pq.read_metadata(path).metadata[b"headcount"])
            except (pa.ArrowInvalid, OSError, KeyError, TypeError, json.JSONDecodeError):
                continue
            if content["format"] == FORMAT:
                yield content["job"]

    def entries(self, kind: str | None = None) -> Iterator[Entry]:
        """All entries, or those of one kind, by file name; those that another version wrote are passed over."""
        for path in self._paths(kind):
            if (entry := _read(path)).format == FORMAT:
                yield entry

    def descriptions(self, kind: str | None = None) -> Iterator[tuple[Job, Mapping[str, Any]]]:
        """Job and info of the same entries; their tables, which may be large, are not read."""
        for path in self._paths(kind):
            if (entry := _read(path, columns=[])).format == FORMAT:
                yield entry.job, entry.info

    def _paths(self, kind: str | None) -> list[Path]:
        return sorted(self.entries_folder.glob(f"{kind or '*'}-*.parquet"))

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one of the folder's JSON files, replacing an older one in one step."""
        with _replacing(self.folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """One of the folder's JSON files, or None where it is not there.

        Raises:
            StudyError: If it is not JSON.
        """
        path = self.folder / name
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise StudyError(f"{path} is damaged ({error}); choose another --out, or delete that folder") from error
        if not isinstance(content, dict):
            raise StudyError(f"{path} is damaged (no object in it); choose another --out, or delete that folder")
        return content


@contextlib.contextmanager
def _replacing(path: Path, unless: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """Give a temporary path beside `path`; what is written there takes `path`'s place if the block succeeds.

    Args:
        path: The file.
        unless: Asked where the file has come to be meanwhile: whether it stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except OSError:  # it is there, or the file system knows no links
            if not (path.exists() and unless()):
                temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, columns: list[str] | None = None) -> Entry:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns=columns, use_threads=False)
        content = json.loads(table.schema.metadata[b"headcount"])
    except (pa.ArrowInvalid, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise StudyError(f"the entry {path} is damaged; delete that file and run its study again") from error
    return Entry(content["job"], content["info"], table.to_pandas(ignore_metadata=True), content["format"])
