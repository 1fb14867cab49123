"""Lines on a disk that is full for a while."""

import errno

import pytest

from recap_ds.files.lines import LineFile, append_line


class FullAfter:
    """An unbuffered file on a disk with ``room`` bytes left."""

    def __init__(self, room):
        self.room, self.data = room, b""

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = data[: self.room]
        self.room -= len(taken)
        self.data += taken
        return len(taken)


@pytest.mark.parametrize("room", [0, 3, 6])
def test_what_a_full_disk_refused_is_written_later_and_in_order(tmp_path, room):
    lines = LineFile(tmp_path / "lines")
    lines.close()
    lines._file = disk = FullAfter(room)
    assert "No space left on device" in lines.add("first")[-40:] if room < 6 else lines.add("first") is None
    assert lines.add("second") == f"{tmp_path / 'lines'} cannot be written (No space left on device)"
    disk.room = 1000
    assert lines.add("third") is None
    assert disk.data == b"first\nsecond\nthird\n"


def test_lines_are_there_at_once_and_a_later_start_appends(tmp_path):
    path = tmp_path / "lines"
    for text in ("one", "two"):
        lines = LineFile(path)
        assert lines.add(text) is None and path.read_text().endswith(f"{text}\n")
        lines.close()
    append_line(path, "three")
    assert path.read_text() == "one\ntwo\nthree\n"


def test_a_list_that_cannot_be_written_goes_to_stderr(tmp_path, capsys):
    append_line(tmp_path / "nowhere" / "lines", '{"slot": 3}')
    said = capsys.readouterr().err
    assert said == f'warning: {tmp_path}/nowhere/lines cannot be written (No such file or directory): {{"slot": 3}}\n'
