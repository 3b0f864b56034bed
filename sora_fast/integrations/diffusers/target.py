"""What is replaced in a module of another library, and how it comes off again."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Generator, nn

from sora_fast.integrations.diffusers.fingerprint import fingerprint

# Of a module that is replaced: its binding. On the module itself, so that a deep copy can be reverted too.
_RECORD = "_sora_fast_binding"


@dataclass(frozen=True)
class Target:
    """A class of modules that we have a replacement for.

    path: module and name of the class. ops: what runs in its place.
    attribute: of the instance, that `replacement(module)` becomes.
    sources: the functions whose text decides whether this was written for it; known: their fingerprints, and the
        releases that have them.
    unsuited: why a module of the class cannot be replaced, or None.
    examples: for `check`, random arguments of several shapes for the module's call, in its dtype, on its device.
    """

    path: str
    ops: tuple[str, ...]
    attribute: str
    replacement: Callable[[nn.Module], Any]
    sources: Callable[[nn.Module], list[Callable | None]]
    known: Mapping[str, str]
    unsuited: Callable[[nn.Module], str | None]
    examples: Callable[[nn.Module, Generator], Iterator[dict[str, Any]]]

    def matches(self, module: nn.Module) -> bool:
        """Subclasses too: whether they changed anything is for the fingerprint to say."""
        return any(f"{base.__module__}.{base.__qualname__}" == self.path for base in type(module).__mro__)

    def refusal(self, module: nn.Module) -> str | None:
        """Why this module is left as it is; None: it can be replaced."""
        found = fingerprint(self.sources(module))
        if found not in self.known:
            known = ", ".join(f"{digest} of diffusers {releases}" for digest, releases in self.known.items())
            return f"its source is not what the replacement was written for: fingerprint {found}; known: {known}"
        if self.attribute == "forward" and "forward" in vars(module):
            return "its forward is bound already, as hooks of offloading do; apply first, then add them"
        return self.unsuited(module)


@dataclass(frozen=True)
class _Binding:
    attribute: str
    ours: Any
    original: Any | None  # None: the instance had no such attribute


def bind(module: nn.Module, target: Target) -> None:
    """Put the replacement on this one instance."""
    binding = _Binding(target.attribute, target.replacement(module), vars(module).get(target.attribute))
    setattr(module, binding.attribute, binding.ours)
    setattr(module, _RECORD, binding)


def is_bound(module: nn.Module) -> bool:
    """Whether the module is replaced."""
    return _RECORD in vars(module)


def covered(module: nn.Module) -> str | None:
    """The attribute of a replaced module that somebody has set since, or None."""
    binding = vars(module)[_RECORD]
    return None if vars(module).get(binding.attribute) is binding.ours else binding.attribute


def unbind(module: nn.Module) -> None:
    """Leave no trace."""
    binding = vars(module)[_RECORD]
    if binding.original is None:
        delattr(module, binding.attribute)
    else:
        setattr(module, binding.attribute, binding.original)
    delattr(module, _RECORD)


def bypassed(**modules: nn.Module) -> str | None:
    """Why these submodules, whose weights are read without calling them, must be called; None: they need not be."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for name, module in modules.items():
        if "forward" in vars(module) or any(getattr(module, kind) for kind in hooks):
            return f"{name} has hooks or a forward of its own, which would not be called"
    return None
