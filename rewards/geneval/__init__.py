"""GenEval: objects, counts, colours and positions, by a detector."""
