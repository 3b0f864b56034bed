"""A whole DiTBlock beside the same block in plain PyTorch."""

from benchmarks.contests import Contest, contests


@contests("dit_block")
def test_block(contest: Contest) -> None:
    contest.enter()
