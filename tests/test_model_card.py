"""The model card: intervals by hand, sites without their names, and what nobody has said stands there as not known."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fedserver.publish.card import Words, card, interval, markdown, page, read_words, site_names
from shared_models.errors import StudyInvalid
from tests.releases import facts, tiny_study


def told(words: Words | None = None, **tables: Any) -> dict[str, Any]:
    study = tiny_study(**tables)
    return card(study, "3", facts(study), words or Words(), None, {}, "federation")


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    # 0.9 +- 1.96 * 0.1 / sqrt(19), as the deviation is of the 20 cases themselves
    row = {"measure": "dice", "value": 0.9, "deviation": 0.1, "cases": 20}
    assert interval(row) == [0.855, 0.945]


def test_the_interval_of_an_auroc_is_hanley_and_mcneils():
    # their table of 58 abnormal and 51 normal images: area 0.893, standard error 0.032 (Hanley & McNeil 1982, p. 33)
    row = {"measure": "auroc", "value": 0.893, "positives": 51, "cases": 109}
    low, high = interval(row) or [0.0, 0.0]
    assert (high - low) / 2 / 1.96 == pytest.approx(0.032, abs=0.001)


@pytest.mark.parametrize(
    "row",
    [
        {"measure": "dice", "value": None, "deviation": None, "cases": 0},
        {"measure": "dice", "value": 0.9, "deviation": 0.0, "cases": 1},
        {"measure": "auroc", "value": 0.9, "positives": 0, "cases": 20},
        {"measure": "c_index", "value": 0.7, "cases": 20, "events": 9},
    ],
)
def test_there_is_no_interval_where_the_counts_give_none(row):
    assert interval(row) is None


def test_sites_are_letters_in_the_order_of_their_score_unless_the_study_names_them():
    study = tiny_study()
    assert site_names(study, facts(study)) == {"north": "site A", "south": "site B"}
    named = tiny_study(evaluate={"publish_sites": True})
    assert site_names(named, facts(named)) == {"north": "north", "south": "south"}


def test_no_name_of_a_site_stands_in_a_card_whose_study_does_not_publish_them():
    made = told()
    for text in (str(made), markdown(made), page(made)):
        assert "north" not in text
        assert "south" not in text
    assert made["performance"]["labels"]["lung"]["worst"] == "site B"


def test_what_nobody_has_said_is_told_as_not_known():
    made = told()
    assert made["intended_use"] == made["subgroups"] == made["calibration"] == "not known"
    assert len(made["not_known"]) == 6
    said = Words("Lungs for planning", populations="adults", subgroups="sex: no gap", authors="A", licence="CC BY 4.0")
    assert told(said)["not_known"] == ["how far its probabilities can be taken at their word"]


def test_calibration_is_told_where_the_task_counts_it():
    study = tiny_study()
    found = facts(study)
    found["test"]["lung"]["all_cases"] |= {"ece": 0.04, "brier": 0.1}
    made = card(study, "1", found, Words(), None, {}, "federation")
    assert made["calibration"] == {"lung": {"ece": 0.04, "brier": 0.1}}
    assert "expected calibration error 0.040" in markdown(made)


def test_data_cards_add_up_and_withheld_cells_add_nothing():
    study = tiny_study()
    cards: dict[str, dict[str, Any]] = {
        "north": {"tables": {"scanner": {"A": 40, "B": None}}},
        "south": {"tables": {"scanner": {"A": 12, "B": 30}}},
    }
    made = card(study, "1", facts(study), Words(), None, cards, "federation")
    assert made["populations"]["cases"] == {"scanner": {"A": 52, "B": 30}}
    assert "A 52, B 30" in page(made)


def test_an_unfinished_or_untested_run_or_a_simulation_says_so():
    study = tiny_study()
    found = facts(study) | {"finished": False, "rounds_planned": 9, "test": {}, "not_tested": {"north": {}}}
    limits = " ".join(card(study, "1", found, Words(), None, {}, "simulation")["limits"])
    for words in ("2 of 9 rounds", "not scored on test patients", "simulation", "1 of the sites"):
        assert words in limits


def test_words_are_text_and_never_mark_up():
    bad = '<img src=x onerror="alert(1)"> [link](http://evil) | `code`'
    made = told(Words(intended_use=bad))

    class Tags(HTMLParser):
        found: ClassVar[set[str]] = set()

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.found.add(tag)

    parser = Tags()
    parser.feed(page(made))
    assert not parser.found & {"img", "a", "script"}
    assert "\\<img" in markdown(made)
    assert "\\[link\\]" in markdown(made)


def test_words_come_from_a_toml_file_and_a_wrong_key_is_named(tmp_path: Path):
    path = tmp_path / "card.toml"
    path.write_text('intended_use = "x"\nlimits = ["only adults"]\n')
    assert read_words(path) == Words("x", limits=("only adults",))
    path.write_text('intended_us = "x"\n')
    with pytest.raises(StudyInvalid, match="intended_us"):
        read_words(path)
