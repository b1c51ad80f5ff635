"""Rewards: numbers for completions, from rules, models, servers and users' functions."""
