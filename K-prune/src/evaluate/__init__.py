"""What K-prune measures beyond the shared package: answers to SQuAD's questions."""
