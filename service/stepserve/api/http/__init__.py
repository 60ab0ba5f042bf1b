"""HTTP/1.1 connections with limits, and the ASGI middleware."""
