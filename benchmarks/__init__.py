"""Measurements beside other code; each prints ratios from one run. Never part of the tests."""
