"""Makes the inputs of the offline demo: text, tasks, vocabulary, word vectors, base model."""
