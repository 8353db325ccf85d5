"""The base of every section, and the error that a wrong configuration raises."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """The configuration is wrong; the message names every offending key and what was expected."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)
