"""PPO with routed gradients, on Stable-Baselines3."""
