"""What a run trains: each task is a frozen configuration and a class that builds objectives, registered by name."""
