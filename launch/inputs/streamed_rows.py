"""Rows that stay in their files: an index of lines in memory, and each row read where it is needed."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import overload

from launch.inputs.prompt_paths import endings
from launch.inputs.records import BOM, Record, check_content, json_line
from opd.errors import ConfigurationError, DataError
from opd.types.prompt_rows import Row

LINES = (".jsonl", ".ndjson")


class StreamedRows(Sequence[Row]):
    """Rows of files of JSON lines, 24 bytes of memory each.

    Each is read again, and made by the same functions, when it is asked for. A file that was changed since the index
    was made is an error. Any row can be taken, so an order over all of them is exact, without a buffer.
    """

    def __init__(self, files: Sequence[Path], keep: Callable[[Record], bool], make: Callable[[Record], Row]) -> None:
        """Read all files once: `make` checks every row that is kept; others are counted in `left_out`."""
        self._files, self._make = files, make
        self._states = [_state(file) for file in files]
        self._file, self._offset, self._line = array("Q"), array("Q"), array("Q")
        self.left_out, self.first_left_out = 0, ""
        for number, file in enumerate(files):
            for offset, line, record in _records(file):
                if keep(record):
                    make(record)
                    self._file.append(number)
                    self._offset.append(offset)
                    self._line.append(line)
                else:
                    self.left_out, self.first_left_out = self.left_out + 1, self.first_left_out or record.where

    def __len__(self) -> int:
        return len(self._offset)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, place: int | slice) -> Row | tuple[Row, ...]:
        if isinstance(place, slice):
            return tuple(self[i] for i in range(*place.indices(len(self))))
        number = self._file[place]
        file = self._files[number]
        if _state(file) != self._states[number]:
            raise DataError(f"{file} was changed while the run reads it; give the run a file that stays as it is")
        with file.open("rb") as stream:
            stream.seek(self._offset[place])
            raw = stream.readline().splitlines(keepends=True)[0]
        record = json_line(raw.removeprefix(BOM), f"{file} line {self._line[place]}")
        assert record is not None  # blank lines are not indexed
        return self._make(record)


def check_streamed(files: Sequence[Path], key: str) -> None:
    """Refuse files of which a line cannot be found again by its place."""
    for file in files:
        form, squeezed = endings(file)
        if form not in LINES or squeezed:
            raise ConfigurationError(
                f"{key}=true reads JSON lines ({', '.join(LINES)}) that are not compressed, but got {str(file)!r}; "
                f"store it as such lines, or set {key}=false"
            )
        check_content(file)


def _records(file: Path) -> Iterator[tuple[int, int, Record]]:
    """Every record with the byte at which its line begins and the line's number from 1."""
    offset = number = 0
    with file.open("rb") as stream:
        for chunk in stream:
            for raw in chunk.splitlines(keepends=True):
                number += 1
                record = json_line(raw.removeprefix(BOM) if number == 1 else raw, f"{file} line {number}")
                if record is not None:
                    yield offset, number, record
                offset += len(raw)


def _state(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError as error:
        raise DataError(f"{file} is gone while the run reads it ({error.strerror}); put it back") from error
    return found.st_size, found.st_mtime_ns
