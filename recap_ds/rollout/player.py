"""Plays episodes in one environment, in the environment's own process: executes chunks, keeps time, records, and lets
a corrector take over and hand back.

A picture is rendered where the policy looks, and everywhere if the plan keeps pictures; never otherwise.

    K executed actions
"""

import numpy as np

from recap_ds.envs.interface import Environment, observe
from recap_ds.rollout.corrector import Corrector, Moment
from recap_ds.rollout.episode import EpisodePlan, Look, PlayedEpisode, PlayRules


class Player:
    def __init__(self, env: Environment, rules: PlayRules, corrector: Corrector) -> None:
        self._env, self._rules, self._corrector = env, rules, corrector
        self._middle = (env.spec.action_high + env.spec.action_low) / 2
        self._half_range = (env.spec.action_high - env.spec.action_low) / 2

    def begin(self, plan: EpisodePlan) -> Look | PlayedEpisode:
        """Start an episode; one that needs no policy is played to the end at once."""
        self._plan = plan
        self._frames: list[tuple[np.ndarray, np.ndarray, float, bool]] = []
        self._pictures: list[dict[str, np.ndarray]] = []
        self._num_rendered = 0
        self._ended = self._success = self._terminated = False
        self._env.reset(plan.seed, plan.task)
        if plan.mode == "corrected" and self._corrector.begin(self._moment()):
            self._correct()
        if plan.mode == "expert":
            self._demonstrate()
        elif plan.stands_in:
            self._stand_in()
        elif not self._ended:
            return self._look()
        return self._finish()

    def play(self, actions: np.ndarray, value: float | None = None) -> Look | PlayedEpisode:
        """Execute ``actions`` [K, A] until the policy is to look again or the episode is over.

        ``value``: what a critic says of the observation that the policy acted on; in mode corrected a takeover goes by
        it, or without it by every frame.
        """
        corrected = self._plan.mode == "corrected"
        taken = corrected and value is not None and self._corrector.watch(self._moment(), value, len(actions))
        for action in () if taken else actions:
            self._step(action, is_expert=False)
            if self._ended:
                return self._finish()
            if corrected and value is None and self._corrector.watch(self._moment(), None, 1):
                taken = True
                break
        if taken:
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
            if self._plan.mode == "corrected" and not self._ended and self._corrector.watch(self._moment(), None, 1):
                self._correct()

    def _noise(self) -> np.random.Generator:
        """Keyed by the episode's number alone."""
        return np.random.default_rng([self._rules.seed, self._plan.number])

    def _correct(self) -> None:
        """The corrector acts until it hands back; then the policy has another chance."""
        while not self._ended and (action := self._corrector.act(self._moment())) is not None:
            self._step(action, is_expert=True)

    def _moment(self) -> Moment:
        last_action = self._frames[-1][1] if self._frames else None
        return Moment(len(self._frames), self._plan.prompt, self._pictures_now, last_action)

    def _step(self, action: np.ndarray, is_expert: bool) -> None:
        spec = self._env.spec
        state = self._env.state()
        # What is recorded is what the world is given, to the last bit: an episode can be replayed from its file.
        executed = np.clip(action, spec.action_low, spec.action_high).astype(np.float32)
        if self._plan.keeps_pictures:
            self._pictures_now()
        result = self._env.step(executed)
        self._frames.append((state, executed, result.reward, is_expert))
        self._success = result.success
        self._terminated = result.success or result.terminated
        self._ended = self._terminated or result.truncated or len(self._frames) >= spec.max_steps

    def _look(self) -> Look:
        return Look(len(self._frames), observe(self._env, self._pictures_now(), self._plan.prompt))

    def _pictures_now(self) -> dict[str, np.ndarray]:
        """This frame's; where all are kept, rendered once: whoever looks at a frame, its action is still to come."""
        if not self._plan.keeps_pictures:
            return self._render()
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
            terminated=self._terminated,
            states=np.array(states, np.float32),
            actions=np.array(actions, np.float32),
            rewards=np.array(rewards, np.float32),
            expert=np.array(expert, bool),
            pictures=pictures,
            num_rendered=self._num_rendered,
        )
