"""Old dotted paths and setting names in configurations and checkpoints, and their current names."""

MODULES = {
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

CLASSES = {
    "opd.loop.staleness.Pipeline": "opd.loop.staleness.StalenessSchedule",
    "opd.scorers.teacher.WrittenTokens": "opd.scorers.teacher.SampledTokens",
}
"""Class before, in the module of today -> now."""

SETTINGS = {
    "journal_bytes": "replay_log_bytes",
    "strikes": "max_consecutive_failures",
}
"""Last part of a setting's dotted name before -> now."""


def todays(path: str) -> str:
    """Current dotted path of a class. Example: `opd.weights.special.SkipFirst`."""
    module, dot, name = path.rpartition(".")
    moved = MODULES.get(module + dot, module + dot) + name
    return CLASSES.get(moved, moved)


def todays_setting(name: str) -> str:
    """Current dotted name of a setting. Example: `cluster.journal_bytes` is `cluster.replay_log_bytes`."""
    place, dot, last = name.rpartition(".")
    return place + dot + SETTINGS.get(last, last)
