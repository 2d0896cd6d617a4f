"""Tables of images and labels: CSV files, class folders, labels and splits."""
