"""What was replaced in a model, and why the rest was not."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleReport:
    """One module.

    name: as in `model.named_modules()`; kind: its class. ops: what runs in its place, each "op: backend" where `check`
    has run it; which one runs later, and why not another, `sora_fast.explain()` says.
    reason: why it is as it was; None: it is replaced.
    """

    name: str
    kind: str
    ops: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def replaced(self) -> bool:
        return self.reason is None

    def __str__(self) -> str:
        said = f"not replaced: {self.reason}" if self.reason else f"replaced by {', '.join(self.ops)}"
        return f"{self.name} ({self.kind}): {said}"


@dataclass(frozen=True)
class Report:
    """Every module of a class that has a replacement, in the model's order. Printed, it is one line a module."""

    modules: tuple[ModuleReport, ...]

    @property
    def replaced(self) -> tuple[ModuleReport, ...]:
        return tuple(module for module in self.modules if module.replaced)

    @property
    def kept(self) -> tuple[ModuleReport, ...]:
        return tuple(module for module in self.modules if not module.replaced)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} of {len(self.modules)} known modules replaced", *map(str, self.modules)]
        return "\n".join(lines)
