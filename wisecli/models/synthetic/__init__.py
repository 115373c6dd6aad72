"""Made-up facts in prompts that ask them and in prompts that mention them."""
