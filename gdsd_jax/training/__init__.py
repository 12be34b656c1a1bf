"""What the commands share: state, rollouts, updates, checkpoints and metrics."""
