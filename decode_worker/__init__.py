"""The decode worker: owns a request from submission to its end."""
