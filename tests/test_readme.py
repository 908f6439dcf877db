"""What the README says is what was measured."""

from tests.benchmarks.readme import README, with_table


def test_its_table_of_speed_is_that_of_the_benchmark():
    text = README.read_text()
    assert with_table(text) == text
