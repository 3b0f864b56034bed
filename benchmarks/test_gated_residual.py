"""gated_residual beside its peers."""

from benchmarks.contests import Contest, contests


@contests("gated_residual")
def test_gated_residual(contest: Contest) -> None:
    contest.enter()
