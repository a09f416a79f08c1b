"""Models and data sets of the Hugging Face hub: names, what is needed of them, fetching, pushing."""
