"""linear_unpatchify beside its peers."""

from benchmarks.contests import Contest, contests


@contests("linear_unpatchify")
def test_linear_unpatchify(contest: Contest) -> None:
    contest.enter()
