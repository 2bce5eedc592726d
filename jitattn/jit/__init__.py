"""The lower half: from specs to cubins, on disk and on the GPU."""
