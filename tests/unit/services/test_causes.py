"""Whatever Ray wraps around what an actor raised, a user reads the cause's own class and words."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from actors.engine_thread import EngineStopped
from launch.services.failure_causes import brief, causes, find_own, one_line, vanished
from opd.errors import DataError, OpdError

REPR = "<actors.engine.VLLMEngine object at 0x7f>"
FRAME = '  File "/somewhere/actors/engine.py", line 103, in generate\n    raise error\n'


def task_error(cause: Exception) -> RayTaskError:
    """What Ray makes of an error in an actor."""
    text = f"Traceback (most recent call last):\n{FRAME}{type(cause).__module__}.{type(cause).__name__}: {cause}"
    return RayTaskError("generate", text, cause, "ray::VLLMEngine.generate", 1579, "10.0.0.1", REPR, "f00d")


def raised_in_an_actor(cause: Exception) -> Exception:
    """As the caller of an actor's method gets it."""
    return task_error(cause).as_instanceof_cause()


def grouped(error: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("unhandled errors in a TaskGroup", [error])


def is_clean(text: str) -> bool:
    return not any(
        part in text for part in ("\x1b", "ray::", "pid=", "repr=", "Traceback", "File ", "\n", "RayTaskError")
    )


STOPPED = EngineStopped(
    "the student engine stopped (RuntimeError: Unsupported CPU attention configuration: head_dim=16 isa=2 "
    "kv_cache_idx=0); see its log, and start a new one"
)


@pytest.mark.parametrize("wrap", [raised_in_an_actor, grouped, lambda e: grouped(raised_in_an_actor(e)),
                                  lambda e: raised_in_an_actor(raised_in_an_actor(e)),
                                  lambda e: grouped(grouped(raised_in_an_actor(e)))])  # fmt: skip
def test_the_cause_of_a_dying_engine_is_said(wrap: Callable[[Exception], Exception]) -> None:
    assert "\x1b[36m" in str(raised_in_an_actor(STOPPED)), "Ray's header is what this is about"
    assert brief(wrap(STOPPED)) == f"EngineStopped: {STOPPED}"
    assert find_own(wrap(STOPPED)) is not None and str(find_own(wrap(STOPPED))) == str(STOPPED)


def test_only_the_first_line_of_a_foreign_cause() -> None:
    cause = RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported\nCompile with")
    assert brief(raised_in_an_actor(cause)) == "RuntimeError: CUDA error: out of memory"
    assert brief(ValueError("")) == "ValueError"


def test_a_constructor_that_raised() -> None:
    died = ActorDiedError(task_error(ValueError("hidden_size must be an int")))
    assert "creation task" in str(died) and not vanished(died)
    assert brief(died) == "ValueError: hidden_size must be an int"


def test_a_process_that_ended_without_a_word() -> None:
    text = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: VLLMEngine\n\tactor_id: f00d\n"
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: ..."
    )
    died = ActorDiedError()
    died.error_msg = text
    assert vanished(died)
    assert brief(died) == "ActorDiedError: The actor died unexpectedly before finishing this task."


def test_a_cause_that_cannot_be_pickled_is_told_as_text() -> None:
    class Odd(Exception):
        def __reduce__(self) -> str:
            raise TypeError("cannot pickle")

    error = RayTaskError("f", f"Traceback (most recent call last):\n{FRAME}odd.OddError: no such kernel", Odd("x"))
    assert isinstance(error.cause, RayError)
    assert brief(error) == "OddError: no such kernel"


def test_a_sentence_that_quotes_a_whole_error_loses_all_but_what_was_raised() -> None:
    begin = "rollout actor 0 gave an invalid answer and is replaced:"
    quoted = f"{begin} {raised_in_an_actor(DataError('the gap is 0.1 nats'))}"
    assert one_line(quoted) == f"{begin} DataError: the gap is 0.1 nats"


WORDS = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=60).filter(
    lambda text: "ray::" not in text and text.strip() and "RayTask" not in text and "File " not in text
)


@given(WORDS, st.sampled_from([ValueError, RuntimeError, KeyError, OSError, DataError, OpdError, EngineStopped]),
       st.lists(st.sampled_from([raised_in_an_actor, grouped]), max_size=4))  # fmt: skip
def test_however_deep_it_is_the_class_and_the_words_are_there(
    words: str, kind: type[Exception], wrappers: list[Callable[[Exception], Exception]]
) -> None:
    cause = kind(words)
    error: Exception = cause
    for wrap in wrappers:
        error = wrap(error)
    said = brief(error)
    assert said == f"{kind.__name__}: {' '.join(str(cause).split())}"
    assert is_clean(said.replace(words, ""))
    assert cause in list(causes(error))
    assert (find_own(error) is cause) == isinstance(cause, OpdError)
