"""Evaluating a run: its report, pages and plots, and the comparison of several runs."""
