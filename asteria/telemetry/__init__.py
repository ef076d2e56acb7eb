"""What the optimizer counts; a sink handed down, never a global."""
