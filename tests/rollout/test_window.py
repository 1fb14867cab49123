"""The window: what keeps it from opening is said in one line; where pygame is, it reads keys without a screen too."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from recap_ds.errors import UsageError
from recap_ds.rollout.keyboard import LEAVE, MOVES, TAKE
from recap_ds.rollout.window import SHOWN_SIZE, PygameWindow, check_display


class NoScreen(Exception):
    pass


def made_pygame(driver, fails=False):
    def init():
        if fails:
            raise NoScreen("No available video device")

    display = SimpleNamespace(init=init, get_driver=lambda: driver, quit=lambda: None)
    return SimpleNamespace(display=display, error=NoScreen, quit=lambda: None)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(UsageError, match=r"^--keyboard: pygame cannot be imported \(.*\); pip install 'recap_ds\[key"):
        check_display()


def test_a_missing_screen_is_said(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("SDL_VIDEODRIVER", raising=False)
    monkeypatch.setitem(sys.modules, "pygame", made_pygame("offscreen"))
    with pytest.raises(UsageError, match=r"\(no screen\); DISPLAY is not set: run it at a machine with a screen"):
        check_display()
    monkeypatch.setenv("DISPLAY", ":7")
    monkeypatch.setitem(sys.modules, "pygame", made_pygame("x11", fails=True))
    with pytest.raises(UsageError, match=r"\(No available video device\); DISPLAY is :7: run it at a"):
        check_display()
    monkeypatch.setitem(sys.modules, "pygame", made_pygame("x11"))
    check_display()


def test_keys_are_held_from_down_to_up_and_pressed_once(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    pygame = pytest.importorskip("pygame")
    window = PygameWindow("test", fps=1000)
    pictures = {"top": np.full((96, 96, 3), (200, 10, 30), np.uint8), "wrist": np.zeros((96, 96, 3), np.uint8)}

    def tick(*events):
        for kind, name in events:
            pygame.event.post(pygame.event.Event(kind, key=pygame.key.key_code(name)))
        keys = window.tick(pictures, ["one line", "another"])
        return sorted(keys.held), sorted(keys.pressed), keys.closed

    try:
        assert tick() == ([], [], False)
        assert tick((pygame.KEYDOWN, "right"), (pygame.KEYDOWN, "w")) == (["right", "w"], ["right", "w"], False)
        assert tick() == (["right", "w"], [], False)
        assert tick((pygame.KEYUP, "w")) == (["right"], [], False)
        # A tap that is over before the tick is read counts for this one.
        assert tick((pygame.KEYDOWN, "t"), (pygame.KEYUP, "t")) == (["right", "t"], ["t"], False)
        assert tick() == (["right"], [], False)
        shown = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
        red = (shown == (200, 10, 30)).all(axis=2)
        assert red.sum() == SHOWN_SIZE**2 and shown.shape[1] >= 2 * SHOWN_SIZE
        pygame.event.post(pygame.event.Event(pygame.QUIT))
        assert tick()[2]
        # Every key that has a meaning is one that pygame knows by this name.
        for name in (TAKE, LEAVE, "space", "g", *"0123456789", *(key for pair in MOVES for key in pair)):
            assert pygame.key.name(pygame.key.key_code(name)) == name
    finally:
        window.close()
