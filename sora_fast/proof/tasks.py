"""Task: what one process is to judge."""

import importlib
import json
from dataclasses import asdict, dataclass

from sora_fast.proof.cases import Plan

DEFAULT_CASES = "sora_fast.proof.cases"


@dataclass(frozen=True)
class Task:
    """What a child has to do: the plans `names` of an op, one after the other.

    seconds: after which the process ends in any case. cases: the module that has them; tests have their own. program:
    the module that is run.
    """

    op: str
    device: str
    names: tuple[str, ...]
    seconds: float = 600.0
    cases: str = DEFAULT_CASES
    program: str = "sora_fast.proof.child"

    @property
    def title(self) -> str:
        """Of its log."""
        return self.op

    def plans(self) -> list[Plan]:
        """In that order."""
        known = {plan.name: plan for plan in offered(self.op, self.device, self.cases)}
        return [known[name] for name in self.names]

    def written(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: str) -> "Task":
        content = json.loads(text)
        return Task(**{**content, "names": tuple(content["names"])})


def offered(op: str, device: str, cases: str) -> list[Plan]:
    """All plans of an op, of a module."""
    return importlib.import_module(cases).offered(op, device)
