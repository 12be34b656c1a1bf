"""A bench on which methods can differ: eight updates on every rollout, and enough iterations for a run to collapse.

    python -m gdsd_jax.compare --config configs/compare_stability.py --workdir runs/stability/seeds --seeds 5 \\
        --methods gdsd,gdsd_tlc,espo,spg --rates gdsd=R1,gdsd_tlc=R2,espo=R3,spg=R4

Hardware: CPU cores, a process on each (`--host_count`, `--host_index`); meant for ten core-hours in all.
Expected: nothing yet. The protocol below was written before any run, and no run of it is recorded.

Question. With one update per rollout GDSD's gradient is ESPO's times a constant, which Adam takes out, so a bench of
single updates cannot tell them apart. Do objectives on a bound drift or collapse when the same rollouts are used
eight times, and does GDSD not?

Protocol.
1. Task: 4x4 Sudoku, the embedded model and start of configs/tiny_sudoku.py; 128 completions an iteration (16 prompts
   of 8), 300 iterations, 8 updates each, a constant learning rate after the warm-up. The KL to the reference is off
   for all (DMPO alone needs the reference), so that nothing but the objective holds a policy back. Every method keeps
   the trust region of its own recipe: gdsd 4e-4 and gdsd_tlc 0.2 on the summed log-ratio, ratios as in their papers,
   and none for spg and wd1.
2. Learning rate: for each method the best of 1e-4, 3e-4 and 1e-3 by the final validation metric on seed 42, in
   benches of one seed (`--seeds 1`, one workdir for each rate). A rate that collapses is not chosen. Nothing is tuned
   after this.
3. Seeds 42 to 46 for gdsd, gdsd_tlc, espo and spg; 42 to 44 for gdsd_teacher, diffu_grpo, wd1, exact_pg and
   just_grpo, which form a second bench with gdsd first. Seed 42 is run anew.
4. Seeds 42 and 43 of each at ten times its rate: `--rate_factor 10` in a workdir of its own.
5. Reported: final, best, best less final (`drop`), collapsed runs and the iteration since when, the KL to the
   reference; pass@1 and pass@16 of the final policies by `gdsd_jax.evaluate --workdir RUN --samples 16 --temperature
   1.0 --pass_at 1,16`; the exact log-ratio beside the method's own by `gdsd_jax.meter --workdir RUN`. A rank is
   claimed only where the paired interval of the final values excludes zero. Runs that were stopped count as open, not
   as collapsed.
6. With what time is left, the same on Countdown with numbers up to 20.
"""

import compare_tiny


def get_config():
    config = compare_tiny.get_config()
    config.iterations, config.inner_updates, config.seed = 300, 8, 42
    config.prompts_per_iteration, config.group_size, config.microbatch_rows = 16, 8, 128
    config.optimizer.update(learning_rate=3e-4, schedule="constant", warmup_updates=8)
    config.evaluation.update(every=20, count=256)
    config.save_every = 20
    with config.unlocked():
        # Trust regions are what several updates put to the test: each method has that of its own recipe.
        config.settings.gdsd.update(eps_low=4e-4, eps_high=4e-4)
        config.settings.gdsd_tlc.update(eps_low=0.2, eps_high=0.2)
        config.settings.exact_pg = {"at_once": 20}
        config.settings.just_grpo = {"at_once": 20}
    return config
