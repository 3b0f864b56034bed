"""Task: what one process of the GPU suite is to do."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Task:
    """The items `names` of a step, one after the other, in a process of its own.

    step: a module of benchmarks/steps. device: "cuda:0"; "any": a GPU if there is one. options: of the step, ready for
    JSON. seconds: after which the process ends in any case.
    """

    step: str
    names: tuple[str, ...]
    device: str = "any"
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 600.0
    program: str = "benchmarks.worker"

    @property
    def title(self) -> str:
        """Of its log."""
        return self.step.rsplit(".", 1)[-1]

    def written(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: str) -> "Task":
        content = json.loads(text)
        return Task(**{**content, "names": tuple(content["names"])})
