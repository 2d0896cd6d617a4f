"""Parts without a measured gain, or of one experiment; they may change without notice."""
