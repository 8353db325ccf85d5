"""The base of every section, and a type that two of them share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


def _of_release_0_1(value: Any) -> Any:
    """Configurations of release 0.1, the saved ones of runs among them, say ``zero``, which gave a
    failed call the value 0: among penalties the best of its group."""
    return "leave_out" if value == "zero" else value


OnError = Annotated[Literal["leave_out", "stop"], BeforeValidator(_of_release_0_1)]
"""What a failure in a worker process does: its response is left out, or the run stops."""
