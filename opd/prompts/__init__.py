"""Where prompts come from: pure functions of the step."""
