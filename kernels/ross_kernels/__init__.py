"""Counter-based noise and fused noising + MSE kernels for reconstruction training."""
