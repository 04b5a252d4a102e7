"""One function per hot operation. Torch implementations serve every device; faster ones take their place per device."""
