"""What a training leaves beside its weights: a page, plots, samples."""
