"""One request as a pipeline call: its inputs, its images, its previews, its failures."""
