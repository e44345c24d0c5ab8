"""What a run needs of documents besides their tokens: which are long, and how many bytes a token has."""
