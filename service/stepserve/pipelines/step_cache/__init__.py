"""Which denoiser calls may be skipped, as far as it is known before a request begins."""
