"""Which migrations are to be applied, and which sets of them are refused."""

from pathlib import Path

import pytest

from config.postgres import SQL_FOLDERS, Migration, MigrationRefused, read_migrations, to_apply

ONE, TWO, THREE = (Migration(f"000{n}_x", "", f"sum{n}") for n in (1, 2, 3))


def test_only_what_is_missing_is_applied_in_order():
    assert to_apply([ONE, TWO, THREE], [("0001_x", "sum1")]) == [TWO, THREE]
    assert to_apply([ONE, TWO], [("0001_x", "sum1"), ("0002_x", "sum2")]) == []
    assert to_apply([], []) == []


def test_a_file_changed_after_it_was_applied_is_refused():
    with pytest.raises(MigrationRefused, match="0001_x was changed"):
        to_apply([ONE, TWO], [("0001_x", "other")])


def test_a_database_newer_than_the_code_is_refused():
    with pytest.raises(MigrationRefused, match="0002_x, which this poolgate does not know"):
        to_apply([ONE], [("0001_x", "sum1"), ("0002_x", "sum2")])


def test_a_file_slipped_in_between_is_refused():
    with pytest.raises(MigrationRefused, match="0002_x comes before 0003_x"):
        to_apply([ONE, TWO, THREE], [("0001_x", "sum1"), ("0003_x", "sum3")])


def test_files_are_read_in_order_of_their_numbers(tmp_path: Path):
    for name in ("0010_b.sql", "0002_a.sql", "notes.txt"):
        (tmp_path / name).write_text("select 1")
    assert [migration.name for migration in read_migrations(tmp_path)] == ["0002_a", "0010_b"]


@pytest.mark.parametrize("name", ["1_a.sql", "0001.sql", "0001-a.sql", "0001_A.sql"])
def test_a_file_without_a_proper_name_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).touch()
    with pytest.raises(MigrationRefused, match="NNNN_words"):
        read_migrations(tmp_path)


def test_one_number_twice_is_refused(tmp_path: Path):
    for name in ("0001_a.sql", "0001_b.sql"):
        (tmp_path / name).touch()
    with pytest.raises(MigrationRefused, match="same number"):
        read_migrations(tmp_path)


def test_the_migrations_of_the_package_can_be_read():
    assert read_migrations(*SQL_FOLDERS)
