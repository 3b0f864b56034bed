"""segment_mean beside its peers."""

from benchmarks.contests import Contest, contests


@contests("segment_mean")
def test_segment_mean(contest: Contest) -> None:
    contest.enter()
