"""What a student learns from a teacher: the losses, the teacher, its logits on disk."""
