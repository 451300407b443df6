"""What servers do beyond averaging."""
