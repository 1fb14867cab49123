"""What a command said, as its tests look at it."""


def one_line(capsys) -> str:
    """The one line of an error that a user is meant to see, and no traceback."""
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in captured.err
    return line
