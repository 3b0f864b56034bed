"""patch_embed beside its peers."""

from benchmarks.contests import Contest, contests


@contests("patch_embed")
def test_patch_embed(contest: Contest) -> None:
    contest.enter()
