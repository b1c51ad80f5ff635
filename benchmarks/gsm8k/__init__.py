"""Learning on real data, from manifests: GSM8K for SFT, and DPO on pairs of its published model solutions."""
