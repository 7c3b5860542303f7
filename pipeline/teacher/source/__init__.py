"""Where a teacher comes from: loaded, trained from scratch, quantised, placed on devices."""
