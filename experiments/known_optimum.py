"""Does `dqn` find the optimum, and does it need the hand-over backup?

    python experiments/known_optimum.py

Twelve random turn-based problems (2, 3 and 6 levels; gamma 0.8, 0.9, 0.99 and 1) with traps where
a level can live on small rewards of its own, solved by dynamic programming. `handover` bootstraps
from the level that acts next, `stock` from the same level's own next turn, as multi-agent RLlib
does; networks, data and budget are the same. score = (return - random) / (optimum - random), by
exact evaluation of the greedy policy. Results: known_optimum.csv and known_optimum.md beside this.
"""

import argparse
import platform
import time
from pathlib import Path

import numpy as np
import pandas as pd
import ray
import torch

from rlhf_ray.algorithms import AlgorithmSettings, build_algorithm, level_weights, network_settings
from rlhf_ray.networks import LevelQNetworks, masked
from rlhf_ray.testing import Decide, Problem, known_optimum_env, random_problem, score

LEVELS = (2, 3, 6)
GAMMAS = (0.8, 0.9, 0.99, 1.0)


def learn(problem: Problem, settings: AlgorithmSettings) -> Decide:
    """The greedy policy after a trial."""
    shape = {
        "n_features": problem.n_features,
        "n_actions": problem.n_actions,
        "settings": settings,
    }
    algorithm = build_algorithm(
        "dqn",
        env_creator=lambda config: known_optimum_env(problem, settings.seed),
        env_config={},
        levels=problem.levels,
        **shape,
    )
    for _ in range(settings.n_episodes // settings.episodes_per_iteration):
        algorithm.train()
    networks = LevelQNetworks(network_settings("dqn", n_levels=len(problem.levels), **shape))
    networks.load_state_dict(level_weights(algorithm))
    algorithm.stop()
    views = [networks.level(level) for level in range(len(problem.levels))]

    @torch.no_grad()
    def decide(level: int, features: np.ndarray, mask: np.ndarray) -> int:
        values_A = views[level].values(torch.from_numpy(features).unsqueeze(0))[0]
        return int(masked(values_A, torch.from_numpy(mask)).argmax())

    return decide


def run(seed: int, n_episodes: int) -> pd.DataFrame:
    rows = []
    for n_levels in LEVELS:
        for gamma in GAMMAS:
            problem = random_problem(seed, n_levels, gamma=gamma)
            row: dict[str, float] = {"levels": n_levels, "gamma": gamma, "problem": seed}
            for name, stock in (("handover", False), ("stock", True)):
                settings = AlgorithmSettings(
                    gamma=gamma, epsilon=0.1, n_episodes=n_episodes, seed=seed, stock=stock
                )
                row[name] = round(score(problem, learn(problem, settings)), 3)
            rows.append(row)
            seed += 1
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> str:
    scores = table[["handover", "stock"]]
    rows = {
        "mean": scores.mean(),
        "sd": scores.std(),
        "lowest": scores.min(),
        "problems at 0.95 or more": (scores >= 0.95).sum(),
    }
    lines = ["| score | handover | stock |", "| --- | --- | --- |"]
    lines += [f"| {name} | {v['handover']:.3g} | {v['stock']:.3g} |" for name, v in rows.items()]
    lines += ["", "| levels | gamma | handover | stock |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {row.levels:.0f} | {row.gamma:g} | {row.handover:.3f} | {row.stock:.3f} |"
        for row in table.itertuples()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first problem (default 0)")
    parser.add_argument("--episodes", type=int, default=500, help="per trial (default 500)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    table = run(args.seed, args.episodes)
    where = Path(__file__).with_suffix("")
    table.to_csv(where.with_suffix(".csv"), index=False)
    head = (
        f"`python experiments/known_optimum.py --seed {args.seed} --episodes {args.episodes}`: "
        f"{len(table)} problems, {time.process_time():.0f} s of CPU time on one core of "
        f"{platform.machine()}, torch {torch.__version__}, ray {ray.__version__}.\n\n"
    )
    where.with_suffix(".md").write_text(head + summary(table) + "\n")
    print(head + summary(table))


if __name__ == "__main__":
    main()
