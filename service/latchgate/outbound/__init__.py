"""What is sent out: webhooks and mail."""
