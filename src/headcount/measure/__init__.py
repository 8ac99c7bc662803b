"""Measuring: tasks to requests, requests to rows, rows to log-likelihoods, accuracies and importances."""
