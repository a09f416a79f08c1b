"""TRL's released trainer on the embedded demo: the peer's arm of `benchmarks/startup.py`.

    PYTHONPATH=.:FOLDER python benchmarks/peer_trl.py STEPS      (`pip install --no-deps --target FOLDER trl`)

`DistillationTrainer`: 64 prompts a step, one completion of at most 77 tokens each, reverse KL over the whole
vocabulary, written by transformers (its vLLM modes need a GPU), float32, the demo's rate. Prints a line when training
starts and after every step.
"""

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPTS = 64  # a step, as in experiment=shop
MAX_TOKENS = 77


def main() -> None:
    """Training of as many steps as the command line has."""
    try:
        from trl import DistillationConfig, DistillationTrainer  # pyright: ignore[reportMissingImports]
    except ImportError as error:  # the project does without it
        print(f"TRL's arm is left out: {error}")
        return
    from datasets import Dataset
    from transformers import TrainerCallback

    from demos.tasks.shop import ShopTask

    class Steps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            print("training starts", flush=True)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            print(f"step {state.global_step} ", flush=True)

    steps, draw = int(sys.argv[1]), random.Random(0)
    assets = Path(__file__).resolve().parents[1] / "assets" / "shop"
    texts = [ShopTask().problem(draw).prompt for _ in range(steps * PROMPTS)]
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=PROMPTS,
            max_completion_length=MAX_TOKENS,
            learning_rate=1e-3,
            beta=1.0,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = DistillationTrainer(
            model=str(assets / "student"),
            teacher_model=str(assets / "teacher"),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            callbacks=[Steps()],
        )
        trainer.train()
    print(trainer.state.log_history[-2:])


if __name__ == "__main__":
    main()
