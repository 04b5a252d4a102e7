"""Quantised weights as published: from the stored integers and scales to the numbers they stand for."""
