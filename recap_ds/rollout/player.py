"""Plays episodes in one environment, in the environment's own process: executes chunks, keeps time, records, and lets
the scripted expert take over where the policy stalls and hand back later.

A picture is rendered where the policy looks, and everywhere if the plan keeps pictures; never otherwise.

    K executed actions
"""

import numpy as np

from recap_ds.envs.interface import Environment, observe
from recap_ds.rollout.episode import EpisodePlan, Look, PlayedEpisode, PlayRules
from recap_ds.rollout.takeover import Takeover


class Player:
    def __init__(self, env: Environment, rules: PlayRules) -> None:
        self._env, self._rules = env, rules
        self._middle = (env.spec.action_high + env.spec.action_low) / 2
        self._half_range = (env.spec.action_high - env.spec.action_low) / 2

    def begin(self, plan: EpisodePlan) -> Look | PlayedEpisode:
        """Start an episode; one that needs no policy is played to the end at once."""
        self._plan = plan
        self._frames: list[tuple[np.ndarray, np.ndarray, float, bool]] = []
        self._pictures: list[dict[str, np.ndarray]] = []
        self._num_rendered = 0
        self._takeover = Takeover(self._rules.collect)
        self._ended = self._success = False
        self._env.reset(plan.seed, plan.task)
        if plan.mode == "expert":
            self._demonstrate()
        elif plan.stands_in:
            self._stand_in()
        else:
            return self._look()
        return self._finish()

    def play(self, actions: np.ndarray, value: float | None = None) -> Look | PlayedEpisode:
        """Execute ``actions`` [K, A] until the policy is to look again or the episode is over.

        ``value``: what a critic says of the observation that the policy acted on; in mode corrected a takeover goes by
        it, or without it by the environment's own progress.
        """
        corrected = self._plan.mode == "corrected"
        stalled = corrected and value is not None and self._takeover.stalls(value, len(actions))
        for action in () if stalled else actions:
            self._step(action, is_expert=False)
            if self._ended:
                return self._finish()
            if corrected and value is None and self._takeover.stalls(self._env.progress(), 1):
                stalled = True
                break
        if stalled:
            self._correct()
        return self._finish() if self._ended else self._look()

    def _demonstrate(self) -> None:
        noise = self._noise()
        while not self._ended:
            wobble = self._rules.collect.demo_noise * noise.standard_normal(len(self._half_range))
            self._step(self._env.expert_action() + self._half_range * wobble, is_expert=True)

    def _stand_in(self) -> None:
        """Slower, biased and noisier than the expert, in units of half the range of each action dim."""
        collect, noise = self._rules.collect, self._noise()
        bias = collect.expert_bias * noise.standard_normal(len(self._half_range))
        while not self._ended:
            wobble = bias + collect.expert_noise * noise.standard_normal(len(bias))
            slowed = self._middle + collect.expert_speed * (self._env.expert_action() - self._middle)
            self._step(slowed + self._half_range * wobble, is_expert=False)
            if self._plan.mode == "corrected" and not self._ended and self._takeover.stalls(self._env.progress(), 1):
                self._correct()

    def _noise(self) -> np.random.Generator:
        """Keyed by the episode's number alone."""
        return np.random.default_rng([self._rules.seed, self._plan.number])

    def _correct(self) -> None:
        """The expert acts for as long as a correction lasts; then the policy has another chance."""
        for _ in range(self._rules.collect.correction_frames):
            self._step(self._env.expert_action(), is_expert=True)
            if self._ended:
                return
        self._takeover.hand_back()

    def _step(self, action: np.ndarray, is_expert: bool) -> None:
        spec = self._env.spec
        state = self._env.state()
        # What is recorded is what the world is given, to the last bit: an episode can be replayed from its file.
        executed = np.clip(action, spec.action_low, spec.action_high).astype(np.float32)
        if self._plan.keeps_pictures:
            self._picture_now()
        result = self._env.step(executed)
        self._frames.append((state, executed, result.reward, is_expert))
        self._success = result.success
        self._ended = result.success or result.terminated or len(self._frames) >= spec.max_steps

    def _look(self) -> Look:
        frame = len(self._frames)
        if self._plan.keeps_pictures:
            images = self._picture_now()
        else:
            images = self._render()
        return Look(frame, observe(self._env, images, self._plan.prompt))

    def _picture_now(self) -> dict[str, np.ndarray]:
        """This frame's pictures, rendered once: when the policy looks at a frame, its action is still to come."""
        if len(self._pictures) == len(self._frames):
            self._pictures.append(self._render())
        return self._pictures[-1]

    def _render(self) -> dict[str, np.ndarray]:
        self._num_rendered += 1
        return self._env.images()

    def _finish(self) -> PlayedEpisode:
        states, actions, rewards, expert = (list(column) for column in zip(*self._frames, strict=True))
        pictures = None
        if self._plan.keeps_pictures:
            cameras = self._env.spec.cameras
            # A look at the very end of an episode has no frame of its own.
            pictures = {name: np.stack([p[name] for p in self._pictures[: len(states)]]) for name in cameras}
        return PlayedEpisode(
            plan=self._plan,
            success=self._success,
            states=np.array(states, np.float32),
            actions=np.array(actions, np.float32),
            rewards=np.array(rewards, np.float32),
            expert=np.array(expert, bool),
            pictures=pictures,
            num_rendered=self._num_rendered,
        )
