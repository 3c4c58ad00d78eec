"""From examples to tokens and masks: an encoder for each task, chats by the base's template, where answers end."""
