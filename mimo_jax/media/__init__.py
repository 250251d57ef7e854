"""Images, video and audio on their way into a prompt: decoded within limits, and brought into the towers' form."""
