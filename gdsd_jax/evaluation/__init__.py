"""Policies on held-out rows: completions, metrics with their errors, reports, and ways of decoding side by side."""
