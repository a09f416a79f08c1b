"""What a user can get wrong, and the one sentence each mistake gets: what, where, what to do."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from launch.checkpoint.places import check_place
from launch.config.run_config import run_config
from launch.inputs.graders import MathGrader
from launch.inputs.prompt_files import read_rows
from launch.plan.checks.settings import text_notes
from launch.plan.plan import make_plan
from learner.config import LoraConfig
from opd.errors import OpdError
from opd.types.prompt_rows import Columns
from teacher_service.config import TOKEN_VARIABLE
from tests.command import ROOT, opd

SHOP = ROOT / "assets" / "shop"


def sentence(caught: pytest.ExceptionInfo[OpdError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def planned(*overrides: str) -> str:
    """The sentence that planning such a run ends with."""
    with pytest.raises(OpdError) as caught:
        make_plan(run_config(["experiment=shop", *overrides]))
    return sentence(caught)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A copy of the shipped teacher, to be spoilt."""
    return Path(shutil.copytree(SHOP / "teacher", tmp_path / "teacher"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_adapters_are_set_by_peft_s_names_and_what_they_cannot_do_is_refused() -> None:
    asked = ["experiment=shop", "learner.lora.r=8", "learner.lora.target_modules=[q_proj,v_proj]"]
    plan = make_plan(run_config(asked))
    assert plan.config.learner.lora == LoraConfig(r=8, target_modules=("q_proj", "v_proj"))
    assert plan.memory_bytes()["learner rank"] < make_plan(run_config(asked[:1])).memory_bytes()["learner rank"]
    assert run_config(["learner=lora"]).learner.lora.scale == 2.0
    assert re.search(r"learner\.lora\.rank=8: there is no setting.*learner\.lora\.r=8", planned("learner.lora.rank=8"))
    assert re.search(r"learner\.lora\.r needs a whole number", planned("learner.lora.r=many"))
    assert re.search(r"teacher 'default' follows .*lora\.r=8 only", planned("learner.lora.r=8", "teacher.mixup=0.5"))


SECOND = f"+teachers.judge.path={SHOP / 'teacher'}"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ((SECOND, "+teachers.judge.backend=OPENAI"), ("teachers.judge.backend=OPENAI needs teachers.judge.url=",)),
        (
            (SECOND, "+teachers.judge.mixup=0.5", "+teachers.judge.backend=VLLM"),
            ("teachers.judge.mixup=0.5 makes", "set teachers.judge.backend=TORCH or teachers.judge.mixup=0"),
        ),
        (("teacher.backend=HTTP",), ("teacher.backend=HTTP needs teacher.url=",)),
        (
            ("evaluation_sets=[shop_cool]", "evaluation.sets.shop_cool.temperature=0"),
            ("evaluation.sets.shop_cool.samples is 4", "set evaluation.sets.shop_cool.samples=1"),
        ),
        (
            ("evaluation=dataset", "evaluation.prompts.path=held.jsonl", "evaluation.prompts.teacher_template=ask"),
            ("evaluation.prompts.teacher_template needs {prompt}",),
        ),
        (("method.rollout.record_topk=4", "method.rollout.top_p=0.9"), ("set method.rollout.top_p=1",)),
        (
            ("experiment=two_teachers", "method=ensemble_reverse_kl", "+method.scorer.contexts.dfault=STUDENT"),
            ("method.scorer.contexts",),
        ),
    ],
)
def test_what_fields_do_not_make_together_is_said_of_the_fields_where_they_stand(
    overrides: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    """A class checks fields against each other and does not know where it stands; its advice must be an override."""
    found = planned(*overrides)
    assert all(part in found for part in parts), found
    assert not re.search(r"TeacherConfig|EvaluationSet", found)


def test_a_term_that_is_named_like_a_teacher_is_refused() -> None:
    """Their metrics would have the same names."""
    second = f"teachers.start.path={SHOP / 'student'}"
    parts = [
        "scorer._target_=opd.scorers.teacher.TeacherHidden",
        "objective._target_=opd.objectives.vocabulary.FullReverseKL",
    ]
    terms = {name: [f"+method.terms.{name}.{part}" for part in parts] for name in ("start", "default", "anchor")}
    for name in ("start", "default"):
        assert re.search(rf"terms\.{name} needs a name .*teacher '{name}' has it; name", planned(second, *terms[name]))
    assert make_plan(run_config(["experiment=shop", *terms["anchor"]]))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_missing_checkpoint_is_named(role: str) -> None:
    assert re.search(rf"{role}.*no_such_folder", planned(f"{role}.path=no_such_folder"))


def test_a_foreign_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert "config.json" in planned(f"teacher.path={tmp_path}")


def test_a_checkpoint_without_safetensors_is_refused(teacher: Path) -> None:
    (teacher / "model.safetensors").unlink()
    assert "safetensors" in planned(f"teacher.path={teacher}")


def test_a_checkpoint_that_wants_to_run_code_is_refused(teacher: Path) -> None:
    edit(teacher / "config.json", auto_map={"AutoModel": "evil.Model"})
    assert "code" in planned(f"teacher.path={teacher}")


def test_a_tokenizer_mismatch_prints_the_first_difference(teacher: Path) -> None:
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["ok"], vocabulary["no"] = vocabulary["no"], vocabulary["ok"]
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert re.search(r"'no'|'ok'", planned(f"teacher.path={teacher}"))


def pad_vocabulary(folder: Path, rows: int) -> None:
    """The same model with more (never used) rows in its embedding, as some families pad theirs."""
    tensors = load_file(str(folder / "model.safetensors")) if _loadable(folder) else _as_float32(folder)
    name = "model.embed_tokens.weight"
    extra = np.zeros((rows, tensors[name].shape[1]), dtype=tensors[name].dtype)
    tensors[name] = np.concatenate([tensors[name], extra])
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    edit(folder / "config.json", vocab_size=len(tensors[name]))


def _loadable(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text()).get("dtype") == "float32"


def _as_float32(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file as load_torch

    return {k: v.float().numpy() for k, v in load_torch(str(folder / "model.safetensors")).items()}


def test_a_differently_padded_teacher_is_refused_for_full_vocabularies_only(teacher: Path) -> None:
    pad_vocabulary(teacher, 32)
    assert re.search(r"padded differently.*topk_reverse_kl", planned(f"teacher.path={teacher}"))
    plan = make_plan(run_config(["experiment=shop", "method=topk_reverse_kl", f"teacher.path={teacher}"]))
    assert not plan.exact_kl


def test_a_teacher_that_cannot_stand_inside_the_student_s_engine_is_refused(teacher: Path) -> None:
    url = ("teacher.backend=HTTP", "teacher.url=http://127.0.0.1:9")
    start = f"teachers.start.path={SHOP / 'student'}"
    for overrides, reason in (
        (url, r"weights beside the student's, but teacher\.backend=HTTP is a server elsewhere; choose TORCH or VLLM"),
        ((start,), r"holds a single teacher, but this may be any of \['default', 'start'\]; set .*teacher=default"),
        (("method.rollout.teacher=other",), r"holds teacher 'other', but the run has \['default'\]; name one of tho"),
        (("teacher.mixup=0.5",), r"a teacher that stays as it is, but teacher\.mixup=0\.5 lets it follow"),
    ):
        assert re.search(rf"method trb writes blends .*{reason}", planned("method=trb", *overrides)), overrides
    pad_vocabulary(teacher, 32)
    padded = r"equal vocabularies of logits, but the student's output has 64 rows and the teacher's 96 \(padded"
    assert re.search(padded, planned("method=trb", f"teacher.path={teacher}"))
    assert make_plan(run_config(["experiment=shop", "method=trb", "method.rollout.budget=0.0", *url])), "asks for none"
    plan, plain = (make_plan(run_config(["experiment=shop", f"method={m}"])) for m in ("trb", "many_faces"))
    more = plan.memory_bytes()["rollout actor"] - plain.memory_bytes()["rollout actor"]
    assert more == 4 * plan.teacher_params["default"], "the engine holds both"


def test_prompts_that_the_teacher_reads_otherwise_are_refused_for_blends(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "has 2 1 ; Mon buys 4 ?", "answer": "6"}) + "\n")
    files = ["prompts=dataset", f"prompts.path={rows}", "prompts.prompt_column=question", "prompts.prompts_per_step=1"]
    told = [*files, "prompts.answer_column=answer", "prompts.task=shop", "prompts.teacher_template='{prompt} {answer}'"]
    found = planned("method=trb", *told)
    assert re.search(
        r"trb needs prompts that student and teacher read alike.*rows\.jsonl line 1 they differ; le", found
    )


def test_a_prompt_longer_than_the_context_is_named() -> None:
    assert re.search(r"prompt 'shop/\d+/\d+' has \d+ tokens.*max_model_len", planned("student.max_model_len=90"))


def test_a_microbatch_shorter_than_a_sequence_is_refused() -> None:
    assert "learner.tokens_per_microbatch" in planned("learner.tokens_per_microbatch=50")


def test_an_unknown_grader_is_named(tmp_path: Path) -> None:
    rows = tmp_path / "p.jsonl"
    rows.write_text('{"prompt": "has 3 7 ; ?"}\n')
    assert "'chess'" in planned("prompts=dataset", f"prompts.path={rows}", "prompts.task=chess")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{broken", r"line 2 is no JSON"),
        ('["list"]', r"line 2 is no JSON object"),
        ('{"text": "x"}', r"line 2 has no column 'prompt'.*prompt_column"),
        ('{"prompt": "  ", "answer": 1}', r"line 2 has an empty prompt"),
        ('{"prompt": [{"role": "user"}], "answer": 1}', r"line 2: 'prompt' must be text or a list of messages"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(line: str, says: str, tmp_path: Path) -> None:
    rows = tmp_path / "p.jsonl"
    rows.write_text('{"prompt": "fine", "answer": "1"}\n' + line + "\n")
    with pytest.raises(OpdError) as caught:
        read_rows(str(rows), Columns(prompt="prompt", answer="answer"))
    assert re.search(says, sentence(caught))


def test_other_bad_prompt_files(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "prompts.csv").write_text("a,b")
    for name, says in {"nothing.jsonl": "does not exist", "empty.jsonl": "no rows", "prompts.csv": "no rows"}.items():
        with pytest.raises(OpdError) as caught:
            read_rows(str(tmp_path / name), Columns(prompt="prompt"))
        assert says in sentence(caught)


def test_parquet_datasets_and_chat_rows_are_read_alike(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    chat = [{"role": "user", "content": "2+2?"}]
    records = [{"messages": chat, "answer": "4"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(records[0]) + "\n")
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    Dataset.from_list(records).save_to_disk(str(tmp_path / "a"))
    read = [
        read_rows(str(tmp_path / name), Columns(prompt="messages", answer="answer"))
        for name in ("a.jsonl", "a.parquet", "a")
    ]
    assert read[0] == read[1] == read[2]
    assert read[0][0].answer == "4" and read[0][0].prompt == tuple(chat)


def test_a_run_s_folder_is_one_of_this_machine(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nothing")
    for output_dir, says in (("s3://bucket/runs", "address of a store"), (str(link), "a link to nothing")):
        with pytest.raises(OpdError, match=says) as caught:
            check_place(run_config(["experiment=shop", f"output_dir={output_dir}"]))
        sentence(caught)


def test_wandb_online_without_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from launch.monitors.trackers import check_login

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(OpdError) as caught:
        check_login(run_config(["tracker=wandb"]).tracker)
    assert "wandb login" in sentence(caught)


def test_a_pathological_expression_costs_its_own_reward_only() -> None:
    grader = MathGrader(deadline_s=3.0)

    async def grade() -> list[float]:
        completions = ["so the answer is 18", "9" + "^9" * 12, "I think it is $\\frac{36}{2}$"]
        return await grader.grade(completions, ["work #### 18"] * 3)

    try:
        assert asyncio.run(grade()) == [1.0, 0.0, 1.0]
    finally:
        grader.close()


def _endless(completion: str, answer: str) -> float:
    """In the place of math-verify, in a child process."""
    if completion == "endless":
        time.sleep(600)
    return float(completion == answer)


def test_groups_that_are_graded_at_once_cost_each_other_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All wait for one child process: neither its start, nor another's deadline, nor its end is theirs."""
    monkeypatch.setattr("launch.inputs.graders.verify_math", _endless)
    grader = MathGrader(deadline_s=2.0)

    async def grade() -> list[list[float]]:
        groups = [["18", "endless"], ["18", "17"], ["17", "18"]]
        return await asyncio.gather(*[grader.grade(group, ["18"] * 2) for group in groups])

    try:
        assert asyncio.run(grade()) == [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    finally:
        grader.close()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["trian"], 2, "there is no command 'trian'"),
        (["train", "stepz=3"], 2, "did you mean 'steps'"),
        (["export", "run=nowhere", "output=x"], 2, "no run directory"),
        (["submit", "train"], 2, "address="),
        (["env", "x"], 2, "takes no arguments"),
        (["eval", "checkpoint=nowhere"], 2, "nowhere"),
        (["eval", "evaluation=none"], 2, "no model was named, so this measures the embedded demo's student"),
        (["eval", "output=nowhere/found.json"], 2, "opd eval writes a file, but output=nowhere/found.json lies in a"),
        (["doctor", "output=nowhere/found.json"], 2, "opd doctor writes a file, but output=nowhere/found.json lies"),
        (["doctor", f"output={ROOT}"], 2, f"output={ROOT} is a folder; name another"),
        (["serve-teacher", "teacher=shop", "steps=3"], 2, "of teacher.*, and steps is no setting of it; leave it out"),
        (["serve-teacher", "teachers.b.path=x"], 2, "of teacher.*, and teachers.b.path is no setting of it"),
    ],
)
def test_the_program_exits_non_zero_with_one_sentence(arguments: list[str], code: int, says: str) -> None:
    done = opd(*arguments)
    assert done.returncode == code, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr


def test_a_dry_run_of_another_verb_starts_nothing_either() -> None:
    examined = opd("doctor", "experiment=shop", "dry_run=true")
    assert examined.returncode == 0 and "rollout actor" in examined.stdout and "checks" not in examined.stdout
    assert "no model was named" not in examined.stderr
    assert "demo's teacher" in opd("doctor", "dry_run=true").stderr


def test_a_teacher_is_not_loaded_for_a_place_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "t" * 40)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        served = ["serve-teacher", "teacher=shop", f"port={taken.getsockname()[1]}"]
        assert "choose another host= or port=" in opd(*served).stderr
        assert "choose another host= or port=" in opd(*served, "dry_run=true").stderr
    free = opd(*served, "dry_run=true")
    assert free.returncode == 0 and "would be served at 127.0.0.1:" in free.stdout


UNSEEN = st.text(st.characters(categories=["L", "Nd", "Cc", "Cf", "Zl", "Zp", "Po"]), min_size=1, max_size=8)
PLACES = [
    "{}", "train {}", "train {}=1", "train +{}=1", "train prompts={}", "train student.path={} dry_run=true",
    "train resume={} dry_run=true", "train conf={}", "train --{}", "train --show {}", "submit {}", "certify {}",
    "train prompts.path={} dry_run=true", "train method.objective._target_={} dry_run=true", "export run={}",
    "export run=x step={}", "serve-teacher {}", "serve-teacher port={}",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@given(hostile=UNSEEN.filter(lambda text: "\0" not in text and not text.isprintable()))
@settings(max_examples=2, deadline=None)
def test_whatever_a_command_line_holds_the_sentence_is_one_line_and_moves_no_cursor(place: str, hostile: str) -> None:
    done = opd(*(word.replace("{}", hostile) for word in place.split()))
    sentence = done.stderr.removesuffix("\n")
    assert done.returncode == 2 and not done.stdout
    assert {unicodedata.category(one) for one in sentence}.isdisjoint({"Cc", "Cf", "Zl", "Zp"}), repr(sentence)


def test_a_message_stays_readable_however_long_what_it_repeats_is() -> None:
    said = str(OpdError(f"prompts.path={'x' * 100_000} does not exist; set it to a file"))
    assert (
        len(said) < 1500 and said.startswith("prompts.path=xx") and said.endswith("x does not exist; set it to a file")
    )
    assert "characters left out" in said and str(OpdError("x" * 1400)) == "x" * 1400


def test_so_it_does_as_a_program_of_its_own() -> None:
    command = [sys.executable, "-m", "launch.cli", "trian"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "there is no command 'trian'" in done.stderr and "Traceback" not in done.stderr


def test_an_option_of_ones_own_called_like_ours_is_refused(tmp_path: Path) -> None:
    """Hydra would take ours, whatever stands in the other file."""
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "gkd.yaml").write_text("name: mine\n")
    with pytest.raises(OpdError, match=r"gkd\.yaml is called like an option of the project, method=gkd"):
        run_config([f"conf={tmp_path}", "method=gkd"])


@pytest.mark.parametrize(("written", "noted"), [(r"Q:\n", True), ("Q:\n", False), (r"C:\temp", False)])
def test_a_backslash_and_an_n_is_told_from_a_line_end(written: str, noted: bool) -> None:
    own = ["prompts=dataset", "prompts.path=x", "evaluation=dataset", "evaluation.prompts.path=y"]
    config = run_config([*own, f"prompts.suffix={written}"])
    assert getattr(config.prompts, "suffix", "") == written  # never rewritten
    assert any("prompts.suffix has a backslash and an n" in note for note in text_notes(config)) == noted
