"""Evaluates policies on held-out rows: completions, metrics with their errors, reports, comparisons of decoding."""
