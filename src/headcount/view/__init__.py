"""Looking at a study: files only, never a model."""
