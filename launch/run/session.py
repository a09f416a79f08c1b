"""The running parts of a run: engines, teachers and learner as actors, behind the ports of `opd`."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from actors.config import InnerTeacher, StudentConfig
from actors.config import environment as engine_environment
from actors.engine import VLLMEngine
from hf.embeddings import FolderEmbeddings
from hf.stop_tokens import read_ends
from launch.artifacts.checkpoint_state import LEARNER
from launch.config.run_config import RunConfig
from launch.config.settings import ClusterConfig, Sharing
from launch.inputs.graders import RunGrader, make_grader
from launch.inputs.own_environment import OwnEnvironment
from launch.plan.checks.blends import inner_teacher
from launch.plan.checks.devices import (
    ENGINE,
    LEARNER_RANK,
    WRITER,
    check_idle_cluster,
    gpus_of_teacher,
    roles,
    teacher_role,
    writers_of,
)
from launch.plan.checks.models import vocabulary_rows
from launch.plan.memory.parts import of_teacher
from launch.plan.plan import Plan
from launch.services.learner_group import LearnerGroup
from launch.services.learner_restart import RankFactory, RestartingLearner
from launch.services.owned_returns import keep, with_owned_returns
from launch.services.pools import Follower, ObservedStudent, StudentPool, TeacherPool
from launch.services.ray_session.cluster import Actors, fetch, machines, place_of
from launch.services.ray_session.placement import ActorRole
from launch.services.replicas import Replicas, within
from launch.services.stack_dumps import StackDumps
from launch.services.turns import Turns, resident
from launch.services.weight_transports import check_places, sender, transport_of
from learner.config import StudentText, Transport
from learner.config import environment as learner_environment
from learner.learner import LearnerRank
from opd.ports import Context, Engines, TextEngine, WeightObserver
from opd.settings.devices import Device
from teacher_service.backends import backend
from teacher_service.backends.openai_writer import Ending, OpenAIWriter
from teacher_service.config import OWN_ENGINE, REMOTE, TOKEN_VARIABLE, Backend, TeacherConfig
from teacher_service.config import environment as teacher_environment

CALLS = 64  # concurrent calls an actor accepts; engines batch them themselves


@dataclass(slots=True)
class Session:
    """Engines, pools and learner that `open_session` started. `close` ends what Ray's own shutdown would not."""

    plan: Plan
    actors: Actors
    student: ObservedStudent
    engines: Engines
    learner: RestartingLearner
    graders: Mapping[str, RunGrader]
    environments: Mapping[str, OwnEnvironment]
    turns: Turns | None = None

    def context(self, step: int) -> Context:
        """The engines at a step of this run, for parts of a method that are called beside the loop."""
        return Context.of(self.engines, step=step, steps=self.plan.config.steps, seed=self.plan.config.seed)

    async def teacher_writer(self, name: str) -> TextEngine:
        """A teacher as a writer; started now if no part of the method needed it before.

        Raises:
            OpdError: there is no room for it beside what runs.
        """
        known = self.engines.writers.get(name)
        if known is not None:
            return known
        role = replace(self.actors[ENGINE], name=f"measured teacher {name!r}", count=1)
        if self.plan.config.teachers[name].backend is not Backend.OPENAI:
            self.actors.check_room(role)
        return await _writer(self.actors, self.plan, name, role, self.turns)

    def ended(self, pool: StudentPool | TeacherPool) -> None:
        """Record that the actors of a pool beside the run's own have ended."""
        if self.turns is not None:
            self.turns.forget(pool.replicas)

    @property
    def followers(self) -> Mapping[str, Follower]:
        """Teachers that follow the student, by name."""
        return self.student.followers

    def observe_weights(self, observer: WeightObserver) -> None:
        """Let `observer` receive every version from the next publication on."""
        self.student.observers.append(observer)

    @property
    def faults(self) -> list[str]:
        """Sentences about replicas that failed and were replaced, and about texts that could not be graded."""
        pools = [self.student.student, *self.engines.teachers.values(), *self.engines.writers.values()]
        of_pools = [pool.replicas.history for pool in pools if isinstance(pool, StudentPool | TeacherPool)]
        by_task = [part.faults for part in (*self.graders.values(), *self.environments.values())]
        return [line for lines in (*of_pools, self.learner.history, *by_task) for line in lines]

    async def restore(self, checkpoint: Path, followers: Mapping[str, str]) -> None:
        """Take over the learner's state, and the weights of teachers that follow the student (name -> file)."""
        step = await self.learner.load(checkpoint / LEARNER)
        self.student.seen = step
        await asyncio.gather(*[self.followers[name].restore(checkpoint / file) for name, file in followers.items()])

    def close(self) -> None:
        """Release graders and placement."""
        for grader in self.graders.values():
            grader.close()
        self.actors.close()


async def open_session(plan: Plan, stacks: StackDumps | None = None, folder: Path | None = None) -> Session:
    """Start every actor at once and wait until all are ready; `stacks` writes down where one stands that hangs.

    `folder` is where the run is kept, which learner ranks must see, also on other machines.
    """
    config = plan.config
    if plan.undecided:
        check_idle_cluster(config, machines())
    actors = Actors(config.cluster, roles(config), stacks)
    turns = Turns(config.cluster.turn_deadline_s) if takes_turns(config.cluster) else None
    student = _student_pool(actors, plan, turns)
    teachers = {name: _teacher_pool(actors, config, name, turns) for name in config.teachers}
    learner = _learner(actors, plan, student, teachers, folder, turns)
    graders = {name: make_grader(name, part) for name, part in config.graders.items()}
    environments = {name: OwnEnvironment(name=name, part=part) for name, part in config.environments.items()}
    starting = asyncio.ensure_future(student.replicas.start(config.student.replicas))
    if config.student.device is Device.GPU and config.cluster.gpus_per_engine < 1:
        await starting  # vLLM measures what it leaves free on a GPU, while others must not take or leave any
    first = measuring(config)
    for name in first:
        await teachers[name].replicas.start(config.teachers[name].replicas)
    await asyncio.gather(
        learner.setup(),
        starting,
        *[pool.replicas.start(config.teachers[n].replicas) for n, pool in teachers.items() if n not in first],
    )
    await learner.check_placement()
    writers = {name: await _writer(actors, plan, name, actors[WRITER], turns) for name in writers_of(config)}
    followers = {
        name: Follower(replicas=teachers[name].replicas, every=teacher.mixup_every, deadline_s=teacher.deadline_s)
        for name, teacher in config.teachers.items()
        if teacher.mixup
    }
    observed = ObservedStudent(student, followers)
    engines = Engines(
        student=observed,
        teachers=dict(teachers),
        writers=writers,
        graders=graders,
        tokenizer=plan.sources.tokenizer,
        environments=environments,
        embeddings=FolderEmbeddings(config.student.path),
    )
    return Session(
        plan=plan,
        actors=actors,
        student=observed,
        engines=engines,
        learner=learner,
        graders=graders,
        environments=environments,
        turns=turns,
    )


def measuring(config: RunConfig) -> list[str]:
    """Teachers whose vLLM measures a GPU that others use as well; they start one by one, before those."""
    return [
        name
        for name, teacher in config.teachers.items()
        if teacher.backend in OWN_ENGINE
        and teacher.device is Device.GPU
        and gpus_of_teacher(config.cluster, teacher) < 1
    ]


def takes_turns(cluster: ClusterConfig) -> bool:
    """Whether roles take turns on their memory."""
    return cluster.share is Sharing.TIME


def take_turns(turns: Turns | None, role: str, replicas: Replicas) -> None:
    """Let replicas take turns with the other roles of a run, if those do."""
    if turns is not None:
        replicas.turn = turns.of(role)
        turns.attach(role, replicas)


def _student_pool(actors: Actors, plan: Plan, turns: Turns | None) -> StudentPool:
    config, role, sleeps = plan.config, actors[ENGINE], turns is not None
    make = partial(_engine, actors, role, config.student, config.seed, plan.ends, inner_teacher(config), sleeps)
    pool = StudentPool(
        config.cluster.retry_policy(config.student.deadline_s),
        make,
        end=actors.end,
        stack_dump=actors.stack_dump,
        rows=vocabulary_rows(config.student.path),
    )
    take_turns(turns, ENGINE, pool.replicas)
    return pool


def _teacher_pool(actors: Actors, config: RunConfig, name: str, turns: Turns | None) -> TeacherPool:
    teacher = config.teachers[name]
    retry_policy = config.cluster.retry_policy(teacher.deadline_s)
    if teacher.mixup:  # what it has become is in no checkpoint of ours to start another from
        retry_policy = replace(retry_policy, restarts=0)
    make = partial(teacher_actor, actors, teacher, sleeps=turns is not None)
    pool = TeacherPool(retry_policy, make, actors.end, actors.stack_dump)
    if teacher.backend not in REMOTE:  # whose memory is elsewhere
        take_turns(turns, of_teacher(name), pool.replicas)
    return pool


async def _places(deadline_s: float, students: Sequence[Any], teachers: Sequence[Any]) -> dict[str, str]:
    """Node of each of these actors, by the actor's name."""
    roles = {"rollout actor": students, "teacher actor": teachers}
    actors = {f"{role} {i}": actor for role, made in roles.items() for i, actor in enumerate(made)}
    places = await asyncio.gather(*[within(deadline_s, name, place_of(actor)) for name, actor in actors.items()])
    return dict(zip(actors, places, strict=True))


def _engine(
    actors: Actors,
    role: ActorRole,
    config: StudentConfig,
    seed: int,
    ends: Sequence[int],
    inner: InnerTeacher | None = None,
    sleeps: bool = False,
) -> Any:
    environment = engine_environment(config.device)
    return actors.make(VLLMEngine, role, environment, config, seed, fetch, ends, inner, sleeps, concurrency=CALLS)


def teacher_actor(actors: Actors, config: TeacherConfig, name: str = "", *, sleeps: bool = False) -> Any:
    """A scoring actor of the config's backend; a remote teacher's is a client, which gets the server's token.

    With a `name` it is one more than the run has. One that `sleeps` takes turns with other roles.
    """
    role = actors[teacher_role(config)]
    if name:
        role = replace(role, name=name, count=1)
        actors.check_room(role)
    environment = teacher_environment(config.device, config.backend)
    token = (os.environ.get(TOKEN_VARIABLE, ""),) if config.backend in REMOTE else ()
    vllm = (sleeps,) if config.backend in OWN_ENGINE else ()
    cls = with_owned_returns(backend(config.backend))
    return actors.make(cls, role, environment, config, keep, *token, *vllm, concurrency=CALLS)


async def _writer(actors: Actors, plan: Plan, name: str, role: ActorRole, turns: Turns | None) -> TextEngine:
    """A teacher that writes: its endpoint, or else an engine in an actor of this role."""
    config, teacher = plan.config, plan.config.teachers[name]
    if teacher.backend is Backend.OPENAI:
        ends = tuple(sorted({*read_ends(teacher.path, f"teacher {name}").ids, *plan.ends}))
        ending = Ending(ids=ends, texts=config.student.stop, rows=vocabulary_rows(teacher.path))
        return OpenAIWriter(teacher, ending, config.seed, os.environ.get(TOKEN_VARIABLE, ""))
    as_student = replace(config.student, path=config.teachers[name].path, replicas=1)
    make = partial(_engine, actors, role, as_student, config.seed, plan.ends, sleeps=turns is not None)
    pool = StudentPool(
        config.cluster.retry_policy(as_student.deadline_s),
        make,
        end=actors.end,
        stack_dump=actors.stack_dump,
        rows=vocabulary_rows(as_student.path),
    )
    take_turns(turns, f"writing {of_teacher(name)}", pool.replicas)
    await pool.replicas.start(1)
    return pool


def _learner(
    actors: Actors,
    plan: Plan,
    student: StudentPool,
    teachers: Mapping[str, TeacherPool],
    folder: Path | None,
    turns: Turns | None,
) -> RestartingLearner:
    """The learner, whose ranks start anew in the same places of the cluster as long as `cluster.restarts` allows it."""
    config = plan.config
    elsewhere = folder if config.cluster.address != "local" else None
    following = [pool for name, pool in teachers.items() if config.teachers[name].mixup]
    turn = resident if turns is None else turns.of("learner")

    def make() -> LearnerGroup:
        ranks = [_rank(actors, plan) for _ in range(config.learner.ranks)]
        start_s = config.cluster.start_deadline_s
        return LearnerGroup(ranks, config.learner, actors.stack_dump, start_s, elsewhere, actors.end, turn)

    others: dict[str, str] = {}  # nodes of all other actors

    async def ready(group: LearnerGroup) -> None:
        transport = transport_of(config)
        if transport not in (Transport.SHARED_MEMORY, Transport.CUDA_IPC):
            return
        if not others:  # later ranks are compared with it alone: others may be dying when ranks start anew
            receivers = [actor for pool in following for actor in pool.replicas.actors]
            others.update(await _places(config.cluster.start_deadline_s, student.replicas.actors, receivers))
        ranks = {f"learner rank {i}": where for i, where in enumerate(await group.places())}
        check_places(transport, {**ranks, **others})

    factory = RankFactory(make=make, ready=ready, renew=student.renew, turn=turn)
    learner = RestartingLearner(factory, config.cluster.restarts, config.cluster.replay_log_bytes)
    if turns is not None:
        turns.attach("learner", learner)
    return learner


def _rank(actors: Actors, plan: Plan) -> Any:
    config = plan.config
    heads = tuple(teacher.path for teacher in config.teachers.values()) if plan.exact_kl else ()
    environment = learner_environment(config.learner.device)
    make = sender(transport_of(config), config.learner.deadline_s)
    arguments = (config.learner, config.student.path, heads, config.steps, config.seed, fetch, make)
    text = StudentText(ends=plan.ends, sentinel=plan.sentinel)
    return actors.make(LearnerRank, actors[LEARNER_RANK], environment, *arguments, text, concurrency=2)
