"""The only room that knows Ray: the application, its ingress, its replicas, and their life."""
