"""Fixed answers to problems of the locks task, as a prompt file: ``python -m demos.recipes.locks_answers FILE ...``.

``--wrong 0.5``: true solutions, half of whose tries are wrong and rejected: noise in the expert's answers, so that
they show what to do after a mistake (DART, arXiv 1703.09327). ``--of FOLDER``: what a student wrote, right or wrong,
for a teacher to score. A run reads them with

    prompts=dataset prompts.path=FILE prompts.task=locks prompts.answer_column=answer
    prompts.teacher_prompt_column=teacher_prompt method.rollout._target_=opd.rollouts.mixed.AnswerRollout
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from demos.prompts.locks import LocksPrompts
from demos.recipes.evaluate_task import load
from demos.recipes.measure_locks import found, write
from demos.recipes.pretrain import make_reproducible
from demos.tasks.locks import LocksProblem, LocksTask, judge

BATCH = 256


def written_by(folder: Path, problems: Sequence[LocksProblem]) -> list[str]:
    """One sampled answer per problem. One that was cut keeps its words; what reads it cuts it at the same place."""
    torch.manual_seed(0)
    model, tokenizer = load(folder)
    batches = [problems[at : at + BATCH] for at in range(0, len(problems), BATCH)]
    return [text for some in batches for text, _ in write(model, tokenizer, some, told=False, sample=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a prompt file of locks problems with fixed answers.")
    parser.add_argument("file", type=Path)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--wrong", type=float, help="share of wrong tries in true solutions")
    source.add_argument("--of", type=Path, help="folder of the model that answers")
    parser.add_argument("--problems", type=int, default=5120)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    make_reproducible()
    prompts = LocksPrompts(prompts_per_step=1, seed=arguments.seed)
    problems = [prompts.problem(number) for number in range(arguments.problems)]
    if arguments.of:
        answers = written_by(arguments.of, problems)
    else:
        rng = random.Random(f"answers/{arguments.seed}")
        answers = [LocksTask().solution(p, rng, wrong=arguments.wrong, again=False).text for p in problems]
    with arguments.file.open("w", encoding="utf-8") as out:
        for p, answer in zip(problems, answers, strict=True):
            row = {"prompt": p.prompt, "teacher_prompt": p.teacher_prompt, "answer": answer}
            out.write(json.dumps(row) + "\n")
    verdicts = [judge(answer, p.answer) for answer, p in zip(answers, problems, strict=True)]
    print(f"{arguments.file}: {found(verdicts).line}")


if __name__ == "__main__":
    main()
