"""What the student is compared with: layer maps, projectors, and the terms of the loss."""
