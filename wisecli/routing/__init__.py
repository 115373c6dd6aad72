"""The side memory and what routes to it; needs torch only (faiss where it is installed)."""
