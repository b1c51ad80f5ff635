"""Rollouts: completions sampled from the policy, token ids in and out."""
