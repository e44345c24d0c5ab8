"""What the commands on given weights share."""
