"""The training loop: collect, score, weigh, pack, learn, publish; what is collected ahead, and what became of it."""
