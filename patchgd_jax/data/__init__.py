"""Data: tables, images, sources, loading and inspection."""
