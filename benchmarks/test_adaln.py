"""adaln beside its peers."""

from benchmarks.contests import Contest, contests


@contests("adaln")
def test_adaln(contest: Contest) -> None:
    contest.enter()
