"""Files behind a prompt path: one file, a folder of them, a pattern, or a saved `datasets` folder."""

import json
import re
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import xxhash

from hf.hub.layout import DEFAULT, configurations
from opd.errors import ConfigurationError, DataError
from opd.settings.validation import shown

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
FORMS = (
    f"a file ({', '.join(ENDINGS)}, also with {', '.join(COMPRESSED)} after it), a folder or a pattern of such files, "
    "or a folder written by datasets.save_to_disk"
)
_PIECE = 16 << 20
_ABOUT = ("dataset_infos.json", "dataset_info.json")  # of a data set, and no rows
_FETCHED = re.compile(r"\d{5}-")  # how files of one split of the hub are linked (`hf.hub.data`)


def endings(path: Path) -> tuple[str, str]:
    """Format and compression of a file by its name. Example: `endings(Path("a.CSV.gz")) == (".csv", ".gz")`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    squeezed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    return (suffixes[-1] if suffixes else ""), squeezed


def files_of(path: str, key: str) -> tuple[Path, ...]:
    """Files of `path`, the value of the setting `key`, in the order in which they are read.

    Raises:
        ConfigurationError: nothing is there, or nothing that can be read.
        DataError: a saved data set is not whole.
    """
    source = Path(path)
    try:
        if source.is_dir():
            return _in_folder(source, key)
        if source.exists():
            return (_file(source, key),)
        found = sorted(Path(name) for name in glob(path, recursive=True)) if any(c in path for c in "*?[") else []
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be read, a zero byte
        why = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"{key} {shown(path)} cannot be looked at ({why}); correct the path") from error
    files = tuple(_file(file, key) for file in found if file.is_file())
    if files:
        return files
    raise ConfigurationError(
        f"{key} {path!r} does not exist; set it to {FORMS}, or to a data set on the Hugging Face hub "
        "(ORG/NAME:CONFIG:SPLIT)"
    )


def content_digest(path: str, key: str) -> str:
    """xxh3-128 (hex) over the bytes of all files of `path`, whatever their names."""
    hasher = xxhash.xxh3_128()
    for file in files_of(path, key):
        hasher.update(f"{file.stat().st_size};".encode())
        with file.open("rb") as stream:
            while piece := stream.read(_PIECE):
                hasher.update(piece)
    return hasher.hexdigest()


def _file(file: Path, key: str) -> Path:
    if not file.is_file():
        raise ConfigurationError(f"{key} {str(file)!r} is no regular file; set it to {FORMS}")
    if endings(file)[0] not in ENDINGS:
        raise ConfigurationError(
            f"{key} {str(file)!r} has the unknown ending {''.join(file.suffixes[-2:])!r}; set it to {FORMS}"
        )
    return file


def _in_folder(folder: Path, key: str) -> tuple[Path, ...]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in folder.iterdir() if (p / "state.json").is_file())
        one = folder / (splits or ["train"])[0]
        raise ConfigurationError(f"{key} {str(folder)!r} holds the splits {splits}; name one, such as {key}={one}")
    if (folder / "state.json").is_file():
        return _saved(folder)
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] not in "._" and endings(p)[0] in ENDINGS)
    files = [file for file in files if file.name not in _ABOUT]
    if not files:
        raise ConfigurationError(
            f"{key} {str(folder)!r} has no prompt files; set it to {FORMS} (files in folders below: "
            f"{key}='{folder}/**/*.parquet')"
        )
    if not all(file.is_symlink() and _FETCHED.match(file.name) for file in files):
        _check_one_split(folder, files, key)
    return tuple(files)


def _check_one_split(folder: Path, files: Sequence[Path], key: str) -> None:
    """Refuse a folder whose files are of several splits by their names: the test set would be trained on, too."""
    splits = configurations([file.name for file in files], "", str(folder)).get(DEFAULT, {})
    if len(splits) > 1:
        named = ", ".join(f"{split} ({files[0]})" for split, files in splits.items())
        raise ConfigurationError(
            f"{key} {str(folder)!r} holds files of several splits, {named}; name those of one, such as "
            f"{key}='{folder}/{next(iter(splits.values()))[0]}', or all of them by a pattern, "
            f"{key}='{folder}/*{files[0].suffix}'"
        )


def _saved(folder: Path) -> tuple[Path, ...]:
    """Arrow files that a saved data set lists."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        names = [str(item["filename"]) for item in state["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{folder} is no whole saved data set (state.json does not list its files); save it anew"
        ) from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise DataError(f"{folder} is no whole saved data set ({name!r} is missing); save it anew")
    return tuple(folder / name for name in names)
