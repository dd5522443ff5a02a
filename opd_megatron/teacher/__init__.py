"""The teacher scores: a frozen model in its own layout, its hidden states at response positions, and proofs that it is the right one."""
