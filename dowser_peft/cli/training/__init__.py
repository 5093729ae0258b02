"""What ``dowser-peft train`` is made of: arguments, data, checkpoints, the trainer, retention."""
