"""Starting runs: several processes on this machine, or jobs on a cluster. Never imports torch."""
