"""An example of a sink and a format; docs/writing-a-sink.md explains it."""
