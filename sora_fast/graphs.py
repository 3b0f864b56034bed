"""A function of tensors as one CUDA graph: its inputs stay where they are, and it is launched as a whole.

What may be captured reads nothing on the host, and neither sizes nor branches depend on content: the graph holds the
kernels, sizes and Python numbers of the call that was captured.
"""

import functools
import logging
import weakref
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sora_fast.packing._bundle import TensorBundle, check_like, copy_into

log = logging.getLogger(__name__)

Inputs = TypeVar("Inputs", bound=TensorBundle)
# Calls before a capture: the first ones choose algorithms, compile kernels and make an optimizer's state.
WARM_UP = 2


class Recorder(Protocol):
    """What captures: CUDA, or a stand-in for tests."""

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """Call it as it is."""

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Its replay, and the outputs that a replay fills. Nothing is computed yet."""


class Graph(Generic[Inputs]):
    """`function`, a graph from its third call on.

    function: takes a bundle of tensors and gives tensors in tuples. Beside the bundle it may read what stays in its
    place, weights for example, and write there.
    A call is a copy of the inputs into the graph's own, a replay, and a copy of the outputs, so neither is bound to the
    graph. Of the inputs, a bundle that is the very one of the call before is not copied again. ValueError for inputs of
    other sizes. What cannot be captured runs on as it is, and the log says why. replays: so far.
    """

    def __init__(self, function: Callable[[Inputs], Any], recorder: Recorder) -> None:
        self._function, self._recorder = function, recorder
        self._own: Inputs | None = None
        self._loaded: dict[str, weakref.ref[TensorBundle]] = {}
        self._left = WARM_UP
        self._replay: Callable[[], None] | None = None
        self._outputs: Any = None
        self.replays = 0

    def __call__(self, inputs: Inputs) -> Any:
        self._load(inputs)
        if self._left:
            self._left -= 1
            return self._recorder.warm_up(self._plain)
        if self._replay is None:
            try:
                self._replay, self._outputs = self._recorder.capture(self._plain)
            except RuntimeError as error:
                log.warning("this runs without a CUDA graph, which is slower: it cannot be captured (%s)", error)
                self._left = -1  # as it is, from now on
                return self._recorder.warm_up(self._plain)
        self._replay()
        self.replays += 1
        return tree_map_only(Tensor, torch.clone, self._outputs)

    def _plain(self) -> Any:
        return self._function(self._own)

    def _load(self, inputs: Inputs) -> None:
        if self._own is None:
            # Each by itself: tensors that two inputs share now they need not share later.
            self._own = inputs._map(torch.clone)
        for field in fields(inputs):
            mine, new = getattr(self._own, field.name), getattr(inputs, field.name)
            if field.name in self._loaded and self._loaded[field.name]() is new:
                continue
            check_like(field.name, mine, new)
            copy_into(mine, new)
            if isinstance(new, TensorBundle):
                self._loaded[field.name] = weakref.ref(new)


class CudaRecorder:
    """Captures on a GPU. All graphs share one pool of memory: the outputs of each are copied before the next is run."""

    def __init__(self, device: torch.device) -> None:
        """ValueError for a device that has no graphs."""
        if device.type != "cuda":
            raise ValueError(f"graph: True, but a CUDA graph needs a GPU, and the device is {device}")
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """On a stream of its own, as CUDA asks."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = call()
        current.wait_stream(self._stream)
        return outputs

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile, with memory for batches for example.
        options = {"pool": _pool(), "stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.cuda.device(self.device), torch.cuda.graph(graph, **options):
            outputs = call()
        return graph.replay, outputs


@functools.cache
def _pool() -> Any:
    return torch.cuda.graph_pool_handle()
