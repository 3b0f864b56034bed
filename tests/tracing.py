"""What an op does besides its result: the tensors that it makes, the kernels that it launches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Inside, notes the most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


class Calls(TorchDispatchMode):
    """Inside, lists every op with the shapes of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made.append((func.name(), [tuple(x.shape) for x in tree_leaves(result) if isinstance(x, Tensor)]))
        return result


class Computed(TorchDispatchMode):
    """Inside, lists the ops that compute: not views, and not memory that is only taken."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if "empty" not in name and not any(result.alias_info for result in func._schema.returns):
            self.names.append(name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


class Products(TorchDispatchMode):
    """Inside, collects the dtypes that matrix products are made in."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            self.dtypes.add(result.dtype)
        return result


class KeptBytes(TorchDispatchMode):
    """Takes note of the memory of every result that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def now(self) -> int:
        """Bytes of it that are still held by anybody."""
        return sum(size for storage, size in self._made.values() if not storage.expired())


def check_unasked(
    op: Callable[..., Tensor | tuple[Tensor, ...]], tensors: Sequence[Tensor], *, asked: int, spared: str
) -> None:
    """If only the first `asked` of the tensors want a gradient, theirs are the same to the bit, and the backward pass
    does not launch the kernel `spared`, which it launches otherwise.
    """
    from sora_fast.kernels._launch import recording

    gradients, kernels = [], []
    for wanted in (len(tensors), asked):
        leaves = [x.detach().requires_grad_(place < wanted) for place, x in enumerate(tensors)]
        outputs = op(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        ones = [torch.ones_like(output) for output in outputs]
        gradients.append(torch.autograd.grad(outputs, leaves[:wanted], ones, retain_graph=True))
        with recording((9, 0)) as recorder:
            torch.autograd.grad(outputs, leaves[:wanted], ones)
        kernels.append({kernel.fn.__name__ for kernel, *_ in recorder.launches})
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=False))
    assert kernels[0] - kernels[1] == {spared}
