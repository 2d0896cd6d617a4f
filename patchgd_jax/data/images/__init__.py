"""Image files: decoding, regions of pyramids, fitting, background and padding."""
