"""What training a teacher and training a student share."""
