"""Memory of learner ranks while they start: reading the student, dividing it by ZeRO, the first sentinel.

    python benchmarks/learner_start.py [RANKS WIDTH LAYERS] [STAGE:DTYPE[:WHOLE] ...]

Makes a random Qwen3 (default: 8 layers of width 1024, 2 ranks) whose weights are stored in bfloat16, and starts ranks
with real DeepSpeed on CPUs, once for each ZeRO stage and dtype; with WHOLE each rank under ZeRO-3 reads the whole
student before DeepSpeed divides it, to compare with. `seconds` and `CPU` are of a start, the latter of all ranks
together. Other figures are MiB beyond a process that has imported its
libraries: `resident` is the peak of the resident set of the largest rank (pages of the file count, too, though the
system may take them back and ranks have them in common), `own` that of its memory that is no file's (Pss_Anon of
/proc/PID/smaps_rollup), `reading` the same until DeepSpeed makes its engine, `all` the peak of proportional set sizes
of all ranks together, in which shared pages count once, and `after` the largest rank's own memory once it has started.
"""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import environ, sysconf
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from learner.config import LearnerConfig, environment
from opd.settings.devices import Device, Dtype
from weight_sync.rendezvous import free_port, own_host

MIB = 2**20
LOOK_S = 0.01
ARMS = ("0:FLOAT32", "1:FLOAT32", "2:FLOAT32", "3:FLOAT32", "1:BFLOAT16", "2:BFLOAT16", "3:BFLOAT16")
FIELDS = ("Rss", "Pss", "Pss_Anon")
READY, READ, STARTED = "imported", "read", "started"


@dataclass(slots=True)
class Watch:
    """Largest sizes of processes since the watch began, in bytes beyond what they had then."""

    pids: Sequence[int]
    before: list[dict[str, int]] = field(default_factory=list)
    most: list[dict[str, int]] = field(default_factory=list)
    together: int = 0
    over: bool = False

    def look(self) -> list[dict[str, int]]:
        """Sizes now, and the largest so far brought up to date."""
        now = [sizes(pid) for pid in self.pids]
        self.before = self.before or now
        self.most = self.most or now
        self.most = [{key: max(a[key], b[key]) for key in FIELDS} for a, b in zip(self.most, now, strict=True)]
        self.together = max(self.together, sum(a["Pss"] - b["Pss"] for a, b in zip(now, self.before, strict=True)))
        return now

    def keep_looking(self) -> None:
        """Look until it is `over`."""
        while not self.over:
            self.look()
            sleep(LOOK_S)

    def beyond(self, held: Sequence[dict[str, int]], key: str) -> int:
        """Bytes of `key` in `held` beyond those at the beginning, of the process that has most."""
        return max(one[key] - first[key] for one, first in zip(held, self.before, strict=True))


def sizes(pid: int) -> dict[str, int]:
    """Sizes of a process in bytes, by field of its smaps_rollup."""
    lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]]
    found = {words[0].removesuffix(":"): int(words[1]) << 10 for words in lines}
    return {key: found[key] for key in FIELDS}


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time that processes have taken so far."""
    times = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in pids]
    return sum(int(one) for pair in times for one in pair) / sysconf("SC_CLK_TCK")


def model(folder: Path, width: int, layers: int) -> tuple[Path, int]:
    """A random student, and its number of parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    heads = {"num_attention_heads": max(2, width // 64), "num_key_value_heads": max(1, width // 128), "head_dim": 64}
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", **shape, **heads, vocab_size=16 * width, tie_word_embeddings=True)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder)
    return folder, sum(p.numel() for p in made.parameters())


def start(rank: int, ranks: int, arm: str, port: int, path: str) -> None:
    """One rank: import, wait for a line, start, wait for another."""
    import numpy as np

    from learner import engine, training
    from learner.learner import LearnerRank
    from learner.publishing import StagedSender

    stage, dtype, *whole = arm.split(":")
    if whole:
        training.starting_student = read_whole
    config = LearnerConfig(ranks=ranks, zero_stage=int(stage), dtype=Dtype[dtype], device=Device.CPU)  # type: ignore[arg-type]
    one = LearnerRank(  # pyright: ignore[reportAbstractUsage] (its class decorator writes the verbs)
        config, path, (), 1, 0, lambda handle: handle, lambda: StagedSender(np.copy)
    )
    initialize = engine.initialize

    def initialized(*given: Any) -> Any:
        _pause(READ)
        return initialize(*given)

    engine.initialize = initialized
    _pause(READY)
    one.setup(rank, ranks, own_host(), port)
    _pause(STARTED)
    one.close()


def read_whole(path: str, config: LearnerConfig, *given: Any) -> Any:
    """The student as ranks have it under other stages, whole."""
    from learner.starting import starting_student

    return starting_student(path, replace(config, zero_stage=2), *given)


def _pause(word: str) -> None:
    print(word, flush=True)
    sys.stdin.readline()


def measured(arm: str, ranks: int, path: Path) -> str:
    """The figures of a row."""
    port, variables = free_port(own_host()), environ | environment(Device.CPU)
    command = [sys.executable, "-m", "benchmarks.learner_start", "rank"]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), arm, str(port), str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        _await(started, READY)
        watch = Watch([one.pid for one in started])
        watch.look()
        watching = threading.Thread(target=watch.keep_looking)
        watching.start()
        began, used = perf_counter(), cpu_seconds(watch.pids)
        try:
            _tell(started)
            _await(started, READ)
            read = watch.beyond(watch.most, "Pss_Anon")
            _tell(started)
            _await(started, STARTED)
        finally:
            watch.over = True
            watching.join()
        seconds, used, end = perf_counter() - began, cpu_seconds(watch.pids) - used, watch.look()
        _tell(started)
        if any(one.wait(timeout=120) for one in started):
            raise SystemExit("a rank failed; what it said is above")
    finally:
        for one in started:
            one.kill()
    peaks = [watch.beyond(watch.most, key) for key in ("Rss", "Pss_Anon")]
    figures = (read, *peaks, watch.together, watch.beyond(end, "Pss_Anon"))
    return "  ".join(f"{each / MIB:8,.0f}" for each in figures) + f"{seconds:9.1f}{used:7.1f}"


def _await(started: Sequence["subprocess.Popen[str]"], word: str) -> None:
    for one in started:
        assert one.stdout is not None
        if not any(line.strip() == word for line in iter(one.stdout.readline, "")):
            raise SystemExit("a rank failed; what it said is above")


def _tell(started: Sequence["subprocess.Popen[str]"]) -> None:
    for one in started:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()


def main(arguments: Sequence[str]) -> None:
    """Print a row for each stage and dtype."""
    if arguments[:1] == ["rank"]:
        rank, ranks, arm, port, path = arguments[1:]
        start(int(rank), int(ranks), arm, int(port), path)
        return
    numbers = [int(one) for one in arguments if ":" not in one] or [2, 1024, 8]
    ranks, width, layers = numbers
    with tempfile.TemporaryDirectory() as folder:
        path, parameters = model(Path(folder), width, layers)
        print(f"{2 * parameters / MIB:,.0f} MiB of weights in bfloat16, {ranks} ranks; MiB beyond imports")
        print("ZeRO, dtype         reading  resident       own       all     after  seconds    CPU")
        for arm in [one for one in arguments if ":" in one] or ARMS:
            print(f"{arm:17}{measured(arm, ranks, path)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
