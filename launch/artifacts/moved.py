"""Where parts that configurations and checkpoints name were before, and where they are now."""

MOVED = {
    "opd.divergences.": "opd.method.promises.",
    "opd.packing.": "opd.loss.packing.",
    "opd.pipeline.": "opd.loop.staleness.",
    "opd.prompts.peak.": "demos.prompts.peak.",
    "opd.prompts.shop.": "demos.prompts.shop.",
    "opd.weights.length.": "opd.token_weights.length.",
    "opd.weights.special.": "opd.token_weights.special_tokens.",
    "opd.weights.teachers.": "opd.token_weights.teachers.",
    "launch.config.": "launch.config.run_config.",
    "launch.settings.": "launch.config.settings.",
    "launch.tracking.": "launch.config.tracker.",
}
"""Module of a class before -> now; both end in a dot."""


def todays(path: str) -> str:
    """The dotted path of a class by its name today. Example: `opd.weights.special.SkipFirst`."""
    module, dot, name = path.rpartition(".")
    return MOVED.get(module + dot, module + dot) + name
