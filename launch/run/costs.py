"""Cost model of a run: which models compute with its tokens, and how large they are."""

from launch.config.run_config import DEFAULT
from launch.monitors.accounting import Costs
from launch.plan.plan import Plan
from opd.method.needs import asks_prompts_teacher, named, needed
from opd.ports import Role, needs_of


def costs(plan: Plan) -> Costs:
    """Cost model of the run: the models that compute with every token, and their sizes."""
    method, params = plan.config.method, plan.teacher_params
    members = sorted(named(method, Role.READER))
    read = sum(params[name] for name in members)
    if asks_prompts_teacher(method) or not members:
        read += params[DEFAULT]
    return Costs(
        student_params=plan.student_params,
        teacher_params=read,
        by_teacher={} if members or len(params) == 1 else params,
        teacher_writes=any(need.role is Role.WRITER for need in needs_of(method.rollout)),
        teacher_reads=needed(method, Role.READER),
    )
