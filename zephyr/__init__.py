"""Zephyr from scratch: dSFT, AI feedback and dDPO in plain PyTorch."""
