"""Networks that steer a pipeline's denoiser by an image: ControlNets and T2I-Adapters."""
