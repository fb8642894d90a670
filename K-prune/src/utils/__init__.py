"""What K-prune's script needs around its work: checkpoints of either kind."""
