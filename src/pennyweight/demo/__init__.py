"""The embedded demonstration: a real network trained on real images, quantized and measured offline."""
