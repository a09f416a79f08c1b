"""Files of rows in common formats: every row as a mapping, with its place for error messages."""

import bz2
import csv
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hf.folder import FETCH, is_pointer
from launch.inputs.json_records import parse, parse_array
from launch.inputs.prompt_paths import endings
from opd.errors import DataError

BOM = b"\xef\xbb\xbf"
_WIDE = (b"\xff\xfe", b"\xfe\xff")  # how UTF-16 and UTF-32 begin
_ARROW_FILE = b"ARROW1\0\0"  # what has its batches in any order (Feather, polars), and not as a stream
_MARKS: Mapping[bytes, str] = {  # at the start of a file
    b"PAR1\x15": ".parquet",
    _ARROW_FILE: ".arrow",
    b"\x1f\x8b": ".gz",
    b"BZh91AY&SY": ".bz2",
    b"\xfd7zXZ\0": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
}
_PAGES = (b"<!doctype html", b"<html")
csv.field_size_limit(sys.maxsize)


@dataclass(frozen=True, slots=True)
class Record:
    """A row and its place.

    `untyped`: all values are text, because the format knows nothing else. `sparse`: objects have a null for what they
    lack, because the format gives all rows the same fields.
    Example: `Record("a.csv line 2", {"prompt": "1+1="}, untyped=True)`.
    """

    where: str
    values: Mapping[str, Any]
    untyped: bool = False
    sparse: bool = False


def records(file: Path) -> Iterator[Record]:
    """All rows of `file`. Raises `DataError` with file and line where its content is not of the format in its name."""
    form, squeezed = endings(file)
    check_content(file)
    with _whole(file), _OPENERS[squeezed](file) as stream:
        yield from _READERS[form](stream, str(file))


def check_content(file: Path) -> None:
    """Refuse a file that is of another kind than its name, by its first bytes, or that was not fetched."""
    form, squeezed = endings(file)
    with _whole(file), file.open("rb") as stream:
        head = stream.read(60)
    if is_pointer(head):
        raise DataError(f"{file} holds no rows: {FETCH}")
    if squeezed:
        return
    real = next((ending for mark, ending in _MARKS.items() if head.startswith(mark)), form)
    if real != form:
        right = f"{file.name}{real}" if real in _OPENERS else file.with_suffix(real).name
        raise DataError(f"{file} is named {form} and begins as a {real} file does; call it {right}")
    begins = head.removeprefix(BOM).lstrip(b" \t\r\n")
    if head.startswith(b"PK\x03\x04"):
        raise DataError(
            f"{file} is a zip archive, as Excel files are, and no {form}; store its rows as CSV or JSON lines"
        )
    if begins.lower().startswith(_PAGES):
        raise DataError(f"{file} is a web page and no {form}; download the file itself (its raw form)")
    if _READERS[form] is _json_lines and begins.startswith(b"["):
        raise DataError(
            f"{file} begins with '[' as an array does, and {form} has an object in every line; call an array "
            f"{file.with_suffix('.json').name}"
        )


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    """Context in which damage that a file system or a decompressor reports becomes one sentence."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{file} cannot be read ({_first_line(error)}); copy it anew") from error


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def _zstandard(file: Path) -> BinaryIO:
    import pyarrow

    with pyarrow.OSFile(str(file), "rb") as raw, pyarrow.CompressedInputStream(raw, "zstd") as stream:
        return io.BytesIO(stream.read())


_OPENERS: Mapping[str, Callable[[Path], Any]] = {
    "": lambda file: file.open("rb"),
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
}


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Lines as text with their numbers from 1; `\n`, `\r\n` and `\r` end one, and stay at its end."""
    number = 0
    for chunk in stream:
        for raw in chunk.splitlines(keepends=True):
            number += 1
            yield number, _text(raw.removeprefix(BOM) if number == 1 else raw, f"{name} line {number}")


def _text(raw: bytes, where: str) -> str:
    if raw[:2] in _WIDE or b"\0" in raw:
        raise DataError(f"{where} has zero bytes or the mark of UTF-16; store the file as UTF-8")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 (byte 0x{raw[error.start]:02x} at its position {error.start + 1}); store the file "
            "as UTF-8"
        ) from error


def _json_lines(stream: BinaryIO, name: str) -> Iterator[Record]:
    for number, line in _lines(stream, name):
        if record := _json_record(line, f"{name} line {number}"):
            yield record


def json_line(raw: bytes, where: str) -> Record | None:
    """The record in one line of a file; None if it is blank."""
    return _json_record(_text(raw, where), where)


def _json_record(line: str, where: str) -> Record | None:
    return Record(where, _object(parse(line, where), where)) if line.strip(" \t\r\n") else None


def _json(stream: BinaryIO, name: str) -> Iterator[Record]:
    """An array of objects, or an object per line."""
    raw = stream.read()
    if not raw.removeprefix(BOM).lstrip(b" \t\r\n").startswith(b"["):
        yield from _json_lines(io.BytesIO(raw), name)
        return
    text = "".join(line for _, line in _lines(io.BytesIO(raw), name))
    for where, value in parse_array(text, name):
        yield Record(where, _object(value, where))


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is no JSON object; each row needs a field per column")
    return value


def _table(delimiter: str) -> Callable[[BinaryIO, str], Iterator[Record]]:
    """A reader of text tables whose first line names the columns."""

    def rows(stream: BinaryIO, name: str) -> Iterator[Record]:
        place = 0

        def text() -> Iterator[str]:
            nonlocal place
            for place, line in _lines(stream, name):  # noqa: B007
                yield line

        reader = csv.reader(text(), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            begins = place + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(f"{name} line {begins} is no row of a table ({error}); correct it") from error
            if not cells:
                continue
            if header is None:
                header = _header(_separated(cells, f"{name} line {begins}"), f"{name} line {begins}")
            elif len(cells) != len(header):
                raise DataError(
                    f"{name} line {begins} has {len(cells)} cells, but the first line names {len(header)} columns; "
                    "quote cells that hold the separator"
                )
            else:
                yield Record(f"{name} line {begins}", dict(zip(header, cells, strict=True)), untyped=True)

    return rows


def _separated(cells: list[str], where: str) -> list[str]:
    """Names of columns, refused where they show another separator than the file's ending names."""
    if cells[0].startswith("sep="):
        raise DataError(f"{where} is no row of a table but {cells[0]!r}, which Excel writes; remove the line")
    if len(cells) == 1 and (other := next((sign for sign in ";\t,|" if sign in cells[0]), None)):
        raise DataError(
            f"{where} names one column, {cells[0]!r}, so its cells seem to be separated by {other!r}; save the file "
            "with commas (.csv) or tabs (.tsv)"
        )
    return cells


def _header(cells: list[str], where: str) -> list[str]:
    if len(set(cells)) < len(cells):
        twice = next(cell for cell in cells if cells.count(cell) > 1)
        raise DataError(f"{where} names the column {twice!r} twice; rename one")
    return cells


def _parquet(stream: BinaryIO, name: str) -> Iterator[Record]:
    import pyarrow.parquet

    yield from _arrow_rows(lambda: pyarrow.parquet.ParquetFile(io.BytesIO(stream.read())).iter_batches(1024), name)


def _arrow(stream: BinaryIO, name: str) -> Iterator[Record]:
    import pyarrow.ipc

    def batches() -> Iterator[Any]:
        data = stream.read()
        if not data.startswith(_ARROW_FILE):
            return iter(pyarrow.ipc.open_stream(data))
        file = pyarrow.ipc.open_file(data)
        return map(file.get_batch, range(file.num_record_batches))

    yield from _arrow_rows(batches, name)


def _arrow_rows(batches: Callable[[], Iterator[Any]], name: str) -> Iterator[Record]:
    import pyarrow

    number = 0
    try:
        for batch in batches():
            _header(batch.schema.names, name)
            batch.validate(full=True)
            for values in _exact(batch).to_pylist():
                number += 1
                yield Record(f"{name} row {number}", values, sparse=True)
    # What pyarrow raises of damage: its own errors derive from these too, and not all of them from one of its own.
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise DataError(f"{name} cannot be read after row {number} ({_first_line(error)}); write it anew") from error


def _exact(batch: Any) -> Any:
    """The batch with short floats as the doubles of the same spelling, so that 0.1 stays 0.1."""
    import pyarrow

    for i, field in enumerate(batch.schema):
        if pyarrow.types.is_float32(field.type) or pyarrow.types.is_float16(field.type):
            shortest = [None if not v.is_valid else float(str(np.float32(v.as_py()))) for v in batch.column(i)]
            batch = batch.set_column(i, field.name, pyarrow.array(shortest, type=pyarrow.float64()))
    return batch


_READERS: Mapping[str, Callable[[BinaryIO, str], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
}
