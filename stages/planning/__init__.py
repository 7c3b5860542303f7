"""What `decant plan` is made of: parameters, the capture they ask for, what of it fits."""
