"""What post-training methods share that look at the inputs of one part of a network: capture, blocks, the loop."""
