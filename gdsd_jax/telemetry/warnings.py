"""Warns of known signs that a run is about to collapse, and names the settings to check."""

from __future__ import annotations

from collections.abc import Mapping

# A share above the first two, or a diversity below the last, causes a warning.
CLIPPED, ZERO_SPREAD, DIVERSITY = 0.9, 0.9, 0.1


def precursors(metrics: Mapping[str, float]) -> dict[str, str]:
    """Returns a one-line warning for each sign that is present, by its name; a missing metric causes no warning.

    Args:
      metrics: metrics of one iteration, by the names that `train` writes. `policy/clipped` is the share of ratios that
        the trust region clips in the inner updates after the first, and `clipped/update_N` is that share in update N.
        `reward/zero_spread` is the share of groups whose completions all earn the same reward. `completion/diversity`
        is 0 if the completions of each group are all equal, and 1 if they all differ.
    """
    lines = {}
    by_update = [value for name, value in metrics.items() if name.startswith("clipped/")]
    clipped = max([metrics.get("policy/clipped", 0.0), *by_update])
    flat = metrics.get("reward/zero_spread", 0.0)
    diversity = metrics.get("completion/diversity", 1.0)
    if clipped > CLIPPED:
        lines["clipped"] = (
            f"clipped share {clipped:.2f} of an inner update is above {CLIPPED}: most scores have no gradient; look at "
            "eps_low and eps_high of config.settings, config.inner_updates, config.optimizer.learning_rate"
        )
    if flat > ZERO_SPREAD:
        lines["zero_spread"] = (
            f"zero-spread share {flat:.2f} is above {ZERO_SPREAD}: most groups teach nothing; look at "
            "config.group_size, config.sampler.temperature, the difficulty of config.task"
        )
    if diversity < DIVERSITY:
        lines["diversity"] = (
            f"diversity {diversity:.2f} is below {DIVERSITY}: the completions of a prompt repeat each other; look at "
            "config.sampler.temperature, beta of config.settings, config.optimizer.learning_rate"
        )
    return lines
