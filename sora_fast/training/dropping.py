"""`--drop`: how NaViT's token dropping is asked for on the command line."""

import re
from collections.abc import Sequence

from sora_fast.packing import BetaDrop, ConstantDrop, ResolutionDrop, SigmoidDrop

# NaViT's: the largest rate of the Beta (appendix A.4).
BETA_MOST = 0.85

_NUMBER = r"(0|1|0?\.\d+|1\.0+)"
_FORMS = {
    "constant": re.compile(_NUMBER),
    "beta": re.compile(f"beta:{_NUMBER}"),
    "resolution": re.compile(f"resolution:{_NUMBER}-{_NUMBER}"),
    "decreasing": re.compile(f"decreasing:{_NUMBER}-{_NUMBER}"),
}


def drop_rule(
    text: str, *, steps: int | None, tokens: Sequence[int]
) -> ConstantDrop | BetaDrop | ResolutionDrop | SigmoidDrop:
    """The rule that --drop asks for. steps: of the run, if it is limited by them; tokens: of every sample.

    ValueError if there is no such rule, or it does not go with the run or the samples.
    """
    for kind, form in _FORMS.items():
        if found := form.fullmatch(text):
            numbers = [float(number) for number in found.groups()]
            try:
                return _built(kind, numbers, steps, tokens)
            except ValueError as error:
                raise ValueError(f"--drop {text}: {error}") from error
    raise ValueError(f"--drop {text}: it must be like 0.5, beta:0.5, resolution:0.2-0.6 or decreasing:0.8-0.2")


def _built(
    kind: str, numbers: list[float], steps: int | None, tokens: Sequence[int]
) -> ConstantDrop | BetaDrop | ResolutionDrop | SigmoidDrop:
    if kind == "constant":
        return ConstantDrop(*numbers)
    if kind == "beta":
        return BetaDrop(*numbers, max_rate=BETA_MOST)
    if kind == "resolution":
        if min(tokens) == max(tokens):
            raise ValueError(f"all samples have {min(tokens)} tokens, so there is no small and no large one")
        return ResolutionDrop(*numbers, min_tokens=min(tokens), max_tokens=max(tokens))
    if steps is None:
        raise ValueError("a run that is limited by time does not know how far it is; give it --steps")
    return SigmoidDrop(steps, *numbers)
