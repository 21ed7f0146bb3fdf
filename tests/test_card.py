"""The data card: no small cell is told or can be derived, and it is the same bytes for the same data."""

import hashlib
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclient.gate.card import card_bytes, card_digest, card_of, withheld
from fedclient.gate.facts import needs_of
from fedclient.gate.run import check
from simulations.bench.gate import site_of
from simulations.fixtures.sown import LUNG, Set


def test_a_small_cell_is_withheld_and_the_next_smallest_with_it() -> None:
    assert withheld({"a": 40, "b": 5, "c": 20, "d": 0}, 65, 11) == {"a": 40, "b": None, "c": None, "d": 0}


def test_two_small_cells_that_hide_each_other_take_no_third() -> None:
    assert withheld({"a": 40, "b": 5, "c": 9}, 54, 11) == {"a": 40, "b": None, "c": None}


def test_small_cells_that_are_few_together_take_a_third() -> None:
    assert withheld({"a": 40, "b": 1, "c": 1, "d": 12}, 54, 11) == {"a": 40, "b": None, "c": None, "d": None}


def test_large_cells_are_told_and_what_hangs_on_another_table_is_withheld() -> None:
    assert withheld({"a": 40, "b": 11}, 51, 11) == {"a": 40, "b": 11}
    assert withheld({"a": 40, "b": 20, "c": 30}, 90, 11, also=["b"]) == {"a": 40, "b": None, "c": None}


def test_cells_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to 7, not to 8"):
        withheld({"a": 7}, 8, 11)


def fitting(total: int, told: Sequence[int | None], most: int) -> list[tuple[int, ...]]:
    """Every way to fill the withheld cells, each at least 1, so that all add up."""
    gaps = sum(count is None for count in told)
    rest = total - sum(count or 0 for count in told)
    return [fill for fill in product(range(1, most + 1), repeat=gaps) if sum(fill) == rest]


@given(st.lists(st.integers(0, 14), min_size=1, max_size=4).filter(lambda cells: sum(cells) >= 5))
def test_no_withheld_cell_can_be_derived_from_the_others_and_the_total(cells: list[int]) -> None:
    told = withheld({str(n): count for n, count in enumerate(cells)}, sum(cells), 5)
    shown = [told[str(n)] for n in range(len(cells))]
    assert all(count is None or count == 0 or count >= 5 for count in shown)
    assert all(count is None or count == true for count, true in zip(shown, cells, strict=True))
    if None in shown:
        ways = fitting(sum(cells), shown, sum(cells))
        assert all(len({way[n] for way in ways}) > 1 for n in range(len(ways[0])))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 patients to train on, and 3 to test on, of which one has no mask."""
    root = tmp_path_factory.mktemp("card")
    made = Set(root / "data")
    for n in range(15):
        made.film(n % 9, split="train" if n < 12 else "test")
    made.rows[-1]["mask"] = ""
    return made.finish()


def test_a_card_holds_counts_only_and_says_so_in_canonical_bytes(data: Path, tmp_path: Path) -> None:
    found = check(site_of(data, tmp_path), needs_of(LUNG))
    card = card_of(found, 11)
    assert card["cases"] == card["patients"] == 15
    split = card["tables"]["split"]
    assert split == {"train, labelled": None, "test, labelled": None, "test, not labelled": None}
    assert card["tables"]["patients"] == {"train": None, "test": None}
    assert card["tables"]["modality"] == {"picture": 15}
    assert card["tables"]["label lung"] == {"with": None, "without": None}
    assert card_bytes(card) == json.dumps(card, sort_keys=True, separators=(",", ":")).encode()
    assert card_digest(card) == hashlib.sha256(card_bytes(card)).hexdigest()
    assert card_bytes(card_of(check(site_of(data, tmp_path), needs_of(LUNG)), 11)) == card_bytes(card)


def test_a_site_may_raise_the_smallest_count_and_not_lower_it(data: Path, tmp_path: Path) -> None:
    found = check(site_of(data, tmp_path), needs_of(LUNG))
    assert card_of(found, 1) == card_of(found, 11)
    few = card_of(found, 20)
    assert (few["cases"], few["patients"], few["tables"], few["smallest_count"]) == (None, None, {}, 20)
