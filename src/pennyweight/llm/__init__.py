"""Language models: a Hugging Face directory in, a quantized one out, block by block. Needs the extra `llm`."""
