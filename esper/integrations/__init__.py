"""Growth inside other people's training loops. A framework is imported by the file of its name
only; Accelerate and bare loops need none of it, `esper.Session` serves them as it is."""
