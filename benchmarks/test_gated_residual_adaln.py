"""gated_residual_adaln beside its peers."""

from benchmarks.contests import Contest, contests


@contests("gated_residual_adaln")
def test_gated_residual_adaln(contest: Contest) -> None:
    contest.enter()
