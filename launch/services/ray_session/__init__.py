"""The Ray session of a run: begun here or joined, its processes, and the places of the actors in it."""
