"""Kubernetes manifests of a deployment: plain objects for kustomize, no template text."""
