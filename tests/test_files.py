"""Results appear whole, and what killed processes left beside them goes."""

import os
import time

from megatron_cpt.files import whole_dir


def test_a_folder_that_a_killed_process_left_is_removed_after_a_day_and_not_before(tmp_path):
    left, at_work = tmp_path / ".out.abc.partial", tmp_path / ".out.def.partial"
    for folder in (left, at_work):
        folder.mkdir()
        (folder / "half").touch()
    long_ago = time.time() - 2 * 86400
    os.utime(left / "half", (long_ago, long_ago))
    for folder in (left, at_work):
        os.utime(folder, (long_ago, long_ago))
    with whole_dir(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.def.partial", "out"]
