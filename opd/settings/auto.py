"""Marker of settings that a run's plan decides."""

from enum import Enum


class Auto(Enum):
    """Marker of a setting that is decided when a run is planned: by device, by memory or by a model."""

    AUTO = "auto"
