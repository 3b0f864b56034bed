"""unpatchify beside its peers."""

from benchmarks.contests import Contest, contests


@contests("unpatchify")
def test_unpatchify(contest: Contest) -> None:
    contest.enter()
