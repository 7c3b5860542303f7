"""How good a model's answers are. Each file has the scores of one sort of answer."""
