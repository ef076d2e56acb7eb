"""Which cell lives where: a pure function of sizes and budgets."""

import pytest

from asteria.errors import StoreFullError
from asteria.store.cell import Home
from asteria.store.residency import Budgets, Item, place

D, P, N = Home.DEVICE, Home.PINNED, Home.NVME


def item(nbytes: int, per_byte: float = 2.0, beside: float = 0.0, noted: int = 0) -> Item:
    half = per_byte * nbytes / 2
    return Item(nbytes, half, half, beside_bytes=beside, noted_bytes=noted)


def test_without_a_limit_everything_is_near_and_nothing_flows() -> None:
    found = place([[item(100), item(50)], [item(7)]], Budgets())
    assert found.homes == ((D, D), (D,))
    assert found.bytes_at == (157, 0, 0)
    assert (found.window_bytes, found.moved_bytes) == (0, 0)


def test_what_just_fits_stays_near() -> None:
    groups = [[item(100)], [item(100)]]
    assert place(groups, Budgets(200)).homes == ((D,), (D,))
    assert place(groups, Budgets(199, None)).homes != ((D,), (D,))


def test_what_flies_takes_room_on_the_device_wherever_its_cell_lives() -> None:
    def flying(nbytes: int, there: float) -> Item:
        return Item(nbytes, nbytes, nbytes, flying_bytes=there)

    groups = [[flying(100, 30.0)], [flying(100, 30.0)]]
    found = place(groups, Budgets(260, None))
    assert (found.homes, found.flying_bytes) == (((D,), (D,)), 60)
    found = place(groups, Budgets(259, None))
    assert P in (home for homes in found.homes for home in homes)
    assert found.flying_bytes == 60
    assert found.window_bytes <= 199
    assert place([[item(100)]], Budgets(100, None)).flying_bytes == 0


def test_the_bytes_that_are_moved_most_stay_near() -> None:
    groups = [[item(100, 1.0), item(100, 3.0)], [item(100, 1.0), item(100, 2.0)], [item(100, 1.5)]]
    found = place(groups, Budgets(600, None))
    assert found.homes == ((D, D), (D, D), (D,)), "500 bytes fit without a window"
    found = place([*groups, *groups], Budgets(900, None))
    assert found.window_bytes == 600, "three times the largest group"
    # 300 bytes are left: both of claim 3, then the first of claim 2.
    assert found.homes == ((P, D), (P, D), (P,), (P, D), (P, P), (P,))
    assert found.moved_bytes == pytest.approx(4 * 100 + 200 + 2 * 150)


def test_equal_claims_are_granted_in_order() -> None:
    found = place([[item(10)] for _ in range(8)], Budgets(50, None))
    assert found.homes == ((D,), (D,), (P,), (P,), (P,), (P,), (P,), (P,))


def test_every_tier_keeps_within_its_budget() -> None:
    groups = [[item(size, per) for per in (2.0, 1.1, 0.5)] for size in (5, 9, 14, 3, 8, 11)]
    total = sum(one.nbytes for group in groups for one in group)
    for device in range(0, total, 7):
        for pinned in range(0, total, 11):
            budgets = Budgets(device, pinned, None)
            found = place(groups, budgets)
            at = [0, 0, 0]
            for group, homes in zip(groups, found.homes, strict=True):
                for one, home in zip(group, homes, strict=True):
                    at[home] += one.nbytes
            assert tuple(at) == found.bytes_at
            assert sum(at) == total
            assert at[P] <= pinned
            if at[P] + at[N]:
                assert at[D] + found.window_bytes <= max(device, found.window_bytes)
                assert found.window_bytes >= 42, "the largest group goes through a step together"
            assert found == place(groups, budgets), "it is a pure function"


def test_temporary_memory_is_taken_from_the_device() -> None:
    groups = [[item(10)] for _ in range(10)]
    assert place(groups, Budgets(100, 0, None)).bytes_at == (100, 0, 0)
    found = place(groups, Budgets(100, 0, None, working_bytes=20))
    assert (found.window_bytes, found.bytes_at) == (30, (50, 0, 50))


def test_what_refreshes_hold_counts_where_the_cell_is_in_memory() -> None:
    groups = [[item(10, beside=10.0)], [item(10)]]
    assert place(groups, Budgets(30)).bytes_at == (20, 0, 0)
    found = place(groups * 4, Budgets(60, 0, None))
    assert found.window_bytes == 30
    # A byte of the first kind takes two and saves as much as one of the second.
    assert found.homes == ((N,), (D,), (N,), (D,), (N,), (D,), (N,), (N,))


def test_notes_take_room_where_the_cell_is_away() -> None:
    groups = [[item(10, noted=30)]]
    assert place(groups, Budgets(0, 0, 40 + 40)).homes == ((N,),)
    with pytest.raises(StoreFullError):
        place(groups, Budgets(0, 0, 40 + 39))
    assert place(groups, Budgets(0, 39, 40 + 40)).homes == ((N,),)


def test_no_room_says_how_much_is_missing_and_which_budget_to_change() -> None:
    with pytest.raises(StoreFullError) as raised:
        place([[item(100)], [item(50)]], Budgets(40, 30, 0))
    text = str(raised.value)
    assert "takes 150 bytes" in text
    assert "pinned 30" in text
    assert "after 100 for what flows" in text
    for name in ("device_budget", "host_budget", "nvme_path", "nvme_budget", "max_precond_dim"):
        assert name in text


def test_a_tier_that_does_not_exist_takes_nothing() -> None:
    with pytest.raises(StoreFullError, match="room of none"):
        place([[item(1)]], Budgets(0, 0, 0))
    assert place([[item(0)]], Budgets(0, 0, 0)).homes == ((D,),)
    assert place([], Budgets(0)).homes == ()


def test_what_refreshes_hold_counts_on_the_disk_too() -> None:
    groups = [[item(10, beside=5.0)] for _ in range(4)]
    rewritten = 4 * 10
    found = place(groups, Budgets(0, 0, 60 + rewritten))
    assert (found.bytes_at, found.taken_bytes_at) == ((0, 0, 40), (0, 0, 60))
    with pytest.raises(StoreFullError):
        place(groups, Budgets(0, 0, 59 + rewritten))
