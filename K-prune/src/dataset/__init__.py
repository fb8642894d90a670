"""What K-prune reads: a task's rows, and the sample of them on which knowledge is measured."""
