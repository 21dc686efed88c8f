"""Answers to people and programs: the OpenAI-compatible server, its page, and the terminal chat."""
