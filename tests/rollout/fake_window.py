"""A window without a screen: its keys are written down beforehand, tick by tick."""

from recap_ds.rollout.keyboard import Keys, Window


def tap(*keys):
    return Keys(held=frozenset(keys), pressed=frozenset(keys))


def hold(*keys):
    return Keys(held=frozenset(keys))


NOTHING = Keys()


class FakeWindow(Window):
    """Keeps what it was shown."""

    def __init__(self, *ticks):
        self._ticks = iter(ticks)
        self.shown, self.lines, self.is_closed = [], [], False

    def tick(self, pictures, lines):
        self.shown.append(pictures)
        self.lines.append(lines)
        return next(self._ticks)

    def close(self):
        self.is_closed = True
