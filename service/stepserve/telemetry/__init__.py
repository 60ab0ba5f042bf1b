"""What operators see: metrics, logs. A leaf: it knows neither Ray nor FastAPI nor torch."""
