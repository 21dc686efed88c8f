"""One file per kind of answer: free short text, yes or no, an option's letter, and texts that a judge must read."""
