"""A bench on which methods can differ: eight updates on every rollout, and enough iterations for a run to collapse.

    python -m gdsd_jax.compare --config configs/compare_stability.py --workdir runs/stability/seeds --seeds 5 \\
        --metric cells --methods gdsd,gdsd_tlc,espo,spg --rates gdsd=R1,gdsd_tlc=R2,espo=R3,spg=R4

Hardware: CPU cores, a process on each (`--host_count`, `--host_index`); meant for a few minutes a run.
Expected: docs/results.md says which of the runs below have been made.

Question. With one update per rollout GDSD's gradient is ESPO's times a constant, which Adam takes out, so a bench of
single updates cannot tell them apart. Do objectives on a bound drift or collapse when the same rollouts are used
eight times, and does GDSD not?

Protocol, written before the first run that is compared.
1. Task: 4x4 Sudoku, where the reward is the share of empty cells that are right. The model is small: two layers of
   width 32, 35,000 parameters, from 2000 supervised steps on careless demonstrations (hardly a whole puzzle is solved
   then, so that the metric is the share of cells too). 16 completions an iteration (2 prompts of 8), 300 iterations, 8
   updates each, adapters of rank 4, a constant learning rate after the warm-up. The KL to the reference is off for all
   (DMPO alone needs the reference), so that nothing but the objective holds a policy back. Every method keeps the trust
   region of its own recipe: gdsd 4e-4 and gdsd_tlc 0.2 on the summed log-ratio, ratios as in their papers, and none for
   spg and wd1. Model and rollout were chosen for their cost alone. They may be changed once, after a look at how gdsd
   learns at the middle rate and at nothing else. A first trial of gdsd, with 32 completions, rank 16 and rate 3e-4, was
   stopped after 25 iterations because it was too slow.
2. Learning rate: for each method the best of 3e-4, 1e-3 and 3e-3 by the final cells on the validation puzzles, on seed
   42, in benches of one seed (`--seeds 1 --config.optimizer.learning_rate=RATE`, one workdir for each rate, the middle
   one first). A rate that collapses is not chosen. Nothing is tuned after this.
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
    config.iterations, config.inner_updates, config.seed, config.save_every = 300, 8, 42, 50
    config.prompts_per_iteration, config.group_size, config.microbatch_rows = 2, 8, 16
    config.checkpoint, config.model.layer_unroll = "runs/start_stability/merged", 2
    config.tiny.update(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=96)
    config.lora.update(rank=4, alpha=8.0)
    config.optimizer.update(learning_rate=1e-3, schedule="constant", warmup_updates=8)
    config.evaluation.update(every=50, count=128, best="cells")
    with config.unlocked():
        # Trust regions are what several updates put to the test: each method has that of its own recipe.
        config.settings.gdsd.update(eps_low=4e-4, eps_high=4e-4)
        config.settings.gdsd_tlc.update(eps_low=0.2, eps_high=0.2)
        config.settings.update(exact_pg={"at_once": 20}, just_grpo={"at_once": 20})
    return config
