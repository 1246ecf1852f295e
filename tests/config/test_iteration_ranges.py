"""Ranges of iterations as people write them."""

import pytest

from megatron_cpt.config.settings.iteration_ranges import (
    clipped,
    contains,
    merged,
    parse_range,
    ranges_text,
    read_ranges,
)
from megatron_cpt.errors import ConfigError


def test_ranges_are_read_merged_and_written_back():
    ranges = merged([parse_range("120-140"), parse_range("7"), parse_range("8 - 9"), parse_range("130-150")])
    assert ranges == ((7, 9), (120, 150))
    assert ranges_text(ranges) == ["7-9", "120-150"]
    assert [contains(ranges, n) for n in (6, 7, 9, 10, 120, 151)] == [False, True, True, False, True, False]
    assert clipped(ranges, 8, 130) == ((8, 9), (120, 130))


@pytest.mark.parametrize("text", ["", "a", "0-3", "5-4", "1-2-3", "-3"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ValueError, match="is no range"):
        parse_range(text)


def test_a_file_may_have_comments_and_names_its_bad_line(tmp_path):
    path = tmp_path / "skip_iterations.txt"
    assert read_ranges(path) == []
    path.write_text("# spikes\n3-4  # loss 9.1\n\n8\n")
    assert read_ranges(path) == [(3, 4), (8, 8)]
    path.write_text("3-4\nfive\n")
    with pytest.raises(ConfigError, match=r"txt:2: 'five' is no range"):
        read_ranges(path)
