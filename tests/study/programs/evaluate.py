"""Stands where launch/evaluate.py would: every second episode succeeds, under the guidances it was given."""

import json
import sys
from pathlib import Path

arguments = sys.argv[1:]
with open("journal", "a", encoding="utf-8") as journal:
    journal.write(json.dumps(["evaluate", *arguments]) + "\n")
settings = dict(word.split("=", 1) for word in arguments if "=" in word)
out, number = Path(arguments[arguments.index("--out") + 1]), int(arguments[arguments.index("--episodes") + 1])
episodes = [{"task": ("a", "b")[i // 2 % 2], "success": i % 2 == 0, "frames": 10 + i} for i in range(number)]
entries = [
    {"indicator": "positive", "guidance_beta": beta, "episodes": episodes}
    for beta in json.loads(settings["evaluation.guidance_betas"])
]
rollouts = {"num_episodes": number, "seed": int(settings["evaluation.rollout_seed"]), "fps": 10.0, "entries": entries}
out.write_text(json.dumps({"rollouts": rollouts}))
