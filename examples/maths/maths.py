"""Qwen3-0.6B learns maths from Qwen3-4B, both from the hub."""

import opd

asked = {"chat": True, "system": r"Put the final answer into \boxed{}.", "template_kwargs": {"enable_thinking": False}}
run = opd.train(
    student="Qwen/Qwen3-0.6B",
    teacher="Qwen/Qwen3-4B",
    prompts={"path": "open-r1/DAPO-Math-17k-Processed:en:train", "answer_column": "reward_model.ground_truth", **asked},
    evaluation_sets=["math500", "aime24"],
    learner={"dtype": "BFLOAT16", "zero_stage": 2, "lr": 1e-6},
    tracker="wandb",
    **{"max_tokens": 3072, "evaluation.sets.math500.every": 25},
)
