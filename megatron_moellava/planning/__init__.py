"""What a run will need, before it runs: memory, time and cost of every layout, predicted and partly counted."""
