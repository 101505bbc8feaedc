import pytest

from optkit.quantities import parameters, size


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (81_384, "81.4 kB"),
        (135e6, "135.0 MB"),
        (2.5e9, "2.5 GB"),
        (1.5e12, "1,500.0 GB"),
    ],
)
def test_bytes_come_in_the_largest_unit_of_which_there_is_one(count, said):
    assert size(count) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (10, "10 parameters"),
        (20_426, "20.4 k parameters"),
        (134_515_008, "134.5 M parameters"),
        (1_100_048_384, "1.1 B parameters"),
    ],
)
def test_so_do_parameters(count, said):
    assert parameters(count) == said
