"""Files of the learner: its own checkpoints, and folders of Hugging Face written from them."""
