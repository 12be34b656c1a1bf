"""Computes what a run's programs cost on chips that this machine lacks, from chip figures and compiled HLO."""
