"""Parts of `launch.evaluate`."""
