"""A bench on which methods can differ: eight updates on every rollout, and enough iterations for a run to collapse.

    python -m gdsd_jax.sft --config configs/compare_stability.py --workdir runs/start_stability
    python -m benchmarks.side_by_side --config configs/compare_stability.py --workdir runs/stability \\
        --rates 1e-4,3e-4,1e-3 --arms gdsd=5,gdsd_tlc=5,espo=5,spg=5,open:gdsd=5,open:gdsd_tlc=5,exact_pg=3,...
    python -m benchmarks.stability ...   # the same flags: tables and figures

Hardware: CPU cores, a process on each (`--worker` 0, 1, ...), about a minute a run. The word after the colon is the
trust region: `own` or `open`. Expected: docs/results.md says which of the runs below have been made.

Question. With one update per rollout GDSD's gradient is ESPO's times a constant, which Adam takes out, so a bench of
single updates cannot tell them apart. Do objectives on a bound drift or collapse when the same rollouts are used
eight times, and does GDSD not?

Protocol, written before the first run that is compared.
1. Task: 4x4 Sudoku, where the reward is the share of empty cells that are right. The model is small: two layers of
   width 32, 35,000 parameters, from 2000 supervised steps on careless demonstrations (half of the cells and hardly a
   whole puzzle are right then, so that the metric is the share of cells too). 32 completions an iteration (4 prompts of
   8), 300 iterations, 8 updates each, adapters of rank 4, a constant learning rate after the warm-up. The KL to the
   reference is off for all (DMPO alone needs the reference), so that nothing but the objective holds a policy back.
2. Trust regions are asked about twice. `own`: every method has that of its own recipe, which is gdsd 4e-4 and gdsd_tlc
   0.2 on the summed log-ratio, ratios as in the papers of the others, none for spg, wd1 and gdsd_teacher. gdsd's public
   region shuts out nearly every later update of a rollout, so it is tested as a brake more than as an objective.
   `open`: gdsd and gdsd_tlc without any, which tests the squared error itself. espo's own region of 0.2 is per token
   of a completion, so that it should hardly act; the share that it clips is reported. The guidance of gdsd, gdsd_tlc
   and gdsd_teacher is the paper's 10 for a sequence.
3. Learning rate: for each method the best of 1e-4, 3e-4 and 1e-3 by the final cells on the validation puzzles, on seed
   42. A rate that diverges is not chosen. Nothing is tuned after this.
4. Seeds 42 to 46 for gdsd, gdsd_tlc, espo and spg, and for the two open ones; 42 to 44 for exact_pg, diffu_grpo, wd1
   and gdsd_teacher. Seed 42 is run anew. exact_pg reads four drawn steps of each rollout, so that it costs what the
   others cost.
5. Seeds 42 and 43 of each at ten times its rate.
6. Reported: final, best, best less final (`drop`), collapsed runs and the iteration since when, the KL to the
   reference; pass@1 and pass@16 of the final policies at temperature 1; the exact log-ratio beside the method's own by
   `gdsd_jax.meter --workdir RUN`. A rank is claimed only where the paired interval of the final values excludes zero.
   Runs that were stopped count as open, not as collapsed.
7. If time is short, the methods of point 4 come in the order in which they are named there. just_grpo, whose update
   costs ten times the others', and Countdown come last of all.

How this differs from what was written first. The protocol allowed model and rollout to be changed once, after a look
at how gdsd learns at the middle rate and at nothing else. Two trials of gdsd were looked at. The first, with 32
completions, rank 16 and rate 3e-4, was stopped after 25 iterations because it was too slow. The second had 16
completions and the middle rate of the grid then, 1e-3: 300 iterations of seed 42 with the public trust region left the
validation cells between 43 and 51 %, and without one took them down from 50 to 43 %. Therefore the rollout was doubled,
the rates, which were 3e-4, 1e-3 and 3e-3, became smaller by half a decade for all methods, and the guidance, which was
20 for a sequence, became the paper's. Point 2 is new: until then all kept their own region. No run of another method
and no further run of gdsd had been looked at when this was written.
"""

import compare_tiny
from common import REGIONS, chosen


def get_config(trust="own"):
    chosen(trust, REGIONS)
    config = compare_tiny.get_config()
    config.iterations, config.inner_updates, config.save_every, config.seed = 300, 8, 50, 42
    config.prompts_per_iteration, config.group_size, config.microbatch_rows = 4, 8, 32
    config.checkpoint, config.lora.rank, config.lora.alpha = "runs/start_stability/merged", 4, 8.0
    config.tiny.update(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=96)
    config.optimizer.update(learning_rate=3e-4, schedule="constant", warmup_updates=8)
    config.evaluation.update(every=50, count=128, best="cells")
    config.model.layer_unroll = 2
    with config.unlocked():
        for name, region in REGIONS[trust].items():
            config.settings[name].update(region)
    return config
