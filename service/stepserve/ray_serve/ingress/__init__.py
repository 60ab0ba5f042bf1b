"""The ingress deployment: HTTP in, requests to replicas out."""
