"""mlp_activation beside its peers."""

from benchmarks.contests import Contest, contests


@contests("mlp_activation")
def test_mlp_activation(contest: Contest) -> None:
    contest.enter()
