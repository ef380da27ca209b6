"""What is minimised: each objective returns its loss as a sum and a count."""
