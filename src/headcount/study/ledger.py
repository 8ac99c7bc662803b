"""The study folder: immutable entries, written atomically, one file per finished job.

A job is a JSON object that says everything its result depends on; the entry's name is the hash of that object.
So a job whose file exists is done, whoever did it and whenever; two processes that do the same job write the same
name and the first complete file wins. A file is written under a temporary name in the same folder, flushed to disk
and then linked to its name, so a reader never sees half an entry and a kill leaves nothing but a stray temporary file.
Entries are Parquet with the job and its provenance as JSON in the schema's metadata; nothing is pickled.

Nothing is believed that cannot be checked. An entry carries the digest of all its bytes (`headcount.study.seal`) and
its name is the hash of the job inside; the digest and the name are checked wherever an entry is asked for, and rows are
parsed from the very bytes that were checked. What fails is damaged: it counts as not done and is measured again. An
entry of an earlier version has no digest; it is read as unverified if its name is right and what it holds fits its job
(`headcount.study.plausible`). Files of other names are no entries.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from headcount.errors import StudyError, first_line
from headcount.study import seal
from headcount.study.plausible import implausible

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

# Raised when what an entry holds, or how it is computed, changes so that old entries must not be re-used.
FORMAT = 2
Job = Mapping[str, Any]
# What an entry's JSON holds; those of earlier versions lack the digest, and nothing else.
_KEYS = {"format", "job", "info"}
_NAME = re.compile(r"([a-z_]+)-[0-9a-f]{24}\.parquet")
# What to do about a study.json that is damaged: the names of entries say all that a study needs to find them.
REMEDY = ("put back a copy of it, or delete this one file and run the study's command again: what is measured is found "
          "again (what was asked for earlier is forgotten)")
# How long another process may decide what the folder is a study of, in seconds.
_PATIENCE = 60.0
# What a file system says that knows no locks.
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}


def job_id(job: Job) -> str:
    """The name of a job's entry: 24 hexadecimal digits of the hash of everything the result depends on."""
    return _hash({"format": FORMAT, **job})


def _hash(described: Mapping[str, Any]) -> str:
    text = json.dumps(described, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Entry:
    """One finished job.

    Attributes:
        job: What was asked.
        info: What else is known of it: masks, counts, versions.
        table: The result's rows.
    """

    job: Job
    info: Mapping[str, Any]
    table: pd.DataFrame


@dataclass(frozen=True)
class Found:
    """A file that has an entry's name, looked at.

    Attributes:
        name: Of the file.
        damage: Why it is not believed; empty where it is.
        entry: What it holds; None where it is damaged or of another format, its table empty where rows were not asked
            for.
        verified: Whether all its bytes are proved by its digest; entries of earlier versions have none.
        job: What it says it answers for, where its name proves that, damaged or not; else None.
        other_format: Whether another version wrote it in a format that is not read here.
    """

    name: str
    damage: str = ""
    entry: Entry | None = None
    verified: bool = False
    job: Job | None = None
    other_format: bool = False


def is_left_over(name: str) -> bool:
    """Whether a file is what a process left that was killed while it wrote."""
    return name.startswith(".") and name.endswith(".tmp")


class _DamagedError(Exception):
    """An entry is not believed: why."""


class Ledger:
    """The entries of one study folder.

    Args:
        folder: The study folder; made when the first entry is written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.entries_folder = self.folder / "entries"
        # What was found in entries without a digest, by the hash of their bytes: it takes a while.
        self._weighed: dict[bytes, str] = {}

    def path(self, job: Job) -> Path:
        """Where the entry of this job is, or will be."""
        return self.entries_folder / f"{job['kind']}-{job_id(job)}.parquet"

    def has(self, job: Job) -> bool:
        """Whether the job is done: its entry is there and believed."""
        path = self.path(job)
        return path.exists() and self._look(path, rows=False).entry is not None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from deciding, at the same time, what the folder is a study of.

        Where the file system knows no locks, none is taken.

        Raises:
            StudyError: If another process holds the lock for a minute, which it needs for moments only.
        """
        lock = self.folder / ".lock"
        with _held(lock, _PATIENCE, f"another process has held {lock} for {_PATIENCE:.0f} s, as one that was stopped "
                   "(Ctrl-Z) does; let it go on or end it (if there is none, delete that file), then run this again"):
            yield

    @contextlib.contextmanager
    def driven(self) -> Iterator[None]:
        """Keep a second command off the folder whose jobs this one hands out to workers.

        Raises:
            StudyError: If another one does so already.
        """
        lock = self.folder / ".driver.lock"
        with _held(lock, 0.0, f"another command hands out the jobs of {self.folder} to workers: wait until it has "
                   f"ended, or stop it, then run this again (if there is none, delete {lock})"):
            yield

    @contextlib.contextmanager
    def token(self) -> Iterator[tuple[str, str]]:
        """The name of a file in the folder, for a while, and what it holds: who reads that there shares the folder."""
        text = uuid.uuid4().hex
        path = self.folder / f".shared-{text[:8]}.tmp"
        path.write_text(text, encoding="utf-8")
        try:
            yield path.name, text
        finally:
            path.unlink(missing_ok=True)

    def shares(self, token: tuple[str, str]) -> bool:
        """Whether this process sees the folder in which another one wrote the token."""
        name, text = token
        try:
            return (self.folder / name).read_text(encoding="utf-8") == text
        except (OSError, UnicodeDecodeError):
            return False

    def write(self, job: Job, table: pd.DataFrame, info: Mapping[str, Any]) -> None:
        """Write an entry once and for all; a whole entry that is there already stays, a damaged one is replaced."""
        if self.has(job):
            return
        self.check_places()
        content = {"format": FORMAT, "job": dict(job), "info": dict(info), seal.KEY: seal.BLANK}
        data = seal.sealed(_parquet(table, json.dumps(content)))
        with _replacing(self.path(job), unless=lambda: self.has(job)) as temporary:
            temporary.write_bytes(data)

    def read(self, job: Job) -> Entry:
        """The entry of a job that is done.

        Raises:
            StudyError: If it is not there or is damaged.
        """
        return self._read(self.path(job))

    def read_need(self, need: tuple[str, str]) -> Entry:
        """The entry of this kind and name, as in `read`."""
        kind, name = need
        return self._read(self.entries_folder / f"{kind}-{name}.parquet")

    def scan(self, kind: str | None = None, *, rows: bool = True) -> Iterator[Found]:
        """All files that have an entry's name, or those of one kind, by name; damaged ones too.

        Args:
            kind: Of entries; None: all.
            rows: Whether tables are wanted.
        """
        for name in self._names():
            if (match := _NAME.fullmatch(name)) and kind in (None, match[1]):
                yield self._look(self.entries_folder / name, rows=rows)

    def keys(self, kind: str | None = None) -> Iterator[Job]:
        """What whole entries of this version answer for, without their tables."""
        for found in self.scan(kind, rows=False):
            if found.entry is not None:
                yield found.entry.job

    def entries(self, kind: str | None = None) -> Iterator[Entry]:
        """All entries, or those of one kind, by file name; damaged ones and other versions' are passed over."""
        for found in self.scan(kind):
            if found.entry is not None:
                yield found.entry

    def descriptions(self, kind: str | None = None) -> Iterator[tuple[Job, Mapping[str, Any]]]:
        """Job and info of the same entries; their tables, which may be large, are not read."""
        for found in self.scan(kind, rows=False):
            if found.entry is not None:
                yield found.entry.job, found.entry.info

    def check_places(self) -> None:
        """Refuse a folder that has an entry's name, before anything is measured that could not be written there.

        Raises:
            StudyError: Which names it.
        """
        for name in filter(_NAME.fullmatch, self._names()):
            if (path := self.entries_folder / name).is_dir():
                raise StudyError(f"{path} is a folder, where an entry is to be written; move it away")

    def damaged(self) -> list[str]:
        """Names of the damaged entries."""
        return [found.name for found in self.scan(rows=False) if found.damage]

    def foreign(self) -> list[str]:
        """Names of what lies among the entries and is none: copies under other names, what killed processes left."""
        # A name may hold bytes that are no text.
        return [os.fsencode(name).decode(errors="backslashreplace") for name in self._names()
                if not _NAME.fullmatch(name)]

    def is_begun(self) -> bool:
        """Whether anything has the name of an entry, damaged or not."""
        return any(map(_NAME.fullmatch, self._names()))

    def _names(self) -> list[str]:
        return sorted(os.listdir(self.entries_folder)) if self.entries_folder.is_dir() else []

    def _read(self, path: Path) -> Entry:
        if not path.exists():
            raise StudyError(f"the entry {path} is not there; run its study again, which measures it")
        found = self._look(path, rows=True)
        if found.entry is None:
            if found.other_format:
                raise StudyError(f"another version wrote the entry {path} in a format of its own; run its study again, "
                                 "which measures it for this version")
            why = found.damage
            raise StudyError(f"the entry {path} is damaged ({why}); run its study again, which measures it anew")
        return found.entry

    def _look(self, path: Path, *, rows: bool) -> Found:
        """What a file holds; whatever its bytes are, nothing is raised but what the machine itself cannot do."""
        import pyarrow as pa

        proved: Job | None = None
        try:
            data = path.read_bytes()
            content = _content(data)
            job, verified = content["job"], seal.KEY in content
            named = f"{job['kind']}-{_hash({'format': content['format'], **job})}.parquet"
            if path.name != named:
                raise _DamagedError(f"it holds another job, whose entry is called {named}")
            proved = job
            if verified and not seal.is_whole(data):
                raise _DamagedError("its bytes are not those that were written: its digest is of others")
            if content["format"] != FORMAT:
                return Found(path.name, verified=verified, job=proved, other_format=True)
            entry = self._entry(data, content, rows=rows)
        except _DamagedError as damage:
            return Found(path.name, str(damage), job=proved)
        except OSError as error:
            return Found(path.name, f"it cannot be read: {error.strerror or first_line(error)}", job=proved)
        # What Parquet's, JSON's and pandas' readers make of any bytes; MemoryError is a length that was damaged.
        except (pa.ArrowException, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
                NotImplementedError, RecursionError, MemoryError) as error:
            return Found(path.name, f"it cannot be read: {first_line(error)}", job=proved)
        return Found(path.name, "", entry, verified, proved)

    def _entry(self, data: bytes, content: Mapping[str, Any], *, rows: bool) -> Entry:
        """The entry that these bytes hold; without a digest, if what it holds fits its job."""
        import pandas as pd

        job, info = content["job"], content["info"]
        weighed = b"" if seal.KEY in content else hashlib.sha256(data).digest()
        unknown = weighed != b"" and weighed not in self._weighed
        table = _rows(data) if rows or unknown else None
        if unknown:
            self._weighed[weighed] = implausible(job, info, table)
        if damage := self._weighed.get(weighed):
            raise _DamagedError(damage)
        return Entry(job, info, table.to_pandas(ignore_metadata=True) if table is not None and rows else pd.DataFrame())

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one of the folder's JSON files with its digest, replacing an older one in one step."""
        data = json.dumps({**content, seal.KEY: seal.BLANK}, indent=2) + "\n"
        with _replacing(self.folder / name) as temporary:
            temporary.write_bytes(seal.sealed(data.encode()))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """One of the folder's JSON files without its digest, or None where it is not there.

        Raises:
            StudyError: If it is not JSON, or has a digest that is not its own; those of earlier versions have none.
        """
        path = self.folder / name
        if not path.exists():
            return None
        try:
            data = path.read_bytes()
            content = json.loads(data)
        except OSError as error:
            raise _damaged_json(path, error.strerror or first_line(error)) from error
        except (ValueError, RecursionError) as error:
            raise _damaged_json(path, first_line(error)) from error
        if not isinstance(content, dict):
            raise _damaged_json(path, "no object in it")
        if seal.KEY in content and not seal.is_whole(data):
            raise _damaged_json(path, "it was changed after it was written; if on purpose, take out its last field, "
                                      f"{seal.KEY}, with the comma before it")
        return {key: value for key, value in content.items() if key != seal.KEY}


@contextlib.contextmanager
def _held(path: Path, patience: float, refusal: str) -> Iterator[None]:
    """Hold the lock that a file is; where the file system knows no locks, none is taken.

    Raises:
        StudyError: With the refusal, if another process holds it for so many seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=patience)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of another kind of lock, which is as good
            lock.acquire()
    except Timeout as error:
        raise StudyError(refusal) from error
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()


def _damaged_json(path: Path, what: str) -> StudyError:
    return StudyError(f"{path} is damaged ({what}); {REMEDY}")


def _parquet(table: pd.DataFrame, description: str) -> bytes:
    """A table as Parquet with a description in its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrow, out = pa.Table.from_pandas(table, preserve_index=False), pa.BufferOutputStream()
    # Arrow's own schema would hold the text, often longer than the table, a second time.
    with pq.ParquetWriter(out, arrow.schema.remove_metadata(), compression="zstd", store_schema=False) as file:
        file.write_table(arrow.replace_schema_metadata(None))
        file.add_key_value_metadata({"headcount": description})
    written: bytes = out.getvalue().to_pybytes()
    return written


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


def _content(data: bytes) -> dict[str, Any]:
    """An entry's JSON, of the right form."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = (pq.read_metadata(pa.BufferReader(data)).metadata or {}).get(b"headcount")
    if text is None:
        raise _DamagedError("it has no description, as an entry has")
    content = json.loads(text)
    if not isinstance(content, dict) or content.keys() - {seal.KEY} != _KEYS:
        raise _DamagedError("its description is not an entry's")
    job, info, version = (content[name] for name in ("job", "info", "format"))
    if not (isinstance(job, dict) and isinstance(job.get("kind"), str) and isinstance(info, dict)
            and isinstance(version, int)):
        raise _DamagedError("its description is not an entry's")
    return content


def _rows(data: bytes) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(pa.BufferReader(data)) as file:
        table = file.read(use_threads=False)
    table.validate(full=True)
    return table
