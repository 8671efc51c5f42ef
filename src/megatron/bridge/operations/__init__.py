"""What a user asks for: convert, inspect, plan, verify, compare."""
