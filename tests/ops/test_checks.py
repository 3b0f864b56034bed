from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sora_fast.ops._checks import check_shape, once, value
from sora_fast.packing import PackedLayout, RowIndex
from sora_fast.packing._bundle import likeness


@pytest.fixture
def made() -> list[tuple]:
    """Arguments of each time that a check was made."""
    return []


@pytest.fixture
def check(made: list[tuple]):
    @once
    def check(x: Tensor, other: object = None) -> None:
        made.append((x, other))
        check_shape("x", x, ["N", 3])

    return check


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ((torch.ones(2, 3),), (torch.zeros(2, 3),)),
        ((torch.ones(2, 3),), (torch.ones(3, 2).t(),)),  # no check here reads strides
        ((torch.ones(2, 3),), (torch.nn.Parameter(torch.ones(2, 3)),)),
        ((torch.ones(2, 3), "layer"), (torch.ones(2, 3), "layer")),
        ((torch.ones(2, 3), 1e-6), (torch.ones(2, 3), 1e-6)),
        ((torch.ones(2, 3), (1, 2, 2)), (torch.ones(2, 3), (1, 2, 2))),
    ],
)
def test_a_check_is_made_once_for_arguments_alike(first: tuple, later: tuple, check, made: list[tuple]) -> None:
    check(*first)
    check(*later)
    assert len(made) == 1


def test_what_differs_is_checked(check, made: list[tuple]) -> None:
    x = torch.ones(2, 3)
    others = [torch.ones(4, 3), x.half(), x.to("meta"), x.as_subclass(_Sub), x.as_subclass(_Sub)]
    different = [
        (x, None),
        *((other, None) for other in others),
        (x, "rms"),
        (x, 1),
        (x, True),
        (x, 1.0),
        (x, (1, 2)),
        (x, (1, 2.0)),  # equals it, and is no patch
        (x, (True, 2)),
        (x, x),
        (x, []),
    ]
    for args in different:
        check(*args)
    assert len(made) == len(different)  # a subclass, and what it does not know, every time


class _Sub(Tensor):
    pass


def test_what_is_wrong_is_an_error_every_time(check) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=r"x: shape \(2, 4\); it must be \[N, 3\]"):
            check(torch.ones(2, 4))


def test_values_that_are_equal_are_alike(check, made: list[tuple]) -> None:
    @value
    @dataclass(frozen=True)
    class Known:
        size: int

    @dataclass(frozen=True)
    class Unknown:
        size: int

    for other, times in ((Known(1), 1), (Known(2), 1), (Unknown(1), 2)):
        before = len(made)
        check(torch.ones(2, 3), other)
        check(torch.ones(2, 3), type(other)(other.size))
        assert len(made) == before + times


def test_bundles_are_alike_by_shapes_dtypes_devices_and_static_values() -> None:
    grids = [(1, 2, 3), (2, 2, 2)]
    layout = PackedLayout.from_grids(grids)
    others = {
        "batch": PackedLayout.from_grids([(1, 2, 4), (1, 2, 3)]),
        "tiles": PackedLayout.from_grids(grids, tile_size=64),
        "order": PackedLayout.from_grids(grids, order="tiled"),
        "room": PackedLayout.from_grids(grids, capacity=20),
        "device": layout.to("meta"),
    }
    alike = {name for name, other in others.items() if likeness(other) == likeness(layout)}
    assert alike == {"batch"}
    index = torch.zeros(4, dtype=torch.int32)
    assert likeness(RowIndex.from_index(index, 2)) != likeness(RowIndex.from_index(index, 3))


def test_compiled_checks_are_made_as_they_are_traced() -> None:
    @once
    def check(x: Tensor) -> None:
        check_shape("x", x, ["N", 3])

    def double(x: Tensor) -> Tensor:
        check(x)
        return x * 2

    compiled = torch.compile(double, backend="eager", fullgraph=True)
    for rows in (2, 5, 7):
        assert compiled(torch.ones(rows, 3)).sum() == 6 * rows
