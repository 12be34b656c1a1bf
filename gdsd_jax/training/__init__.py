"""The parts of training that commands share: state, rollouts, updates, checkpoints and metrics."""
