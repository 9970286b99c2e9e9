"""Evolved optimizer update rules, compiled into fused kernels."""
