"""A local judge behind HTTP, as vLLM would serve it."""
