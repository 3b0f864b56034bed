"""CUDA graphs."""

import torch

from benchmarks.timing import Work


def captured(work: Work, device: torch.device) -> Work:
    """A replay of what `work` launches, which is called a few times first, as CUDA asks; whatever `work` gave when it
    was captured is what a replay fills and gives."""
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()

    def replay() -> object:
        graph.replay()
        return outputs

    return replay
