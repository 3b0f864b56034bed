"""The ops whose own files measure more than the table does."""

from benchmarks.contests import Contest, contests


@contests("packed_attention")
def test_packed_attention_grid(contest: Contest) -> None:
    contest.enter()


@contests("qk_norm_rope")
def test_qk_norm_rope_grid(contest: Contest) -> None:
    contest.enter()
