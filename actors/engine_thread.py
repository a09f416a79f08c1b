"""The thread that owns the vLLM engine: every access to it is a job that runs there, between two engine steps.

So requests of concurrent calls share one batch, an update never meets a running step, and no lock is needed.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar, cast

from opd.errors import OpdError, ServiceLost

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

Result = TypeVar("Result")
JOIN_S = 30.0  # what a step in progress may still take when the engine is closed
BUDGET = "opd_budget"  # in `extra_args` of requests that sample from a blend
FIRST = -1  # the priority of what need not wait for its turn


class EngineStopped(ServiceLost):
    """Error of requests to an engine that is gone; only a new process can serve again."""


@dataclass(slots=True, eq=False)
class Call:
    """Requests of one `generate` call. Their completions go to `deliver` in parts of at least `part`, with the position
    of each; `future` is done when all have.
    """

    deliver: "Callable[[list[tuple[int, RequestOutput]]], None]"
    part: int
    future: "Future[None]" = field(default_factory=Future)
    finished: "list[tuple[int, RequestOutput]]" = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    missing: int = 0

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # the waiter may leave; the thread still answers


class EngineLoop:
    """State that jobs receive: the engine and the calls it is working on. Used on the engine's thread alone."""

    def __init__(self, engine: "LLMEngine") -> None:
        self.engine = engine
        self.busy_s = 0.0
        self.requests = self.tokens = self.steps = 0
        self._calls: dict[str, tuple[Call, int]] = {}
        self._held: list[RequestOutput] = []
        self._number = 0

    def admit(self, call: Call, requests: "Sequence[tuple[list[int], SamplingParams]]") -> None:
        """Add all requests of a call, in order, in one go; if one is refused by vLLM, none stays."""
        call.missing = len(requests)
        try:
            for slot, (ids, params) in enumerate(requests):
                name = self._add(ids, params)
                call.ids.append(name)
                self._calls[name] = (call, slot)
        except Exception:
            self.abort(call)
            raise

    def _add(self, ids: list[int], params: "SamplingParams", priority: int = 0) -> str:
        self._number += 1
        name = str(self._number)
        # Among requests of one priority vLLM goes by the time of arrival, and clocks may stand still.
        arrival = float(self._number)
        prompt: Any = {"type": "token", "prompt_token_ids": ids}
        if priority == FIRST:  # a prompt of the run: requests after it must not go on from its cache
            prompt["cache_salt"] = "sentinel"
        elif params.extra_args and BUDGET in params.extra_args:  # blocks of others may lack the teacher's part
            prompt["cache_salt"] = "blend"
        self.engine.add_request(name, prompt, params, arrival_time=arrival, priority=priority)
        return name

    def abort(self, call: Call) -> None:
        """Drop unfinished requests of a call that was abandoned."""
        alive = [name for name in call.ids if self._calls.pop(name, None)]
        if alive:
            self.engine.abort_request(alive)

    def fail(self, error: OpdError) -> None:
        """End every call with `error`; no completion of theirs is delivered."""
        calls = {id(call): call for call, _ in self._calls.values()}
        self._held.clear()
        for call in calls.values():
            self.abort(call)
            call.future.set_exception(error)

    def step(self) -> None:
        """Run one engine step (a token for every running request), and collect finished requests."""
        self._deliver(self._step())

    def _step(self) -> "list[RequestOutput]":
        start = perf_counter()
        try:
            outputs: Any = self.engine.step()
        except Exception as error:
            raise EngineStopped(f"{type(error).__name__}: {error}") from error
        self.busy_s += perf_counter() - start
        self.steps += 1
        return outputs

    def _deliver(self, outputs: "Sequence[RequestOutput]") -> None:
        for output in outputs:
            call, slot = self._calls.pop(output.request_id, (None, 0))  # FINAL_ONLY: every output is the last
            if call is None:
                continue
            call.finished.append((slot, output))
            self.requests += 1
            self.tokens += len(output.outputs[0].token_ids)
            call.missing -= 1
            if not call.missing or len(call.finished) >= call.part:
                part, call.finished = call.finished, []
                call.deliver(part)
            if not call.missing:
                call.future.set_result(None)

    def finish(self, ids: list[int], params: "SamplingParams") -> "RequestOutput":
        """Run one request to its end, before all that wait. Others go on, but their completions are held back until
        `release`.
        """
        mine = self._add(ids, params, FIRST)
        while True:
            outputs = self._step()
            self._held += [o for o in outputs if o.request_id != mine]
            for output in outputs:
                if output.request_id == mine and output.finished:
                    return output

    def drain(self) -> None:
        """Finish the steps that are in the air, if vLLM schedules ahead of them, and begin none.

        vLLM labels tokens when it collects them, so weights that come in between would be named for what the ones
        before them wrote. Completions are held back as in `finish`.
        """
        from vllm.v1.core.sched.interface import PauseState

        core = cast(Any, self.engine.engine_core).engine_core  # in this process
        if not core.batch_queue:  # there is none, or it is empty
            return
        core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        try:
            for _ in range(len(core.batch_queue)):  # a step adds an empty batch and collects the oldest
                self._held += self._step()
        finally:
            core.scheduler.set_pause_state(PauseState.UNPAUSED)

    def release(self) -> None:
        """Deliver the completions that `finish` held back."""
        held, self._held = self._held, []
        self._deliver(held)


class EngineThread:
    """Owner of the engine's thread; feeds it jobs. If the thread ends, every pending call fails."""

    def __init__(self, build: "Callable[[], LLMEngine]") -> None:
        self.started: Future[None] = Future()
        self.started.set_running_or_notify_cancel()
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[EngineLoop], Any]] | None] = queue.SimpleQueue()
        self._open: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._end: EngineStopped | None = None
        self._thread = threading.Thread(target=self._main, args=(build,), name="vllm-engine", daemon=True)
        self._thread.start()

    def run(self, job: Callable[[EngineLoop], Result]) -> Future[Result]:
        """`job`'s result, computed between two steps. Fails at once if the engine is gone."""
        future: Future[Result] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._end is not None:
                raise self._end
            self._watch(future)
            self._jobs.put((future, job))
        return future

    def watch(self, future: Future[Any]) -> None:
        """Fail `future` with the engine, should it end before the future is done."""
        with self._lock:
            if self._end is not None:
                raise self._end
            self._watch(future)

    def _watch(self, future: Future[Any]) -> None:
        self._open.add(future)
        future.add_done_callback(self._open.discard)

    def close(self) -> None:
        """End the engine; pending calls fail. Waits at most `JOIN_S` seconds for a step in progress."""
        self._jobs.put(None)
        self._thread.join(JOIN_S)
        self._finish(EngineStopped("the student engine was closed; start a new one"))

    def _main(self, build: "Callable[[], LLMEngine]") -> None:
        try:
            engine = build()
            self.started.set_result(None)
            self._serve(EngineLoop(engine))
            engine.engine_core.shutdown()
        except BaseException as error:  # noqa: BLE001 (the thread ends here; its callers get the reason)
            reason = str(error) if isinstance(error, OpdError) else f"{type(error).__name__}: {error}"
            ended = EngineStopped(f"the student engine stopped ({reason}); see its log, and start a new one")
            ended.__cause__ = error
            self._finish(ended)
        else:
            self._finish(EngineStopped("the student engine was closed; start a new one"))

    def _serve(self, loop: EngineLoop) -> None:
        while True:
            busy = loop.engine.has_unfinished_requests()
            while not busy or not self._jobs.empty():
                entry = self._jobs.get()
                if entry is None:
                    return
                self._do(loop, *entry)
                busy = loop.engine.has_unfinished_requests()
            loop.step()

    @staticmethod
    def _do(loop: EngineLoop, future: Future[Any], job: Callable[[EngineLoop], Any]) -> None:
        try:
            future.set_result(job(loop))
        except EngineStopped as error:
            future.set_exception(error)
            raise
        except Exception as error:  # noqa: BLE001 (the job's caller gets it)
            future.set_exception(error)
        loop.release()

    def _finish(self, error: EngineStopped) -> None:
        with self._lock:
            self._end = self._end or error
            pending = list(self._open)
        for future in (self.started, *pending):
            if not future.done():
                future.set_exception(self._end)
