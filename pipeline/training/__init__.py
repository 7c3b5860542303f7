"""What teaching a teacher and training a student share around `transformers.Trainer`."""
