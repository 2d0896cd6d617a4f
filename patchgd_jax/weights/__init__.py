"""Published and saved weights: files, downloads, key tables and matching to models."""
