"""The seam to what judges predictions."""

from typing import Protocol


class JudgeFailed(Exception):
    """This prediction could not be judged; it gets no reward at all, which is not a reward of 0."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class Judge(Protocol):
    """Says whether a prediction holds against a reference."""

    name: str

    async def score(self, prediction: str, reference: str) -> float:
        """0.0 or 1.0. Raises JudgeFailed when there is no answer."""

    async def close(self) -> None:
        """Let go of connections."""
