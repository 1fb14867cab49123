"""``.deepspeed_env``: what DeepSpeed's launcher would read, and what it would die of."""

from pathlib import Path

import pytest

from recap_ds.doctor.environment import environment_files, environment_finding, environment_variables


@pytest.fixture
def files(tmp_path, monkeypatch) -> list[Path]:
    """One in the home folder, one in the working folder."""
    found = []
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
        found.append(tmp_path / name / ".deepspeed_env")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return found


def test_the_working_folder_s_lines_win(files):
    assert environment_files({}) == [] and environment_finding([], {}).level == "ok"
    files[0].write_text("A=1\nB=1\n")
    files[1].write_text("B=2=2 x")
    assert environment_files({}) == files
    assert environment_variables(files) == {"A": "1", "B": "2=2 x"}
    assert environment_finding(files).level == "ok" and "A, B" in environment_finding(files).what


def test_another_name_may_be_relative_or_one_absolute_file(files):
    files[1].with_name("cluster.env").write_text("")
    place = files[1].with_name("cluster.env")
    assert environment_files({"DS_ENV_FILE": "cluster.env"}) == [place]
    assert environment_files({"DS_ENV_FILE": str(place)}) == [place]
    assert environment_finding([place]).level == "ok"
    assert environment_finding([], {"DS_ENV_FILE": "absent"}).level == "fail"


@pytest.mark.parametrize(
    "line", ["", "# InfiniBand", "1X=2", "NCCL_DEBUG", 'A="b"', "A='b'", "A=$HOME", "A=b\r", "A=%h"]
)
def test_lines_the_launcher_cannot_bear_are_named(files, line):
    files[1].write_bytes(f"GOOD=1\n{line}\nGOOD=2\n".encode())
    finding = environment_finding(environment_files({}))
    assert finding.level == "fail" and f"{files[1]}, line 2: {line!r}" in finding.what and "NAME=value" in finding.mend
