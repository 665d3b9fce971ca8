"""Rewards that run elsewhere: client, transport and a vision-language model as a judge."""
