"""Weight transfer from the learner to engines and teachers: shards, digests, receivers, transports."""
