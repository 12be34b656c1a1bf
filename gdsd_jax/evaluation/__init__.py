"""Evaluates policies on held-out rows, reports and compares the results, and measures likelihoods and decoding."""
