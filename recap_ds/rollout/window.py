"""The window a person watches and corrects in: pygame, the extra ``keyboard``. Knows pictures, lines of text and keys.

P picture side
"""

import importlib
import os
from types import ModuleType

import numpy as np

from recap_ds.errors import UsageError
from recap_ds.rollout.keyboard import Keys, Window

INSTALL = "pip install 'recap_ds[keyboard]'"
# What SDL falls back to where there is no screen: windows that nobody sees.
UNSEEN_DRIVER = "offscreen"
# Pictures are enlarged by whole factors to about this side.
SHOWN_SIZE = 480
FONT_SIZE, LINE_HEIGHT, MARGIN = 20, 24, 8
# Room for the lines of help, however small the pictures are.
MIN_WIDTH = 840
BACKGROUND, INK = (24, 24, 24), (235, 235, 235)


def check_display() -> None:
    """UsageError where no window can be opened; shows nothing."""
    _start_display().quit()


class PygameWindow(Window):
    """``fps``: ticks a second."""

    def __init__(self, title: str, fps: float) -> None:
        self._pygame = _start_display()
        self._pygame.display.set_caption(title)
        self._pygame.font.init()
        self._font = self._pygame.font.Font(None, FONT_SIZE)
        self._clock = self._pygame.time.Clock()
        self._fps = fps
        self._size = (0, 0)
        self._down: set[str] = set()

    def tick(self, pictures: dict[str, np.ndarray], lines: list[str]) -> Keys:
        self._draw(pictures, lines)
        self._clock.tick(self._fps)
        pygame, pressed, closed = self._pygame, set(), False
        for event in pygame.event.get():
            if event.type == pygame.KEYDOWN:
                pressed.add(pygame.key.name(event.key))
                self._down.add(pygame.key.name(event.key))
            elif event.type == pygame.KEYUP:
                self._down.discard(pygame.key.name(event.key))
            closed |= event.type == pygame.QUIT
        return Keys(frozenset(self._down | pressed), frozenset(pressed), closed)

    def close(self) -> None:
        self._pygame.quit()

    def _draw(self, pictures: dict[str, np.ndarray], lines: list[str]) -> None:
        """Cameras side by side under their names, the lines below."""
        pygame = self._pygame
        shown = {camera: _enlarged(picture) for camera, picture in pictures.items()}
        side = max(len(picture) for picture in shown.values())
        width = max(MIN_WIDTH, MARGIN + len(shown) * (side + MARGIN))
        size = (width, side + (1 + len(lines)) * LINE_HEIGHT + 2 * MARGIN)
        if size != self._size:
            pygame.display.set_mode(size)
            self._size = size
        screen = pygame.display.get_surface()
        screen.fill(BACKGROUND)
        for number, (camera, picture) in enumerate(shown.items()):
            left = MARGIN + number * (side + MARGIN)
            self._write(camera, left, MARGIN)
            screen.blit(pygame.surfarray.make_surface(picture.swapaxes(0, 1)), (left, MARGIN + LINE_HEIGHT))
        for number, line in enumerate(lines, start=1):
            self._write(line, MARGIN, side + MARGIN + number * LINE_HEIGHT + MARGIN // 2)
        pygame.display.flip()

    def _write(self, text: str, left: int, top: int) -> None:
        self._pygame.display.get_surface().blit(self._font.render(text, True, INK), (left, top))


def _enlarged(picture: np.ndarray) -> np.ndarray:
    """uint8 [nP, nP, 3]."""
    factor = max(1, SHOWN_SIZE // len(picture))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _start_display() -> ModuleType:
    # pygame greets on standard output, which is where results are printed.
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    # Who ends this process means it: SDL would turn the signal into one more event.
    os.environ.setdefault("SDL_NO_SIGNAL_HANDLERS", "1")
    try:
        pygame = importlib.import_module("pygame")
    except ImportError as error:
        raise UsageError(f"--keyboard: pygame cannot be imported ({error}); {INSTALL}") from None
    try:
        pygame.display.init()
    except pygame.error as error:
        raise UsageError(f"--keyboard: no window can be opened ({error}); {_where()}") from None
    if pygame.display.get_driver() == UNSEEN_DRIVER and os.environ.get("SDL_VIDEODRIVER") != UNSEEN_DRIVER:
        pygame.display.quit()
        raise UsageError(f"--keyboard: no window can be opened (no screen); {_where()}")
    return pygame


def _where() -> str:
    display = os.environ.get("DISPLAY")
    said = f"DISPLAY is {display}" if display else "DISPLAY is not set"
    return f"{said}: run it at a machine with a screen, or over ssh -Y"
