"""Reinforcement-Learning-based Hierarchical Fine-tuning: learn how to fine-tune."""
