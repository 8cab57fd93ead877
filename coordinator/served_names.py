"""What clients may call the fleet's model."""

from __future__ import annotations

from pathlib import PurePath

from coordinator.intake import Intake


class ServedNames:
    """The configured names; without any, the model string the workers gave and its last component."""

    def __init__(self, configured: tuple[str, ...], intake: Intake) -> None:
        self._configured = configured
        self._intake = intake

    def names(self) -> tuple[str, ...]:
        """The first is the one answers carry. Empty while no worker has registered."""
        if self._configured:
            return self._configured
        model = self._intake.facts().model
        if model is None:
            return ()
        short = PurePath(model).name
        return (model, short) if short and short != model else (model,)

    def is_served(self, name: str) -> bool:
        return name in self.names()
