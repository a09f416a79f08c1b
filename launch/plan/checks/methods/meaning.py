"""All checks of whether a method in a run is what its settings say, in one place."""

from hf.tokenizer import HuggingFaceTokenizer
from launch.config.run_config import RunConfig
from launch.plan.checks.methods.copies import copy_notes
from launch.plan.checks.methods.factors import check_factors
from launch.plan.checks.methods.sampling import check_sampling
from launch.plan.checks.methods.templates import check_shown
from launch.plan.checks.survey import Survey


def check_meaning(config: RunConfig, training: Survey, tokenizer: HuggingFaceTokenizer) -> list[str]:
    """Remarks on a method that trains something else than its settings say; refuses one that would train nothing."""
    return [
        *check_factors(config),
        *check_sampling(config, training, tokenizer),
        *check_shown(config, training, tokenizer),
        *copy_notes(config, training),
    ]
