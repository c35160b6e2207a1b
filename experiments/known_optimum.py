"""Do the algorithms find the optimum, and do they need the hand-over backup?

    python experiments/known_optimum.py --processes 2

Thirty random turn-based problems (2, 3 and 6 levels; gamma 0.8, 0.9, 0.99 and 1) with traps where
a level can live on small rewards of its own, solved by dynamic programming; three seeds each.
`q-learning`, `dqn` and `ppo` bootstrap from the level that acts next, `stock` from the same level's
own next turn, as multi-agent RLlib does; networks, data and budget are the same. score = (return -
random) / (optimum - random), by exact evaluation of the greedy policy, as it would be saved.
Results: known_optimum.csv and known_optimum.md beside this; runs that are in the csv, with today's
settings and episodes, are not made again.
"""

import argparse
import itertools
import multiprocessing
import platform
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pandas as pd
import ray
import torch

from rlhf_ray.algorithms import AlgorithmSettings, build_algorithm, level_weights, network_settings
from rlhf_ray.policies.policy import Policy
from rlhf_ray.testing import Problem, known_optimum_env, random_problem, score

LEVELS = (2, 3, 6)
GAMMAS = (0.8, 0.9, 0.99, 1.0)
N_PROBLEMS, N_SEEDS = 30, 3
N_STOCK = 12
"""Problems of the first seed that stock is shown on: each pair of levels and gamma once."""

SETTINGS: dict[str, dict[str, Any]] = {
    # as steps cost little here, tables may look long; the problems have no chance, so alpha is high
    "q-learning": {"epsilon": 0.1, "decay_fraction": 0.8, "alpha": 0.5, "updates_per_step": 1.0},
    "dqn": {"epsilon": 0.1},
    "ppo": {"epsilon": 0.0},
}
"""What differs from the defaults."""

EPISODES = {
    "q-learning": {2: 1000, 3: 4000, 6: 12000},
    "dqn": {2: 500, 3: 500, 6: 1000},
    "ppo": {2: 2000, 3: 3000, 6: 4000},
}
METHODS = [*SETTINGS, "dqn stock", "ppo stock"]
KEY = ["method", "problem", "seed"]


def problem_of(number: int) -> Problem:
    n_levels, gamma = LEVELS[number % len(LEVELS)], GAMMAS[number % len(GAMMAS)]
    return random_problem(number, n_levels, gamma=gamma)


def learn(algorithm: str, problem: Problem, settings: AlgorithmSettings) -> Policy:
    """The policy after a trial."""
    n_levels = len(problem.levels)
    sizes = {"n_features": problem.n_features, "n_actions": problem.n_actions}
    trial = build_algorithm(
        algorithm,
        env_creator=lambda config: known_optimum_env(problem, settings.seed),
        env_config={},
        levels=problem.levels,
        settings=settings,
        **sizes,
    )
    while not trial.train()["done"]:
        pass
    policy = Policy(
        levels=problem.levels,
        features=tuple(f"feature {i}" for i in range(problem.n_features)),
        operations=tuple({"name": f"{i}"} for i in range(problem.n_actions // n_levels)),
        network=network_settings(algorithm, n_levels=n_levels, settings=settings, **sizes),
        weights=level_weights(trial),
    )
    trial.stop()
    return policy


def run(method: str, number: int, seed: int) -> dict[str, Any]:
    began, problem = time.process_time(), problem_of(number)
    algorithm, _, stock = method.partition(" ")
    settings = AlgorithmSettings(
        gamma=problem.gamma,
        n_episodes=EPISODES[algorithm][len(problem.levels)],
        seed=seed,
        stock=bool(stock),
        **SETTINGS[algorithm],
    )
    policy = learn(algorithm, problem, settings)
    return {
        "method": method,
        "problem": number,
        "seed": seed,
        "levels": len(problem.levels),
        "gamma": problem.gamma,
        "episodes": settings.n_episodes,
        "score": round(score(problem, policy.act), 4),
        "cpu_s": round(time.process_time() - began, 1),
        "settings": settings_of(method),
    }


def settings_of(method: str) -> str:
    """What a method's runs differ in from the defaults, in words."""
    settings = SETTINGS[method.partition(" ")[0]]
    return " ".join(f"{name}={value}" for name, value in settings.items())


def holds(row: Mapping[str, Any]) -> bool:
    """Whether a row is of today's settings; earlier rows say nothing of them but the episodes."""
    method, settings = row["method"], row.get("settings")
    same = not isinstance(settings, str) or settings == settings_of(method)
    return same and row["episodes"] == EPISODES[method.partition(" ")[0]][row["levels"]]


def start_process() -> None:
    torch.set_num_threads(1)
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
    )


def summary(table: pd.DataFrame) -> str:
    lines = [
        "| method | runs | seeds | mean | sd over runs | lowest | share at 0.95 or more | CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in METHODS:
        mine = table[table.method == method]
        s = mine.score
        lines.append(
            f"| {method} | {len(mine)} | {mine.seed.nunique()} | {s.mean():.3f} | {s.std():.3f} | "
            f"{s.min():.3f} | {(s >= 0.95).mean():.2f} | {mine.cpu_s.sum():.0f} |"
        )
    lines += ["", "Mean score by levels and gamma (episodes per trial):", ""]
    lines += [
        "| levels | gamma | " + " | ".join(METHODS) + " |",
        "| --- " * (2 + len(METHODS)) + "|",
    ]
    for (n_levels, gamma), cell in table.groupby(["levels", "gamma"]):
        found = []
        for method in METHODS:
            mine = cell[cell.method == method]
            found.append(f"{mine.score.mean():.3f} ({mine.episodes.max()})" if len(mine) else "")
        lines.append(f"| {n_levels} | {gamma:g} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def write(rows: list[dict[str, Any]]) -> None:
    """Table and summary of the runs so far."""
    where, table = Path(__file__), pd.DataFrame(rows).sort_values(KEY)
    table.to_csv(where.with_suffix(".csv"), index=False)
    head = (
        f"`python experiments/known_optimum.py`: {N_PROBLEMS} problems, {N_SEEDS} seeds (stock: "
        f"{N_STOCK} problems, 1 seed), {len(table)} runs on one core of {platform.machine()} each, "
        f"torch {torch.__version__}, ray {ray.__version__}.\n\n"
    )
    where.with_suffix(".md").write_text(head + summary(table) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1, help="runs at once (default 1)")
    args = parser.parse_args()
    where = Path(__file__).with_suffix(".csv")
    found = pd.read_csv(where).to_dict("records") if where.exists() else []
    rows: list[dict[str, Any]] = [row for row in found if holds(row)]
    done = {tuple(row[name] for name in KEY) for row in rows}
    stock = [method for method in METHODS if "stock" in method]
    wanted = [
        *itertools.product(SETTINGS, range(N_PROBLEMS), range(N_SEEDS)),
        *itertools.product(stock, range(N_STOCK), [0]),
    ]
    wanted.sort(key=lambda key: key[2])  # the first seed first, should it be cut off
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context, initializer=start_process) as pool:
        for future in as_completed([pool.submit(run, *w) for w in wanted if w not in done]):
            rows.append(future.result())
            write(rows)
    print(where.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
