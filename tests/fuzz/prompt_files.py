"""Mutated prompt files of all formats: understood as an independent reader understands them, or one typed sentence.

    python -m tests.fuzz.prompt_files [count=2000] [seed=0]

Prints how many were tried, understood, refused, ended in another error, or were rewritten without a word.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import shutil
import sys
import tempfile
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from hf.tokenizer import HuggingFaceTokenizer
from launch.inputs.prompt_files import read_rows
from launch.plan.checks.survey import survey_all
from opd.errors import OpdError
from opd.ports import Sources
from opd.prompts.dataset import DatasetPrompts
from opd.types.prompt_rows import Columns, Row

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']' + m.content + '\\n' }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}[assistant]"
)
Records = Sequence[Mapping[str, Any]]
WORDS = (
    "has",
    "buys",
    "3",
    "Mon",
    "caf\u00e9",
    "\U0001f600",
    "\u2028",
    '"',
    ",",
    ";",
    "\n",
    "\\",
    "None",
    "<eos>",
    "null",
)
CELLS: Sequence[Any] = (None, True, 7, 0.5, -1, 2**70, [], ["2"], {"a": 1}, "", " ", "\ud83d", "a\x00b", {"text": "x"})


def _text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6)))


def _message(rng: random.Random, role: str) -> dict[str, Any]:
    said = _text(rng)
    if rng.random() < 0.2:
        return {"role": role, "content": [{"type": "text", "text": said}, {"type": "text", "text": "!"}]}
    return {"role": role, "content": said} | ({"name": "Ada"} if rng.random() < 0.1 else {})


def _chat(rng: random.Random) -> list[dict[str, Any]]:
    talk = [_message(rng, "system")] if rng.random() < 0.3 else []
    for _ in range(rng.randint(0, 2)):
        talk += [_message(rng, "user"), _message(rng, "assistant")]
    if rng.random() < 0.1:
        call = {"function": {"name": "add", "arguments": {"a": 1}}}
        talk += [_message(rng, "user"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    return [*talk, _message(rng, "user")]


def _records(rng: random.Random, chat: bool) -> list[dict[str, Any]]:
    answers: Sequence[Callable[[], Any]] = (lambda: _text(rng), lambda: str(rng.randint(0, 99)))
    answer = rng.choice(answers)
    return [{"prompt": _chat(rng) if chat else _text(rng), "answer": answer()} for _ in range(rng.randint(1, 6))]


def _lines(records: Records) -> bytes:
    return "".join(json.dumps(record, ensure_ascii="\\ud83d" in repr(record)) + "\n" for record in records).encode()


def _table(records: Records) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode("utf-8", "surrogatepass")


def _parquet(records: Records) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(records)), sink)
    return sink.getvalue()


def _arrow(records: Records) -> bytes:
    data, sink = pa.Table.from_pylist(list(records)), io.BytesIO()
    with pyarrow.ipc.new_stream(sink, data.schema) as writer:
        writer.write_table(data)
    return sink.getvalue()


WRITERS: Mapping[str, Callable[[Records], bytes]] = {
    ".jsonl": _lines,
    ".json": lambda records: json.dumps(list(records), indent=1).encode(),
    ".csv": _table,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
SQUEEZERS: Mapping[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}

INSERTS = (
    b"NaN", b"1e400", b"9" * 5000, b"[" * 3000, b"\xef\xbb\xbf", b"\xff\xfe", b"\xe9", b"\x00", b"\r", b"\n", b"\n\n",
    b'"', b",", b"{}", b"\\ud83d", b'"prompt": "again", ', b"null", b"\xed\xa0\x80", b"-", b"]", b"}",
)  # fmt: skip


def _replaced(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content) + 1)
    return content[:place] + rng.choice(INSERTS) + content[place + rng.randint(0, 3) :]


def _flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3) if content else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _doubled(content: bytes, rng: random.Random) -> bytes:
    first, last = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:last] + content[first:]


def _recoded(content: bytes, rng: random.Random) -> bytes:
    text = content.decode("utf-8", "replace")
    return text.encode(rng.choice(("latin-1", "utf-16", "utf-16-le", "utf-8-sig", "utf-32")), "replace")


MUTATIONS: Sequence[Callable[[bytes, random.Random], bytes]] = (
    lambda content, rng: content,
    lambda content, rng: content[: rng.randrange(len(content) + 1)],
    lambda content, rng: b"\xef\xbb\xbf" + content.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n"))),
    _replaced,
    _replaced,
    _flipped,
    _doubled,
    _recoded,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A file that somebody might bring."""

    name: str
    content: bytes
    answer: str


def made(count: int, seed: int) -> Iterator[Case]:
    """Files, a function of the arguments."""
    rng = random.Random(f"prompt files/{seed}")
    for number in range(count):
        ending, squeezed = rng.choice(list(WRITERS)), rng.choice([*SQUEEZERS, "", "", ""])
        records = _records(rng, chat=ending != ".csv" and rng.random() < 0.5)
        answer = "answer"
        if ending != ".csv" and rng.random() < 0.2:
            records = [{"prompt": r["prompt"], "reward_model": {"ground_truth": r["answer"]}} for r in records]
            answer = "reward_model.ground_truth"
        if rng.random() < 0.25:
            records[rng.randrange(len(records))][rng.choice(["prompt", "answer"])] = rng.choice(CELLS)
        try:
            content = WRITERS[ending](records)
        except (pa.ArrowException, ArithmeticError, TypeError, ValueError):  # a typed format cannot hold all of these
            ending, content = ".jsonl", _lines(records)
        place = rng.choice(("nowhere", "inside", "outside", "outside"))
        content = rng.choice(MUTATIONS)(content, rng) if place == "inside" else content
        content = SQUEEZERS[squeezed](content)
        content = rng.choice(MUTATIONS)(content, rng) if place == "outside" else content
        yield Case(name=f"{number}{ending}{squeezed}", content=content, answer=answer)


def independent(case: Case) -> list[Mapping[str, Any]]:
    """The file as the libraries read it that everybody uses, without any of our code."""
    content = case.content
    if case.name.endswith(".gz"):
        content = gzip.GzipFile(fileobj=io.BytesIO(content)).read()
    elif case.name.endswith(".bz2"):
        content = bz2.decompress(content)
    elif case.name.endswith(".xz"):
        content = lzma.decompress(content)
    if ".parquet" in case.name:
        return pq.read_table(io.BytesIO(content)).to_pylist()
    if ".arrow" in case.name:
        return pyarrow.ipc.open_stream(content).read_all().to_pylist()
    text = content.decode("utf-8-sig")
    if ".csv" in case.name:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    if ".jsonl" not in case.name and text.lstrip().startswith("["):
        return json.loads(text)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [json.loads(line) for line in lines if line.strip(" \t")]


def same(row: Row, record: Mapping[str, Any], answer: str) -> bool:
    """Whether a row says what its record says."""
    value: Any = record
    for name in answer.split("."):
        value = value[name]
    right = row.answer == value if isinstance(value, str) else _is_number(value) and float(row.answer) == value
    prompt = record["prompt"]
    if isinstance(prompt, str):
        return right and row.prompt == prompt
    return right and [_plain(m) for m in row.prompt] == [_plain(m) for m in prompt]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(message: Any) -> dict[str, Any]:
    """A message as the templates of chat models see it: parts are one text, and what is null is not there."""
    said = {key: value for key, value in message.items() if value is not None}
    if isinstance(said.get("content"), list):
        said["content"] = "".join(part["text"] for part in said["content"])
    return json.loads(
        json.dumps(said, sort_keys=True), object_hook=lambda o: {k: v for k, v in o.items() if v is not None}
    )


def verdict(case: Case, folder: Path, tokenizer: HuggingFaceTokenizer) -> str:
    """`understood`, `refused`, or what must not be: `rewritten`, `traceback`."""
    path = folder / case.name
    path.write_bytes(case.content)
    source = DatasetPrompts(
        path=str(path), prompts_per_step=2, answer_column=case.answer, task="shop", max_tokens=10**6
    )
    try:
        rows = read_rows(str(path), Columns(prompt="prompt", answer=case.answer))
        survey_all(source, Sources(tokenizer=tokenizer, rows=read_rows), tokenizer)
    except OpdError as error:
        said = str(error)
        return "refused" if said.isprintable() and case.name in said else f"unclear: {said!r}"
    except Exception:  # noqa: BLE001  what is counted here
        return f"traceback: {traceback.format_exc()}"
    finally:
        path.unlink()
    try:
        records = independent(case)
        return (
            "understood"
            if len(rows) == len(records) and all(map(same, rows, records, [case.answer] * len(rows)))
            else f"rewritten: {rows}"
        )
    except (
        ValueError,
        KeyError,
        TypeError,
        OSError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        csv.Error,
        RecursionError,
    ) as error:
        return f"rewritten: only we can read it ({error!r})"


def chat_tokenizer(folder: Path) -> HuggingFaceTokenizer:
    """The shop's tokenizer with a chat template."""
    shutil.copytree(ROOT / "assets" / "shop" / "student", folder / "student")
    (folder / "student" / "chat_template.jinja").write_text(TEMPLATE)
    return HuggingFaceTokenizer(str(folder / "student"))


def tried(count: int, seed: int) -> Iterator[tuple[Case, str]]:
    """Every case with its verdict."""
    with tempfile.TemporaryDirectory() as name:
        tokenizer = chat_tokenizer(Path(name))
        for case in made(count, seed):
            yield case, verdict(case, Path(name), tokenizer)


def main(arguments: list[str]) -> int:
    """Print the figures, and every case that is neither understood nor refused."""
    values = dict(argument.split("=") for argument in arguments)
    counts: Counter[str] = Counter()
    for case, said in tried(int(values.get("count", 2000)), int(values.get("seed", 0))):
        kind = said.partition(":")[0]
        counts[kind] += 1
        if kind not in ("understood", "refused"):
            print(f"{case.name} {case.content[:300]!r}\n{said}")
    figures = ", ".join(
        f"{counts[kind]} {kind}" for kind in ("understood", "refused", "traceback", "rewritten", "unclear")
    )
    print(f"prompt files: {counts.total()} tried, {figures}")
    return int(counts["understood"] + counts["refused"] < counts.total() or not counts["understood"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
