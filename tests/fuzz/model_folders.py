"""`python -m tests.fuzz.model_folders [count=300] [seed=0]`: damaged and contradictory model folders, planned.

Each is the demo's student or teacher with one thing changed, given as student or as teacher. It has to be refused with
one sentence; what changes nothing that is read may be planned. Exits with 1 at a traceback, at a sentence of two lines,
or if a contradiction is planned.
"""

import json
import random
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from launch.config.run_config import run_config
from launch.plan.plan import make_plan
from opd.errors import OpdError

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "shop"
WEIGHTS = "model.safetensors"
Change = Callable[[Path, random.Random], None]
HOSTILE: Sequence[Any] = (None, -1, 0, 3, 65, 10**12, 1.5, float("nan"), "x", "", [], [1], {}, {"a": 1}, "float8")
WRONG_SIZES = (0, 1, 7, 64, 97, 10**6, -4, 2.5, "96", None, [96], {})
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _text(name: str, *texts: str) -> Change:
    def change(folder: Path, rng: random.Random) -> None:
        (folder / name).write_text(rng.choice(texts))

    return change


def _field(name: str, *values: Any) -> Change:
    def change(folder: Path, rng: random.Random) -> None:
        said = json.loads((folder / "config.json").read_text())
        value = rng.choice([v for v in values if v != said.get(name)])
        (folder / "config.json").write_text(json.dumps(said | {name: value}))

    return change


def _without(name: str) -> Change:
    def change(folder: Path, _: random.Random) -> None:
        said = json.loads((folder / "config.json").read_text())
        del said[name]
        (folder / "config.json").write_text(json.dumps(said))

    return change


def _bytes(name: str, make: Callable[[bytes, random.Random], bytes]) -> Change:
    def change(folder: Path, rng: random.Random) -> None:
        (folder / name).write_bytes(make((folder / name).read_bytes(), rng))

    return change


def _tensors(make: Callable[[dict[str, torch.Tensor], random.Random], None]) -> Change:
    def change(folder: Path, rng: random.Random) -> None:
        tensors = load_file(folder / WEIGHTS)
        make(tensors, rng)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def _lose(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    del tensors[rng.choice(sorted(tensors))]


def _rename(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    tensors[f"{name}.moved"] = tensors.pop(name)


def _add(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    tensors[f"model.layers.{rng.randint(50, 99)}.mlp.up_proj.weight"] = torch.zeros(4, 4)


def _reshape(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    tensors[name] = torch.zeros(*tensors[name].shape, 2)


def _elsewhere(folder: Path, rng: random.Random) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(rng.choice(["/nowhere", "/dev", str(folder / "config.json")]))


def _directory(folder: Path, _: random.Random) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def _shards(folder: Path, rng: random.Random) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    maps = (
        {"a": "model-00002-of-00002.safetensors"},
        {"a": "../x"},
        {"a": 3},
        {},
        None,
        {"a": "model-00001-of-00002.safetensors"},
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": rng.choice(maps)}))


def _adapter(folder: Path, _: random.Random) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def _only_bin(folder: Path, _: random.Random) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def _lose_file(name: str) -> Change:
    return lambda folder, _: (folder / name).unlink()


def _header(raw: bytes, rng: random.Random) -> bytes:
    length = struct.unpack("<Q", raw[:8])[0]
    said = json.loads(raw[8 : 8 + length])
    name = rng.choice([n for n in said if n != "__metadata__"])
    said[name] |= rng.choice(
        [{"shape": [3]}, {"data_offsets": [0, 1]}, {"shape": "x"}, {"data_offsets": None}, {"dtype": "F64"}]
    )
    text = json.dumps(said).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


DEEP = "[" * 100_000
# What must be refused, whatever is drawn.
REFUSED: dict[str, Change] = {
    "config: no JSON": _text("config.json", "", "{", "3", "null", "[]", '"x"', DEEP, "9" * 5000),
    "config: no UTF-8": _bytes("config.json", lambda raw, _: b"\xff\xfe" + raw),
    "config: cut": _bytes("config.json", lambda raw, rng: raw[: rng.randint(0, len(raw) - 3)]),
    "config: model_type": _field("model_type", "nope", 5, None, "bert2", "t5", "clip", [], {}),
    "config: auto_map": _field("auto_map", {"AutoModel": "m.M"}),
    "config: hidden_size": _field("hidden_size", *WRONG_SIZES),
    "config: intermediate_size": _field("intermediate_size", *WRONG_SIZES),
    "config: layers": _field("num_hidden_layers", *WRONG_SIZES[:-3], 10**9),
    "config: vocab_size": _field("vocab_size", *WRONG_SIZES),
    "config: no vocab_size": _without("vocab_size"),
    "config: no hidden_size": _without("hidden_size"),
    "config: dtype": _field("torch_dtype", "float8", 3, "nope", [], {"a": 1}),
    "config: positions": _field("max_position_embeddings", 1, 16, "x"),
    "config: other family": _field("model_type", "gpt2", "gemma2", "mamba", "qwen3_next", "bloom"),
    "config: eos": _field("eos_token_id", "x", [1, "a"], 1.5, {}),
    "config: text_config": _field("text_config", 3, "x", [1]),
    "config: activation": _field("hidden_act", "nope", 3, []),
    "weights: cut": _bytes(WEIGHTS, lambda raw, rng: raw[: rng.randint(0, len(raw) - 1)]),
    "weights: longer": _bytes(WEIGHTS, lambda raw, _: raw + b"\0" * 9),
    "weights: noise": _bytes(WEIGHTS, lambda raw, rng: rng.randbytes(rng.randint(0, 4000))),
    "weights: pickle": _bytes(WEIGHTS, lambda _, rng: rng.choice([b"PK\3\4", b"\x80\4"]) + rng.randbytes(64)),
    "weights: header": _bytes(WEIGHTS, _header),
    "weights: header of lists": _bytes(WEIGHTS, lambda raw, _: struct.pack("<Q", 2) + b"[]"),
    "weights: deep header": _bytes(WEIGHTS, lambda raw, _: struct.pack("<Q", len(DEEP)) + DEEP.encode()),
    "weights: elsewhere": _elsewhere,
    "weights: a folder": _directory,
    "weights: shards": _shards,
    "weights: only a .bin": _only_bin,
    "weights: a tensor lost": _tensors(_lose),
    "weights: a tensor renamed": _tensors(_rename),
    "weights: a tensor too many": _tensors(_add),
    "weights: another shape": _tensors(_reshape),
    "an adapter": _adapter,
    "no config": _lose_file("config.json"),
    "no weights": _lose_file(WEIGHTS),
    "no tokenizer": _lose_file("tokenizer.json"),
    "tokenizer: damaged": _text("tokenizer.json", "", "{}", "3", "null", "[", DEEP, '{"model": 3}'),
    "tokenizer: cut": _bytes("tokenizer.json", lambda raw, rng: raw[: rng.randint(0, len(raw) - 2)]),
    "tokenizer_config: damaged": _text("tokenizer_config.json", "", "3", "null", "[]", DEEP),
    "generation_config: damaged": _text("generation_config.json", "", "3", "null", "[]", DEEP, '{"eos_token_id": "x"}'),
}  # fmt: skip


def _some_field(folder: Path, rng: random.Random) -> None:
    said = json.loads((folder / "config.json").read_text())
    _field(rng.choice(sorted(said)), *HOSTILE)(folder, rng)


def _some_byte(folder: Path, rng: random.Random) -> None:
    file = rng.choice(sorted(f for f in folder.iterdir() if f.suffix == ".json"))
    raw = bytearray(file.read_bytes())
    raw[rng.randrange(len(raw))] = rng.randrange(256)
    file.write_bytes(raw)


# What may be harmless; then it is planned, and never a traceback.
EITHER: dict[str, Change] = {"any field of config.json": _some_field, "any byte of a JSON file": _some_byte}


def tried(kind: str, role: str, seed: int) -> str:
    """What became of a folder changed so: "refused", "planned", or what is wrong."""
    rng = random.Random(f"{kind} {role} {seed}")
    with TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(ASSETS / role, Path(temporary) / role))
        (REFUSED | EITHER)[kind](folder, rng)
        try:
            make_plan(run_config(["experiment=shop", "method=topk_reverse_kl", f"{role}.path={folder}"]))
        except OpdError as error:
            return "refused" if "\n" not in str(error) else f"two lines: {error}"
        except Exception as error:  # noqa: BLE001 (that there is none of any type is what is tried)
            return f"traceback: {type(error).__name__}: {error}"
    return "a contradiction is planned" if kind in REFUSED else "planned"


def main(arguments: Sequence[str]) -> int:
    """Try `count` folders."""
    given = dict(argument.split("=") for argument in arguments)
    count, seed = int(given.get("count", 300)), int(given.get("seed", 0))
    kinds = [*REFUSED, *EITHER, *EITHER, *EITHER]
    outcomes: Counter[str] = Counter()
    for i in range(count):
        kind, role = kinds[i // 2 % len(kinds)], ("student", "teacher")[i % 2]
        outcome = tried(kind, role, seed * count + i)
        if outcome not in ("refused", "planned"):
            print(f"{kind}, as {role}, {seed * count + i}: {outcome}"[:400], flush=True)
        outcomes[outcome.split(":")[0]] += 1
    bad = sum(outcomes.values()) - outcomes["refused"] - outcomes["planned"]
    print(
        f"{count} folders: {outcomes['refused']} refused with one sentence, {outcomes['planned']} planned (harmless), "
        f"{outcomes['traceback']} tracebacks, {outcomes['a contradiction is planned']} contradictions planned, "
        f"{outcomes['two lines']} of two lines"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
